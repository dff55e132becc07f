"""Meshes that are cut from a root mesh by axes (see ``_axes.py``), and the process groups that they need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torchspan.backports._axes import Axis, copies_of, joined, rows_of
from torchspan.private import fx

Override = tuple[Any, Any]  # a backend's name and its options, each None for the default


def is_derived(mesh: Any) -> bool:
    """Whether a mesh is one of ours."""
    return "_root_mesh" in getattr(mesh, "__dict__", {})


def root_mesh(self: Any) -> Any:
    """The mesh that this one was cut from in the first place; a mesh that was cut from none is its own."""
    from torch.distributed.device_mesh import _mesh_resources

    return _mesh_resources.get_root_mesh(self)


def axes_of(mesh: Any) -> list[Axis]:
    """The axes of a mesh over the ranks of its root."""
    from torch.distributed.device_mesh import _mesh_resources

    if is_derived(mesh):
        return list(mesh._axes)
    parent = root_mesh(mesh)
    if parent == mesh:
        return rows_of(mesh.mesh.shape)
    named = dict(zip(parent.mesh_dim_names, axes_of(parent)))
    flattened = _mesh_resources.flatten_name_to_root_dims.get(parent, {})
    for name, dims in flattened.items():
        named[name] = joined(axes_of(parent)[dim] for dim in dims)
    return [named[name] for name in mesh.mesh_dim_names]


def ranks_of(root: Any) -> torch.Tensor:
    """The ranks of a root mesh, in order."""
    return root.mesh.contiguous().flatten()


def flattened_of(root: Any) -> Mapping[str, Any]:
    """The meshes that were made by flattening one of ours, by name; a root mesh holds them."""
    return vars(root).get("_flatten_mapping", {})


def derive(root: Any, axes: Sequence[Axis], names: Sequence[str], groups: list[str] | None) -> Any:
    """A mesh of these axes over the ranks of `root`, the one that has this rank, with these process groups."""
    from torch.distributed.device_mesh import DeviceMesh

    with fx.with_real_tensors():
        copies, rank = copies_of(axes, ranks_of(root)), root.get_rank()
        own_copies = [copy for copy in copies if len(copies) == 1 or rank in copy]
        if not own_copies:
            raise RuntimeError(f"rank {rank} has no mesh of the dims {tuple(names)}: it is not in {root}")
        mesh: Any = DeviceMesh(root.device_type, own_copies[0], mesh_dim_names=tuple(names), _init_backend=False)
    mesh._root_mesh, mesh._axes = root, tuple(axes)
    if groups is not None:
        mesh._dim_group_names = groups
    return mesh


def new_groups(root: Any, axes: Sequence[Axis], names: Sequence[str], overrides: Sequence[Override]) -> list[str]:
    """The names of new process groups, one for each axis; none for a rank that is not in the mesh."""
    with fx.with_real_tensors():
        ranks = [copies_of([axis], ranks_of(root)).tolist() for axis in axes]
    groups = [_new_group(*arguments) for arguments in zip(ranks, names, overrides)]
    return [group for group in groups if group is not None]


def _new_group(ranks: list[list[int]], name: str, override: Override) -> str | None:
    """The name of this rank's group among those of the given `ranks`, all of which are made."""
    from torch import distributed

    world, (backend, options) = distributed.distributed_c10d._get_default_group(), override
    if len(ranks[0]) == distributed.get_world_size() and override == (None, None):
        if not torch.cuda.is_available() or distributed.get_backend(world) != "gloo":
            return world.group_name
        everyone = list(range(len(ranks[0])))
        return distributed.new_group(everyone, backend="cpu:gloo,cuda:nccl", group_desc="mesh_default").group_name
    named: dict[str, Any] = {"pg_options": options, "group_desc": f"mesh_{name}"}
    if options is not None:
        named["timeout"] = options._timeout
    if _can_split(world, backend):
        part = distributed.split_group(parent_pg=world, split_ranks=ranks, **named)
        return None if part is None else part.group_name
    groups = [distributed.new_group(group, backend=backend, **named) for group in ranks]
    own_names = [group.group_name for group, members in zip(groups, ranks) if distributed.get_rank() in members]
    return own_names[0] if own_names else None


def _can_split(world: Any, backend: str | None) -> bool:
    """Whether the world's communicator is there to split, so that no group is made from nothing."""
    if getattr(world, "bound_device_id", None) is None or not torch.cuda.is_available():
        return False
    return backend is None or world._get_backend(torch.device("cuda")).name() == backend


def overrides_of(requests: Mapping[int | str, Any] | None, names: Sequence[str]) -> list[Override]:
    """For each name the backend and the options that were asked for, by name or by position."""
    left, overrides = dict(requests or {}), []
    for position, name in enumerate(names):
        if name in left and position in left:
            raise RuntimeError(f"backend_override has both the dim index {position} and its name {name!r}; give one")
        value = left.pop(name, None) or left.pop(position, None)
        if isinstance(value, tuple):
            overrides.append(value)
        else:
            overrides.append((value, None) if value is None or isinstance(value, str) else (None, value))
    if left:
        raise RuntimeError(
            f"backend_override has keys that are no dims: {list(left)}; expected integers below {len(names)} "
            f"or one of {tuple(names)}"
        )
    return overrides
