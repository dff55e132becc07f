"""``DeviceMesh._unflatten`` and ``_concatenate``: meshes of other shapes over the ranks of one root mesh.

A mesh's axis is given by (size, stride) pairs over the ranks of its root mesh in order (see ``_axes.py``). So the axes of
meshes that were cut in different ways can be compared, joined, and turned into the groups of ranks that each needs.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

from torchspan.backports._axes import copies_of, is_disjoint, joined, size_of, split
from torchspan.backports._base import Backport, Change
from torchspan.backports._derived_meshes import (
    axes_of,
    derive,
    flattened_of,
    is_derived,
    new_groups,
    overrides_of,
    ranks_of,
    root_mesh,
)
from torchspan.private import fx

_PLACE = "torch.distributed.device_mesh"
_FSDP_PARAM = "torch.distributed.fsdp._fully_shard._fsdp_param"


def _overriding(init: Callable[..., Any]) -> Callable[..., Any]:
    """init_device_mesh, with `backend_override`."""
    if "backend_override" in inspect.signature(init).parameters:
        return init

    @functools.wraps(init)
    def init_device_mesh(device_type: str, mesh_shape: tuple[int, ...], *, backend_override: Any = None, **options: Any) -> Any:
        if not backend_override:
            return init(device_type, mesh_shape, **options)
        from torch.distributed.device_mesh import _mesh_resources

        BACKPORT.record_use("init_device_mesh(backend_override=…)")
        names = options.get("mesh_dim_names") or [f"dim {index}" for index in range(len(mesh_shape))]
        group_options, before = _mesh_resources.mesh_dim_group_options, dict(_mesh_resources.mesh_dim_group_options)
        overrides = enumerate(overrides_of(backend_override, names))
        group_options.update({dim: override for dim, override in overrides if override != (None, None)})
        try:
            return init(device_type, mesh_shape, **options)
        finally:
            group_options.clear()
            group_options.update(before)

    return init_device_mesh


# what torch has


def _unflatten(
    self: Any,
    dim: int | str,
    mesh_sizes: tuple[int, ...],
    mesh_dim_names: tuple[str, ...],
    backend_override: Mapping[int | str, Any] | None = None,
) -> Any:
    """A mesh like this one, with its dim `dim` cut into dims of `mesh_sizes`, the outermost first, named `mesh_dim_names`.

    Args:
        dim: the dim's position or name.
        mesh_sizes: their product is the dim's size.
        mesh_dim_names: one for each size; the new mesh is sliced by them, this one is not.
        backend_override: the backend, its options, or both, for the new dims, by name or position; ``fake`` makes a group
            that does not communicate.

    Raises:
        ValueError: there is no such dim, or the sizes do not make it up.
        RuntimeError: there is not one name for each size, or `backend_override` is for a dim that is not new.
    """
    position = _position(self, dim)
    if len(mesh_sizes) != len(mesh_dim_names):
        raise RuntimeError(
            f"mesh_dim_names must have same length as mesh_sizes in _unflatten! Got {mesh_dim_names} and {mesh_sizes}"
        )
    overrides = overrides_of(backend_override, mesh_dim_names)
    axes, names, root = axes_of(self), list(_names(self)), root_mesh(self)
    if math.prod(mesh_sizes) != size_of(axes[position]):
        raise ValueError(
            f"The product of mesh_sizes={tuple(mesh_sizes)} is {math.prod(mesh_sizes)}, but the original dimension at "
            f"dim={position} has size {size_of(axes[position])}. These must be equal for unflatten to work correctly."
        )
    BACKPORT.record_use("DeviceMesh._unflatten")
    new = split(axes[position], mesh_sizes)
    groups = getattr(self, "_dim_group_names", None)
    if groups is not None:
        added, groups = new_groups(root, new, mesh_dim_names, overrides), list(groups)
        groups[position : position + 1] = added
    axes[position : position + 1] = new
    names[position : position + 1] = mesh_dim_names
    return derive(root, axes, names, groups)


def _position(mesh: Any, dim: int | str) -> int:
    if isinstance(dim, str):
        if dim not in _names(mesh):
            raise ValueError(f"dim {dim} specified in `_unflatten` is not in {mesh.mesh_dim_names}")
        return int(_names(mesh).index(dim))
    if not 0 <= dim < mesh.ndim:
        raise ValueError(f"dim {dim} specified in `_unflatten` is out of range {mesh.ndim}")
    return dim


def _names(mesh: Any) -> tuple[str, ...]:
    if mesh.mesh_dim_names is None:
        raise TypeError(f"{mesh} has no mesh_dim_names; expected a mesh whose dims have names")
    return tuple(mesh.mesh_dim_names)


def _concatenate(device_mesh_list: Sequence[Any]) -> Any:
    """One mesh with the dims, the names and the process groups of all these meshes, in order.

    Raises RuntimeError if they are not of one root mesh, or if a dim's ranks are among another's.
    """
    root = root_mesh(device_mesh_list[0])
    if any(ranks_of(root_mesh(mesh)).tolist() != ranks_of(root).tolist() for mesh in device_mesh_list):
        raise RuntimeError("Cannot concatenate DeviceMeshes derived from different device meshs")
    axes = [axis for mesh in device_mesh_list for axis in axes_of(mesh)]
    if not is_disjoint(joined(axes)):
        raise RuntimeError(f"Cannot concatenate overlapping meshes: {list(device_mesh_list)}")
    BACKPORT.record_use("DeviceMesh._concatenate")
    names = [name for mesh in device_mesh_list for name in _names(mesh)]
    return derive(root, axes, names, [group for mesh in device_mesh_list for group in mesh._dim_group_names])


def _slicing(getitem: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``mesh[names]`` for every mesh but a root that is asked for dims that it has itself."""

    @functools.wraps(getitem)
    def slice_mesh(self: Any, mesh_dim_names: str | tuple[str, ...]) -> Any:
        names = (mesh_dim_names,) if isinstance(mesh_dim_names, str) else mesh_dim_names
        reachable = getattr(_reachable, "mesh", None)
        if reachable is not None and reachable.mesh_dim_names == names and root_mesh(reachable) is self:
            return reachable
        is_child = is_derived(self) or root_mesh(self) != self
        if not self.mesh_dim_names or names == self.mesh_dim_names:
            return getitem(self, mesh_dim_names)
        if is_child or any(name in flattened_of(self) for name in names):
            return _sliced(self, names)
        return getitem(self, mesh_dim_names)

    return slice_mesh


def _sliced(mesh: Any, names: tuple[str, ...]) -> Any:
    named = dict(zip(_names(mesh), zip(axes_of(mesh), getattr(mesh, "_dim_group_names", None) or itertools.repeat(None))))
    root = root_mesh(mesh)
    flattened = flattened_of(root) if mesh == root else {}
    if unknown := [name for name in names if name not in named and name not in flattened]:
        raise KeyError(
            f"Invalid mesh_dim_names {names} specified: it has no {unknown}. Valid mesh_dim_names are {[*named, *flattened]}."
        )
    for name in names:
        if name not in named:
            warnings.warn(
                "Slicing a flattened dim from root mesh will be deprecated in PT 2.11. "
                "Users need to bookkeep the flattened mesh directly. ",
                stacklevel=3,
            )
            named[name] = flattened[name]._axes[0], flattened[name]._dim_group_names[0]
    axes = [named[name][0] for name in names]
    strides = [stride for _, stride in joined(axes)]
    if strides != sorted(strides, reverse=True):
        raise KeyError(f"Invalid mesh_dim_names {names} specified. Mesh dim indices should be in ascending order.")
    if not is_disjoint(joined(axes)):
        raise RuntimeError(f"Slicing overlapping dim_names {names} is not allowed.")
    groups = [named[name][1] for name in names]
    return derive(root, axes, names, [] if None in groups else groups)


def _flattening(flatten: Callable[..., Any]) -> Callable[..., Any]:
    """``mesh._flatten(…)`` for the meshes that are ours, with `backend_override` for all."""

    @functools.wraps(flatten)
    def flatten_mesh(self: Any, mesh_dim_name: str | None = None, backend_override: Any = None) -> Any:
        name = mesh_dim_name or "_".join(self.mesh_dim_names or ())
        if (name,) == self.mesh_dim_names:
            return self
        if not self.mesh_dim_names or not (is_derived(self) or backend_override is not None):
            return flatten(self, mesh_dim_name)
        return _flatten(self, name, {} if backend_override is None else {0: backend_override})

    return flatten_mesh


def _flatten(mesh: Any, name: str, backend_override: Mapping[int | str, Any]) -> Any:
    root, axis = root_mesh(mesh), joined(axes_of(mesh))
    if name in _names(root):
        raise ValueError(
            f"{name} already exists for submesh of the {root}, whose mesh_dim_names are {root.mesh_dim_names}. "
            "Please specify another valid mesh_dim_name."
        )
    known = vars(root).setdefault("_flatten_mapping", {})
    if name not in known:
        groups = new_groups(root, [axis], [name], overrides_of(backend_override, [name]))
        known[name] = derive(root, [axis], [name], groups)
    if known[name]._axes != (axis,):
        raise ValueError(
            f"Flatten mesh with mesh_dim_name {name} has been created before, Please specify another valid mesh_dim_name."
        )
    return known[name]


def _getting_group(get_group: Callable[..., Any]) -> Callable[..., Any]:
    """``mesh.get_group(name)``, also for the name of a mesh of ours that was flattened."""

    @functools.wraps(get_group)
    def get(self: Any, mesh_dim: int | str | None = None) -> Any:
        flattened = flattened_of(root_mesh(self)).get(mesh_dim) if isinstance(mesh_dim, str) else None
        return get_group(self, mesh_dim) if flattened is None else flattened.get_group()

    return get


def _root_of(get_root_mesh: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """``_mesh_resources.get_root_mesh``, for ours."""

    @functools.wraps(get_root_mesh)
    def get(self: Any, device_mesh: Any) -> Any:
        return device_mesh._root_mesh if is_derived(device_mesh) else get_root_mesh(self, device_mesh)

    return get


def _get_mesh_dim_by_name(self: Any, mesh_dim_name: str) -> int:
    """The position of the dim of that name; raises KeyError."""
    from torch.distributed.device_mesh import _mesh_resources

    return int(_mesh_resources.get_mesh_dim_by_name(self, mesh_dim_name))


def _get_root_mesh_dim(self: Any) -> int | None:
    """The position of the one dim of this mesh in its root mesh; None if it has no name."""
    from torch.distributed.device_mesh import _mesh_resources

    dim: int | None = _mesh_resources.get_root_mesh_dim(self)
    return dim


def _get_all_submeshes(self: Any, mesh_dim_name: str) -> list[Any]:
    """Every mesh of one dim, over all ranks of the root mesh; only the one with this rank has a process group."""
    from torch.distributed.device_mesh import DeviceMesh

    dim = _get_mesh_dim_by_name(self, mesh_dim_name)
    with fx.with_real_tensors():
        copies = copies_of([axes_of(self)[dim]], ranks_of(root_mesh(self)))
        meshes = [DeviceMesh(self.device_type, copy, mesh_dim_names=(mesh_dim_name,), _init_backend=False) for copy in copies]
    for mesh in meshes:
        mesh._dim_group_names = [self._dim_group_names[dim]] if mesh.get_coordinate() is not None else []
    return meshes


# what in old torch looks for the dims of two meshes in their root


_reachable = threading.local()


def _with_joined_mesh(init_sharded_param: Callable[..., None]) -> Callable[..., None]:
    """FSDP's set-up of a parameter that tensor parallelism sharded: its mesh is the two, which the root mesh need not have."""

    @functools.wraps(init_sharded_param)
    def init(self: Any, param: Any, *args: Any, **kwargs: Any) -> None:
        from torch.distributed.tensor import DTensor

        meshes = [self.mesh_info.mesh, param.device_mesh] if isinstance(param, DTensor) else []
        if not any(map(is_derived, meshes)) or root_mesh(meshes[0]) != root_mesh(meshes[1]):
            return init_sharded_param(self, param, *args, **kwargs)
        _reachable.mesh = _concatenate(meshes)
        try:
            return init_sharded_param(self, param, *args, **kwargs)
        finally:
            _reachable.mesh = None

    return init


def _shard_mesh(shard_mesh_from_root: property) -> property:
    """The mesh over which FSDP shards: of ours, the root may not know it."""

    def get(self: Any) -> Any:
        is_ours = is_derived(self.mesh_info.mesh)
        return self.shard_mesh if is_ours else shard_mesh_from_root.fget(self)  # type: ignore[misc]

    return property(get, doc=shard_mesh_from_root.__doc__)


def _anywhere(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    """parallelize_module's check of a mesh: where in its root a mesh of ours lies says nothing."""
    return functools.wraps(validate)(lambda device_mesh: None if is_derived(device_mesh) else validate(device_mesh))


def _lacks(module: ModuleType | None) -> bool:
    if module is None:
        return True
    return vars(module.DeviceMesh).get("_unflatten", _unflatten) is _unflatten


def _new(name: str, method: object) -> Change:
    return Change(_PLACE, f"DeviceMesh.{name}", lambda old: old or method, create=True)


BACKPORT = Backport(
    name="device_mesh_unflatten",
    summary="DeviceMesh._unflatten and _concatenate, slices of slices, _flatten and init_device_mesh(backend_override=…)",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/161224",
    differs="a mesh is compared by its ranks, and printed with them, as this torch does",
    replaces={
        "DeviceMesh.__getitem__": _slicing,
        "DeviceMesh._flatten": _flattening,
        "DeviceMesh.get_group": _getting_group,
        "_MeshEnv.get_root_mesh": _root_of,
    },
    redefines={"init_device_mesh": _overriding},
    also=(
        _new("_unflatten", _unflatten),
        _new("_concatenate", staticmethod(_concatenate)),
        _new("_get_root_mesh", root_mesh),
        _new("_get_root_mesh_dim", _get_root_mesh_dim),
        _new("_get_mesh_dim_by_name", _get_mesh_dim_by_name),
        _new("_get_all_submeshes", _get_all_submeshes),
        Change(_FSDP_PARAM, "FSDPParam._init_sharded_param", _with_joined_mesh),
        Change(_FSDP_PARAM, "FSDPParam.shard_mesh_from_root", _shard_mesh),
        Change("torch.distributed.tensor.parallel.api", "_validate_tp_mesh_dim", _anywhere),
    ),
    lacks=_lacks,
)
