"""Expert parallelism: each rank of an axis has a share of the experts, and tokens travel to the experts that they chose.

Written as hooks on a model that knows nothing of it. A module of experts is called with rows of tokens, sorted by expert, and
how many rows each expert has. Before it, the rows are sent to the ranks that have their experts; after it, the results go back.
How many rows travel is data: the sizes are read at every step, and one captured graph serves them all, none at all too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from torchspan.core.errors import unknown_name
from torchspan.parallel._all_to_all import ExchangeRows
from torchspan.parallel._collectives import all_reduce, group_name
from torchspan.parallel.mesh import EP, check_sizes, submesh
from torchspan.parallel.plan import modules_of

ExpertStyle = Literal["experts", "counts"]
"""What expert parallelism does to a submodule.

``experts``: its parameters, stacked by expert along dimension 0, are shared between the ranks. It is called with rows (N, D),
sorted by expert, and the number of rows of each expert (E,), and returns a row for each. ``counts``: its first argument, a
number for each expert (E,), is summed over all ranks that have tokens of their own.
"""
EXPERT_STYLES: tuple[ExpertStyle, ...] = ("experts", "counts")


def apply_expert_parallel(
    module: nn.Module, plan: Mapping[str, str], mesh: DeviceMesh | None, token_axes: tuple[DeviceMesh, ...]
) -> nn.Module:
    """Share the experts of `module` over the axis ``ep`` of `mesh`, in place, by `plan`, and sum counts over `token_axes`.

    `plan` maps patterns of submodule names to expert styles. `mesh` without an axis ``ep`` leaves each rank all the experts.
    Parameters of experts become DTensors on ``ep``; an unknown style and a pattern that nothing answers to are InputErrors.
    """
    ep_mesh = submesh(mesh, EP)
    for pattern, style in plan.items():
        if style not in EXPERT_STYLES:
            raise unknown_name("expert style", style, EXPERT_STYLES, f"there are: {', '.join(EXPERT_STYLES)}")
        for submodule in modules_of(module, pattern, "expert-parallel"):
            if style == "counts":
                _sum_counts(submodule, token_axes)
            elif ep_mesh is not None:
                _share(submodule, ep_mesh)
    return module


def _sum_counts(module: nn.Module, axes: tuple[DeviceMesh, ...]) -> None:
    def summed(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        counts_E = args[0]
        for axis in axes:
            counts_E = all_reduce(counts_E, axis)
        return (counts_E, *args[1:])

    module.register_forward_pre_hook(summed)


def _share(module: nn.Module, mesh: DeviceMesh) -> None:
    """Leave this rank its share of the experts, and send rows to where theirs are."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        check_sizes({f"the number of experts of {name}": parameter.shape[0]}, mesh.size(), EP)
        part = parameter.detach().chunk(mesh.size(), dim=0)[mesh.get_local_rank()].clone()
        shared = DTensor.from_local(part, mesh, (Shard(0),), run_check=False)
        module.register_parameter(name, nn.Parameter(shared, requires_grad=parameter.requires_grad))
    travels: list[_Travel] = []

    def dispatch(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        travels.append(_Travel(args[1], mesh))
        return travels[-1].dispatch(args[0])

    def combine(_: nn.Module, __: tuple[Any, ...], rows_MD: Tensor) -> Tensor:
        return travels.pop().combine(rows_MD)

    module.register_forward_pre_hook(dispatch)
    module.register_forward_hook(combine)


class _Travel:
    """One journey of rows to their experts and back. R ranks, E experts in all, N rows sent, M rows received."""

    def __init__(self, counts_E: Tensor, mesh: DeviceMesh) -> None:
        self._mesh = mesh
        self._sent_RX = counts_E.view(mesh.size(), -1)  # X experts on each rank
        received = torch.ops._c10d_functional.all_to_all_single(
            counts_E, *[[counts_E.numel() // mesh.size()] * mesh.size()] * 2, group_name(mesh)
        )
        self._received_RX = torch.ops._c10d_functional.wait_tensor(received).view(mesh.size(), -1)

    def dispatch(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """The rows of this rank's experts, (M, D), sorted by expert, and how many each has, (X,)."""
        self._num_sent = x_ND.shape[0]
        num_received: Any = self._received_RX.sum().item()
        torch._check(num_received >= 0)
        rows_MD = ExchangeRows.apply(x_ND, self._sent_RX.sum(1), self._received_RX.sum(1), num_received, self._mesh)
        # rows come sorted by rank, and by expert within each: sorted by expert they are computed at once
        ends_RX = self._received_RX.flatten().cumsum(0)
        group_M = torch.searchsorted(ends_RX, torch.arange(num_received, device=x_ND.device), right=True)
        self._order_M = torch.argsort(group_M % self._received_RX.shape[1], stable=True)
        self._inverse_M = torch.argsort(self._order_M)
        return _Permute.apply(rows_MD, self._order_M, self._inverse_M), self._received_RX.sum(0)

    def combine(self, rows_MD: Tensor) -> Tensor:
        """The rows that this rank sent, (N, D), as their experts changed them."""
        rows_MD = _Permute.apply(rows_MD, self._inverse_M, self._order_M)
        back_ND: Tensor = ExchangeRows.apply(
            rows_MD, self._received_RX.sum(1), self._sent_RX.sum(1), self._num_sent, self._mesh
        )
        return back_ND


class _Permute(torch.autograd.Function):
    """Rows in another order; the gradient by the inverse order, and not by adding up."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_N: Tensor, inverse_N: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_N)
        return x_ND[order_N]

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        (inverse_N,) = ctx.saved_tensors
        return gradient_ND[inverse_N], None, None
