"""SimpleFSDP: parameters are stored sharded and gathered where they are used, by autograd alone.

No hooks and no streams: each parameter is a DTensor that is split along its first dimension over the ``dp_shard`` axis, and
reading it on its module gives the whole. The all-gather is part of the forward, its derivative, a reduce-scatter of the
gradient, part of the backward, so that a capture sees both and a pass can move and merge them.

Source: SimpleFSDP, https://arxiv.org/abs/2411.00284.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from torchspan.core.errors import InputError
from torchspan.parallel.mesh import DP_SHARD, TP, submesh


@dataclass(frozen=True)
class MixedPrecision:
    """dtypes of the gathered parameter and of the gradient's reduction; None keeps the parameter's own."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Gather:
    """How a stored parameter becomes the one that is computed with.

    `shape` and `stride` are those of the parameter on one rank of the tensor-parallel axis, before FSDP split it.
    """

    dp_mesh: DeviceMesh | None
    tp_mesh: DeviceMesh | None
    tp_placements: tuple[Placement, ...]
    precision: MixedPrecision
    shape: torch.Size
    stride: tuple[int, ...]

    def __call__(self, stored: DTensor) -> Tensor:
        """The whole parameter: a Tensor, or a DTensor on the tensor-parallel axis."""
        local = stored.to_local(grad_placements=stored.placements)
        whole = local if self.dp_mesh is None else self._gather(local, self.dp_mesh)
        if self.tp_mesh is None:
            return whole
        # the gradient comes back with exactly these placements: a partial one is summed over the axis here
        return DTensor.from_local(whole, self.tp_mesh, self.tp_placements, run_check=False)

    def _gather(self, local: Tensor, mesh: DeviceMesh) -> Tensor:
        split = DTensor.from_local(local, mesh, (Shard(0),), run_check=False, shape=self.shape, stride=self.stride)
        whole = split.redistribute(
            placements=(Replicate(),),
            forward_dtype=self.precision.param_dtype,
            backward_dtype=self.precision.reduce_dtype,
        )
        # each rank has the gradient of its own part of the batch: summing them is the reduce-scatter
        return whole.to_local(grad_placements=(Partial("sum"),))


def apply_simple_fsdp(module: nn.Module, mesh: DeviceMesh, precision: MixedPrecision | None = None) -> nn.Module:
    """Store every parameter of `module` as a DTensor over `mesh`, gathered where it is read; in place.

    `mesh` has the axis ``dp_shard``, ``tp``, or both; parameters that are DTensors on ``tp`` already stay split there. Keys of
    the state dict, hooks and ``isinstance`` are kept. Every rank must hold the same whole parameters before.
    """
    dp_mesh, tp_mesh = submesh(mesh, DP_SHARD), submesh(mesh, TP)
    if dp_mesh is None and tp_mesh is None:
        raise InputError(f"the mesh has the axes {mesh.mesh_dim_names}; expected {DP_SHARD!r}, {TP!r} or both")
    replaced: dict[int, tuple[nn.Parameter, Gather]] = {}
    for submodule in module.modules():
        gathers: dict[str, Gather] = {}
        for name, parameter in submodule.named_parameters(recurse=False):
            if id(parameter) not in replaced:  # a tied parameter stays tied
                replaced[id(parameter)] = _store(parameter, mesh, dp_mesh, tp_mesh, precision or MixedPrecision())
            stored, gathers[name] = replaced[id(parameter)]
            submodule.register_parameter(name, stored)
        if gathers:
            submodule.__class__ = _gathering_class(type(submodule), gathers)
    return module


def _store(
    parameter: nn.Parameter,
    mesh: DeviceMesh,
    dp_mesh: DeviceMesh | None,
    tp_mesh: DeviceMesh | None,
    precision: MixedPrecision,
) -> tuple[nn.Parameter, Gather]:
    """The parameter as it is stored, and how it is gathered."""
    on_tp = parameter if isinstance(parameter, DTensor) else None
    if tp_mesh is not None and on_tp is None:
        raise InputError(
            f"a parameter of shape {tuple(parameter.shape)} is on no {TP} axis; apply tensor parallelism, with every parameter "
            "in the plan, before FSDP"
        )
    tp_placements = on_tp.placements if on_tp is not None else ()
    local = (on_tp.to_local() if on_tp is not None else parameter).detach()
    gather = Gather(dp_mesh, tp_mesh, tp_placements, precision, local.shape, local.stride())
    placements: tuple[Placement, ...] = tp_placements
    if dp_mesh is not None:
        placements = (_outer_shard(tp_placements, tp_mesh), *tp_placements)
        # every rank holds the whole: each keeps its part, nothing is sent
        chunks = list(torch.chunk(local, dp_mesh.size(), dim=0))
        rank = dp_mesh.get_local_rank()
        local = chunks[rank].clone() if rank < len(chunks) else local.new_empty((0, *local.shape[1:]))
    stored = DTensor.from_local(local, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())
    return nn.Parameter(stored.detach(), requires_grad=parameter.requires_grad), gather


def _outer_shard(tp_placements: tuple[Placement, ...], tp_mesh: DeviceMesh | None) -> Placement:
    """FSDP's split of dimension 0; where tensor parallelism splits it first, the outer split is strided."""
    if tp_mesh is None or not any(p.is_shard(0) for p in tp_placements):
        return Shard(0)
    from torch.distributed.tensor.placement_types import _StridedShard

    return _StridedShard(0, split_factor=tp_mesh.size())


def _gathering_class(base: type, gathers: dict[str, Gather]) -> type:
    """A subclass of `base` on which reading one of the parameters gathers it.

    A subclass, because Python finds a property before an instance's attribute; what is stored stays in ``_parameters``, where
    the optimizer and the state dict find it.
    """

    def reader(name: str) -> property:
        return property(lambda self: gathers[name](self._parameters[name]))

    members: dict[str, object] = {name: reader(name) for name in gathers}
    return type(base.__name__, (base,), members | {"__module__": base.__module__, "__qualname__": base.__qualname__})
