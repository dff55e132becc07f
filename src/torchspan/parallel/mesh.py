"""Mesh: the processes of a job on named axes, once for the dense parameters and once for the experts.

Dense parameters lie on ``dp_replicate`` × ``dp_shard`` × ``tp``: copies of the model (hybrid sharding), FSDP, tensor parallel.
Experts lie on ``dp_replicate`` × ``ep_shard`` × ``ep``. Every rank of ``dp_shard`` × ``tp`` has tokens of its own, as tensor
parallelism splits the sequence between the parts that it computes; so expert parallelism takes its ranks out of both: the
innermost `ep` ranks of ``dp_shard`` × ``tp`` (first those of one tensor-parallel group) share the experts, and the groups of
``ep`` that are left shard them as FSDP does, on ``ep_shard`` = ``dp_shard`` · ``tp`` / ``ep``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchspan.core.errors import InputError

DP_REPLICATE = "dp_replicate"
DP_SHARD = "dp_shard"
TP = "tp"
EP_SHARD = "ep_shard"
EP = "ep"


@dataclass(frozen=True)
class Degrees:
    """How many processes share each axis; those of `ep` are taken out of ``dp_shard`` × ``tp``.

    >>> Degrees(dp_shard=2, tp=2).check(world_size=8)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.InputError: dp_shard 2 × tp 2 are 4 processes, this job has 8; set the degrees so that ...
    >>> Degrees(dp_shard=4, tp=2, ep=4).expert_axes()
    {'dp_replicate': 1, 'ep_shard': 2, 'ep': 4}
    """

    dp_shard: int = 1
    tp: int = 1
    ep: int = 1
    dp_replicate: int = 1

    def __post_init__(self) -> None:
        for name, degree in {**self.axes(), EP: self.ep}.items():
            if degree < 1:
                raise InputError(f"the degree of {name} is {degree}; expected 1 or more")
        if self.dp_shard * self.tp % self.ep:
            raise InputError(
                f"the degree of {EP} is {self.ep}, which does not divide {DP_SHARD} {self.dp_shard} × {TP} {self.tp} = "
                f"{self.dp_shard * self.tp}; expert parallelism takes its ranks out of these: choose a divisor"
            )

    @property
    def world_size(self) -> int:
        """How many processes that is in all."""
        return self.dp_replicate * self.dp_shard * self.tp

    def axes(self) -> dict[str, int]:
        """Degree by axis of the dense parameters, outermost first."""
        return {DP_REPLICATE: self.dp_replicate, DP_SHARD: self.dp_shard, TP: self.tp}

    def expert_axes(self) -> dict[str, int]:
        """Degree by axis of the experts, outermost first."""
        return {DP_REPLICATE: self.dp_replicate, EP_SHARD: self.dp_shard * self.tp // self.ep, EP: self.ep}

    def check(self, world_size: int) -> None:
        """Raise InputError unless the degrees multiply to `world_size`."""
        if self.world_size != world_size:
            axes = {name: degree for name, degree in self.axes().items() if name != DP_REPLICATE or degree > 1}
            product = " × ".join(f"{name} {degree}" for name, degree in axes.items())
            raise InputError(
                f"{product} are {self.world_size} processes, this job has {world_size}; "
                f"set the degrees so that their product is {world_size}"
            )


@dataclass(frozen=True)
class Meshes:
    """The meshes of a job: `dense` is None in one process, `experts` where experts are stored as dense parameters are."""

    dense: DeviceMesh | None = None
    experts: DeviceMesh | None = None


def check_sizes(sizes: Mapping[str, int], degree: int, axis: str = TP) -> None:
    """Raise InputError unless `degree` divides every one of the named `sizes`.

    >>> check_sizes({"num_kv_heads": 2}, 4)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: num_kv_heads is 2, which tp 4 does not divide; expected a multiple of 4
    """
    for name, size in sizes.items():
        if size % degree:
            raise InputError(f"{name} is {size}, which {axis} {degree} does not divide; expected a multiple of {degree}")


def build_meshes(degrees: Degrees, world_size: int, device_type: str = "cpu") -> Meshes:
    """The meshes of a job, each with an axis for every degree above 1.

    A process group must be there (``torch.distributed.init_process_group``) unless the job is one process.
    """
    degrees.check(world_size)
    has_own_experts = degrees.tp > 1 or degrees.ep > 1
    return Meshes(_mesh(degrees.axes(), device_type), _mesh(degrees.expert_axes(), device_type) if has_own_experts else None)


def _mesh(degrees: Mapping[str, int], device_type: str) -> DeviceMesh | None:
    axes = {name: degree for name, degree in degrees.items() if degree > 1}
    if not axes:
        return None
    return init_device_mesh(device_type, tuple(axes.values()), mesh_dim_names=tuple(axes))


def submesh(mesh: DeviceMesh | None, axis: str) -> DeviceMesh | None:
    """The one-dimensional mesh of `axis`, or None where `mesh` has no such axis."""
    if mesh is None or axis not in (mesh.mesh_dim_names or ()):
        return None
    return mesh[axis] if mesh.ndim > 1 else mesh
