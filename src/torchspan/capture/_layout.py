"""How a DTensor is made of this rank's part of it, and the part itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Layout:
    """How a DTensor is made of its local tensor."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def wrap(self, local: Tensor) -> Tensor:
        """The DTensor of which `local` is this rank's part."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )


def layout_of(tensor: Tensor) -> Layout | None:
    """The layout of a DTensor; None for a plain tensor."""
    if not is_dtensor(tensor):
        return None
    return Layout(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())  # type: ignore[attr-defined]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor; imports torch.distributed.tensor only if someone else has."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, outside of autograd."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]
