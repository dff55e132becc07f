"""Rows sent between all ranks of an axis, as many to each as a tensor says: one operator, however many ranks there are.

torch's own all-to-all takes the numbers as Python integers: in a graph, one data-dependent integer a rank. Here they stay in a
tensor, and only the number of rows that arrive in all is an integer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchspan.parallel._collectives import group_name

_NAME = "torchspan::all_to_all_rows"
# not custom_op, whose first call imports torch's compiler: seconds
torch.library.define(_NAME, "(Tensor x, Tensor sent, Tensor received, SymInt num_received, str group) -> Tensor")


@torch.library.impl(_NAME, ("CPU", "CUDA"))
def _send(x_ND: Tensor, sent_R: Tensor, received_R: Tensor, num_received: int, group: str) -> Tensor:
    result: Tensor = torch.ops._c10d_functional.all_to_all_single(x_ND, received_R.tolist(), sent_R.tolist(), group)
    return result


@torch.library.register_fake(_NAME)
def _fake(x_ND: Tensor, sent_R: Tensor, received_R: Tensor, num_received: int, group: str) -> Tensor:
    return x_ND.new_empty((num_received, *x_ND.shape[1:]))


class ExchangeRows(torch.autograd.Function):
    """Rows exchanged over the axis `mesh`; the gradient of each row goes back to where the row came from.

    ``apply(x_ND, sent_R, received_R, num_received, mesh)`` gives (num_received, D).
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, sent_R: Tensor, received_R: Tensor, num_received: int, mesh: DeviceMesh) -> Tensor:
        ctx.save_for_backward(sent_R, received_R)
        ctx.num_sent, ctx.mesh = x_ND.shape[0], mesh
        return _exchange(x_ND, sent_R, received_R, num_received, mesh)

    @staticmethod
    def backward(ctx: Any, gradient_MD: Tensor) -> tuple[Tensor, None, None, None, None]:
        sent_R, received_R = ctx.saved_tensors
        return _exchange(gradient_MD, received_R, sent_R, ctx.num_sent, ctx.mesh), None, None, None, None


def _exchange(x_ND: Tensor, sent_R: Tensor, received_R: Tensor, num_received: Any, mesh: DeviceMesh) -> Tensor:
    """Send ``sent_R[r]`` rows of `x_ND` to each rank r, in their order, and receive ``received_R[r]`` from it, (M, D)."""
    rows = torch.ops.torchspan.all_to_all_rows(x_ND.contiguous(), sent_R, received_R, num_received, group_name(mesh))
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(rows)
    return waited
