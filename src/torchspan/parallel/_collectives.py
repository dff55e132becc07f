"""Collectives over one axis of a mesh, as operators that a capture records; none of them has a derivative."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


def all_gather(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The `x` of all ranks, one after the other along dimension 0."""
    return _wait(torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), mesh.size(), group_name(mesh)))


def reduce_scatter(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """This rank's part, along dimension 0, of the sum of all ranks' `x`."""
    return _wait(torch.ops._c10d_functional.reduce_scatter_tensor(x.contiguous(), "sum", mesh.size(), group_name(mesh)))


def all_reduce(x: Tensor, mesh: DeviceMesh) -> Tensor:
    """The sum of all ranks' `x`."""
    return _wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), "sum", group_name(mesh)))


def group_name(mesh: DeviceMesh) -> str:
    """The name by which operators know the process group of a mesh of one axis."""
    return mesh.get_group().group_name


def _wait(x: Tensor) -> Tensor:
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return waited
