"""Mesh: the processes of a job on named axes, ``dp_shard`` (FSDP) and ``tp`` (tensor parallel)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchspan.core.errors import InputError

DP_SHARD = "dp_shard"
TP = "tp"


@dataclass(frozen=True)
class Degrees:
    """How many processes share each axis.

    >>> Degrees(dp_shard=2, tp=2).check(world_size=8)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.InputError: dp_shard 2 × tp 2 are 4 processes, this job has 8; set the degrees so that ...
    """

    dp_shard: int = 1
    tp: int = 1

    def __post_init__(self) -> None:
        for name, degree in self.axes().items():
            if degree < 1:
                raise InputError(f"the degree of {name} is {degree}; expected 1 or more")

    @property
    def world_size(self) -> int:
        """How many processes that is in all."""
        return self.dp_shard * self.tp

    def axes(self) -> dict[str, int]:
        """Degree by axis, outermost first."""
        return {DP_SHARD: self.dp_shard, TP: self.tp}

    def check(self, world_size: int) -> None:
        """Raise InputError unless the degrees multiply to `world_size`."""
        if self.world_size != world_size:
            product = " × ".join(f"{name} {degree}" for name, degree in self.axes().items())
            raise InputError(
                f"{product} are {self.world_size} processes, this job has {world_size}; "
                f"set the degrees so that their product is {world_size}"
            )


def check_sizes(sizes: Mapping[str, int], degree: int, axis: str = TP) -> None:
    """Raise InputError unless `degree` divides every one of the named `sizes`.

    >>> check_sizes({"num_kv_heads": 2}, 4)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: num_kv_heads is 2, which tp 4 does not divide; expected a multiple of 4
    """
    for name, size in sizes.items():
        if size % degree:
            raise InputError(f"{name} is {size}, which {axis} {degree} does not divide; expected a multiple of {degree}")


def build_mesh(degrees: Degrees, world_size: int, device_type: str = "cpu") -> DeviceMesh | None:
    """The mesh of a job, with an axis for each degree above 1; None where there is none, that is, one process.

    A process group must be there (``torch.distributed.init_process_group``) unless the answer is None.
    """
    degrees.check(world_size)
    axes = {name: degree for name, degree in degrees.axes().items() if degree > 1}
    if not axes:
        return None
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def submesh(mesh: DeviceMesh | None, axis: str) -> DeviceMesh | None:
    """The one-dimensional mesh of `axis`, or None where `mesh` has no such axis."""
    if mesh is None or axis not in (mesh.mesh_dim_names or ()):
        return None
    return mesh[axis] if mesh.ndim > 1 else mesh
