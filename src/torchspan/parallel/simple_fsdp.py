"""SimpleFSDP: parameters are stored sharded and gathered where they are used, by autograd alone.

No hooks and no streams: reading a parameter on its module gathers it from the ranks of the ``dp_shard`` axis. The all-gather is
part of the forward, its derivative, a reduce-scatter of the gradient, part of the backward, so that a capture sees both and a
pass can move and merge them. With a ``dp_replicate`` axis (hybrid sharding) the scattered gradient is then summed over it.

A parameter is stored flat: as one dimension, padded to a multiple of the number of ranks, of which each rank has an equal part.
So a graph has as many nodes on 16,384 ranks as on two. State dicts have the parameter's own shape, as a DTensor that is split
along dimension 0, and load from such or from whole tensors.

Source: SimpleFSDP, https://arxiv.org/abs/2411.00284.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from torchspan.core.errors import InputError
from torchspan.parallel._collectives import all_gather, all_reduce, reduce_scatter
from torchspan.parallel.mesh import DP_REPLICATE, DP_SHARD, EP, EP_SHARD, TP, submesh
from torchspan.parallel.reshard import Resharding


@dataclass(frozen=True)
class MixedPrecision:
    """dtypes of the gathered parameter and of the gradient's reduction; None keeps the parameter's own."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Stored:
    """How a parameter is stored, and how it becomes the one that is computed with.

    `mesh` has all its axes; `shard` and `replicate` are those of FSDP, `split` is that of tensor or expert parallelism, on
    which the parameter has `split_placements`. `export_mesh` is that of state dicts. `shape` is that of the part of one rank
    of `split`, before FSDP cut it, and `stride` that of a contiguous one; `whole_shape` and `whole_stride` are the parameter's.
    """

    mesh: DeviceMesh
    shard: DeviceMesh | None
    replicate: DeviceMesh | None
    split: DeviceMesh | None
    split_placements: tuple[Placement, ...]
    precision: MixedPrecision
    shape: torch.Size
    stride: tuple[int, ...]
    whole_shape: torch.Size
    whole_stride: tuple[int, ...]
    export_mesh: DeviceMesh
    resharding: Resharding | None = None

    @property
    def num_shards(self) -> int:
        """How many ranks share the part of one rank of `split`."""
        return 1 if self.shard is None else self.shard.size()

    @property
    def shard_size(self) -> int:
        """How many numbers a rank has, padding included."""
        return -(-self.shape.numel() // self.num_shards)

    # storing

    def cut(self, part: Tensor) -> Tensor:
        """This rank's numbers, (K,), of the part of its rank of `split`."""
        rank = 0 if self.shard is None else self.shard.get_local_rank()
        numbers = part.reshape(-1)[rank * self.shard_size : (rank + 1) * self.shard_size]
        return F.pad(numbers, (0, self.shard_size - numbers.numel())) if numbers.numel() < self.shard_size else numbers.clone()

    def store(self, part: Tensor) -> DTensor:
        """The parameter as it is stored, of the part of this rank of `split`."""
        ranks_of_split = 1 if self.split is None or self.split_placements[0].is_replicate() else self.split.size()
        size = torch.Size((self.shard_size * self.num_shards * ranks_of_split,))
        on_replicate = () if self.replicate is None else (Replicate(),)
        on_split = tuple(Shard(0) if p.is_shard() else p for p in self.split_placements)
        placements = (*on_replicate, *(() if self.shard is None else (Shard(0),)), *on_split)
        return DTensor.from_local(self.cut(part), self.mesh, placements, run_check=False, shape=size, stride=(1,))

    # computing

    def gathered(self, stored: Any) -> Tensor:
        """The parameter that is computed with: a DTensor on the tensor-parallel axis, else a Tensor, this rank's experts.

        InputError where another tensor than the stored one was put in its place.
        """
        if not isinstance(stored, DTensor) or stored.ndim != 1:
            raise InputError(
                f"a parameter that SimpleFSDP stores was replaced by a {type(stored).__name__} of shape {tuple(stored.shape)}; "
                "change its values with load_state_dict, or replace it before apply_simple_fsdp"
            )
        part = _Gather.apply(stored.to_local(grad_placements=stored.placements), self)
        if self.resharding is not None and self.shard is not None:
            self.resharding.note(part, partial(self._gather_again, stored.detach(), stored._version))
        if self.split is None or self.split.mesh_dim_names != (TP,):
            return part
        # the gradient comes back with exactly these placements: a partial one is summed over the axis here
        return DTensor.from_local(part, self.split, self.split_placements, run_check=False)

    def _gather_again(self, stored: Any, version: int) -> Tensor:
        if stored._version != version:
            raise InputError(
                "a parameter was changed between the forward and its backward, which gathers it again; "
                "run the backward first, or keep gathered parameters (reshard_after_forward=False)"
            )
        return _whole(self.lowered(stored.to_local()), self)

    def lowered(self, flat_K: Tensor) -> Tensor:
        """A rank's numbers in the dtype in which they are gathered."""
        return flat_K.to(self.precision.param_dtype or flat_K.dtype) if flat_K.is_floating_point() else flat_K

    # state dicts

    def export(self, stored: Any) -> Tensor:
        """The stored parameter in its own shape, a DTensor on `mesh`; each rank of the job must call this."""
        part = _whole(stored.detach().to_local(), self)
        sharded: Placement = Shard(0) if part.ndim else Replicate()
        if self.shard is not None and part.ndim:
            parts = part.chunk(self.shard.size(), dim=0)
            rank = self.shard.get_local_rank()
            part = parts[rank].clone() if rank < len(parts) else part.new_empty((0, *self.shape[1:]))
        on_replicate = () if self.replicate is None else (Replicate(),)
        placements = (*on_replicate, *self.split_placements, *(() if self.shard is None else (sharded,)))
        return DTensor.from_local(
            part, self.export_mesh, placements, run_check=False, shape=self.whole_shape, stride=self.whole_stride
        )

    def imported(self, value: Tensor, name: str) -> DTensor:
        """What is stored for a parameter that is `value`: a whole Tensor, or a DTensor of the whole's shape."""
        if value.shape != self.whole_shape:
            raise InputError(
                f"{name} of the state has the shape {tuple(value.shape)}; expected {tuple(self.whole_shape)}, "
                "the parameter's own"
            )
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        if self.split is not None:
            whole = distribute_tensor(whole, self.split, self.split_placements, src_data_rank=None).to_local()
        return self.store(whole.detach())


class _Gather(torch.autograd.Function):
    """Gather a part from the ranks that share it; its derivative scatters the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, flat_K: Tensor, stored: Stored) -> Tensor:
        ctx.stored, ctx.dtype = stored, flat_K.dtype
        return _whole(stored.lowered(flat_K), stored)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        stored: Stored = ctx.stored
        if gradient.is_floating_point():
            gradient = gradient.to(stored.precision.reduce_dtype or gradient.dtype)
        flat = gradient.reshape(-1)
        padding = stored.shard_size * stored.num_shards - flat.numel()
        if padding:
            flat = F.pad(flat, (0, padding))
        # each rank has the gradient of its own part of the batch: summing them is the gradient of the whole
        if stored.shard is not None:
            flat = reduce_scatter(flat, stored.shard)
        if stored.replicate is not None:
            flat = all_reduce(flat, stored.replicate)
        return flat.to(ctx.dtype), None


def _whole(flat_K: Tensor, stored: Stored) -> Tensor:
    """The part that all ranks' numbers make together, in its shape."""
    flat = flat_K if stored.shard is None else all_gather(flat_K, stored.shard)
    if flat.numel() > stored.shape.numel() or len(stored.shape) == 1:  # one node in a graph, with padding and without
        return flat.as_strided(stored.shape, stored.stride)
    return flat.view(stored.shape)


def apply_simple_fsdp(
    module: nn.Module, mesh: DeviceMesh, precision: MixedPrecision | None = None, resharding: Resharding | None = None
) -> nn.Module:
    """Store every parameter of `module` flat on `mesh`, gathered where it is read; in place.

    `mesh` has one or more of the axes ``dp_replicate``, ``dp_shard`` and ``tp``; modules of experts are applied before, on a
    mesh of ``dp_replicate``, ``ep_shard`` and ``ep``, as what is stored already stays as it is. Parameters that are DTensors on
    ``tp`` or ``ep`` stay split there. Keys of the state dict, hooks and ``isinstance`` are kept. A state dict has the
    parameters' own shapes; every rank must take part in making or loading one. Every rank must hold the same whole parameters
    before. With `resharding`, the policy of the module whose forward is run, parameters are gathered again for the backward;
    without, they are kept for it.
    """
    axes = {name: submesh(mesh, name) for name in (DP_REPLICATE, DP_SHARD, TP, EP_SHARD, EP)}
    if not any(axes.values()):
        raise InputError(f"the mesh has the axes {mesh.mesh_dim_names}; expected some of {', '.join(axes)}")
    export_mesh = _export_mesh(mesh, axes)
    replaced: dict[int, tuple[nn.Parameter, Stored]] = {}
    for submodule in module.modules():
        if "_torchspan_stored" in vars(type(submodule)):
            continue
        layouts: dict[str, Stored] = {}
        for name, parameter in submodule._parameters.items():
            if parameter is None:
                continue
            if id(parameter) not in replaced:  # a tied parameter stays tied
                replaced[id(parameter)] = _store(parameter, mesh, export_mesh, axes, precision or MixedPrecision(), resharding)
            stored, layouts[name] = replaced[id(parameter)]
            submodule.register_parameter(name, stored)
        if layouts:
            submodule.__class__ = _gathering_class(type(submodule), layouts)
            submodule.register_state_dict_post_hook(_export_state)
            submodule.register_load_state_dict_pre_hook(_import_state)
    return module


def _store(
    parameter: nn.Parameter,
    mesh: DeviceMesh,
    export_mesh: DeviceMesh,
    axes: Mapping[str, DeviceMesh | None],
    precision: MixedPrecision,
    resharding: Resharding | None,
) -> tuple[nn.Parameter, Stored]:
    """The parameter as it is stored, and how."""
    split = axes[TP] or axes[EP]
    on_split = parameter if isinstance(parameter, DTensor) else None
    if split is not None and on_split is None:
        kind = "tensor" if axes[TP] is not None else "expert"
        raise InputError(
            f"a parameter of shape {tuple(parameter.shape)} is on no {split.mesh_dim_names[0]} axis; "  # type: ignore[index]
            f"apply {kind} parallelism, with every parameter in the plan, before FSDP"
        )
    part = (on_split.to_local() if on_split is not None else parameter).detach()
    stored = Stored(
        mesh=mesh,
        shard=axes[DP_SHARD] or axes[EP_SHARD],
        replicate=axes[DP_REPLICATE],
        split=split,
        split_placements=tuple(on_split.placements) if on_split is not None else (),
        precision=precision,
        shape=part.shape,
        stride=torch.empty(part.shape, device="meta").stride(),
        whole_shape=parameter.shape,
        whole_stride=parameter.stride(),
        export_mesh=export_mesh,
        resharding=resharding,
    )
    return nn.Parameter(stored.store(part).detach(), requires_grad=parameter.requires_grad), stored


def _export_mesh(mesh: DeviceMesh, axes: Mapping[str, DeviceMesh | None]) -> DeviceMesh:
    """The mesh of state dicts: the axis that splits parameters first stands before the one that shards what it left.

    In this order the layout is that of two plain splits. DTensor's strided splits, which say the other order, lose rows on
    torch 2.8 where the ranks do not divide them.
    """
    if not (axes[DP_SHARD] or axes[EP_SHARD]) or not (axes[TP] or axes[EP]):
        return mesh
    names = mesh.mesh_dim_names or ()
    return DeviceMesh(mesh.device_type, mesh.mesh.transpose(-1, -2), mesh_dim_names=(*names[:-2], names[-1], names[-2]))


def stored_layouts(module: nn.Module) -> dict[str, Stored]:
    """How each parameter of `module` is stored, by its name; none that `apply_simple_fsdp` has not seen."""
    return {
        f"{path}.{name}".lstrip("."): stored
        for path, submodule in module.named_modules()
        for name, stored in getattr(type(submodule), "_torchspan_stored", {}).items()
    }


def _export_state(module: nn.Module, state: dict[str, Any], prefix: str, _: object) -> None:
    for name, stored in type(module)._torchspan_stored.items():  # type: ignore[attr-defined]
        if prefix + name in state:
            state[prefix + name] = stored.export(module._parameters[name])


def _import_state(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
    for name, stored in type(module)._torchspan_stored.items():  # type: ignore[attr-defined]
        if prefix + name in state:
            state[prefix + name] = stored.imported(state[prefix + name], prefix + name)


def _gathering_class(base: type, layouts: Mapping[str, Stored]) -> type:
    """A subclass of `base` on which reading one of the parameters gathers it.

    A subclass, because Python finds a property before an instance's attribute; what is stored stays in ``_parameters``, where
    the optimizer and the state dict find it.
    """

    def reader(name: str) -> property:
        return property(lambda self: layouts[name].gathered(self._parameters[name]))

    members: dict[str, object] = {name: reader(name) for name in layouts}
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "_torchspan_stored": layouts}
    return type(base.__name__, (base,), members)
