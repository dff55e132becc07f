"""``fully_shard(…, dp_mesh_dims=DataParallelMeshDims(…))``: data parallelism over named axes of a mesh that has others too.

The parameters are DTensors on the whole mesh. This torch's FSDP shards such parameters if it is given the axis of data
parallelism alone and the DTensors lie on the others; so the parameters are taken off the data-parallel axes first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import nn

from torchspan.backports._base import Backport, unavailable
from torchspan.core.errors import UnsupportedError

_COMMON = "torch.distributed.fsdp._fully_shard._fsdp_common"


@dataclass
class DataParallelMeshDims:
    """Which axes of a mesh are data-parallel.

    Args:
        shard: the axis, or several that are made one, over which parameters are sharded.
        replicate: the axis, or several, over which they are replicated.

    Raises:
        ValueError: neither was given.
    """

    shard: str | tuple[str, ...] | None = None
    replicate: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.shard is None and self.replicate is None:
            raise ValueError("At least one of shard or replicate must be set in DataParallelMeshDims")

    @property
    def shard_names(self) -> tuple[str, ...]:
        """The names of `shard`, none where it is None."""
        return _names(self.shard)

    @property
    def replicate_names(self) -> tuple[str, ...]:
        """The names of `replicate`, none where it is None."""
        return _names(self.replicate)


DataParallelMeshDims.__module__ = "torch.distributed.fsdp"


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _get_mesh_info(mesh: Any, dp_mesh_dims: DataParallelMeshDims | None = None) -> Any:
    """What FSDP knows of a mesh of one axis (to shard over) or two (to replicate and to shard over)."""
    from torch.distributed.fsdp._fully_shard._fsdp_common import DDPMeshInfo, FSDPMeshInfo, HSDPMeshInfo

    if dp_mesh_dims is not None:
        mesh = _data_parallel(mesh, dp_mesh_dims)
        if not dp_mesh_dims.shard_names:
            return DDPMeshInfo(mesh, replicate_mesh_dim=0)
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, shard_mesh_dim=1, replicate_mesh_dim=0)


def _data_parallel(mesh: Any, axes: DataParallelMeshDims) -> Any:
    """The mesh of the data-parallel axes: of one axis to shard over, of two where it is replicated too."""
    names = (*axes.replicate_names, *axes.shard_names)
    if mesh.mesh_dim_names is None:
        raise ValueError("mesh must have mesh_dim_names when dp_mesh_dims is provided")
    unknown = [name for name in names if name not in mesh.mesh_dim_names]
    if unknown:
        raise ValueError(f"dp_mesh_dims names {unknown}; expected axes of the mesh, which are {mesh.mesh_dim_names}")
    for group in (axes.replicate_names, axes.shard_names):
        if len(group) > 1 and len(names) > len(group):
            raise UnsupportedError(
                f"dp_mesh_dims with several axes to flatten ({group}) beside others: this torch's submeshes have axes of one "
                f"mesh; {BACKPORT.reason}; flatten them first and give the mesh that has the flat axis"
            )
    submesh = mesh[names]
    return submesh._flatten("_".join(names)) if len(names) > 1 and not axes.replicate_names else submesh


def _taking_axes(fully_shard: Callable[..., Any]) -> Callable[..., Any]:
    """fully_shard, with `dp_mesh_dims`."""

    @functools.wraps(fully_shard)
    def shard(module: Any, *, mesh: Any = None, dp_mesh_dims: Any = None, **options: Any) -> Any:
        if dp_mesh_dims is None:
            return fully_shard(module, mesh=mesh, **options)
        if mesh is None:
            raise ValueError("dp_mesh_dims needs the mesh whose axes it names")
        if not dp_mesh_dims.shard_names:
            raise UnsupportedError(
                f"fully_shard(dp_mesh_dims={dp_mesh_dims}) without an axis to shard over: this torch's FSDP does not only "
                f"replicate; {BACKPORT.reason}; use DistributedDataParallel or torch.distributed._composable.replicate"
            )
        BACKPORT.record_use(f"fully_shard(dp_mesh_dims={dp_mesh_dims})")
        dp_mesh = _data_parallel(mesh, dp_mesh_dims)
        ignored = options.get("ignored_params") or set()
        for member in module if isinstance(module, (list, tuple)) else [module]:
            _take_off_axes(member, mesh, {*dp_mesh_dims.shard_names, *dp_mesh_dims.replicate_names}, ignored)
        return fully_shard(module, mesh=dp_mesh, **options)

    return shard


def _take_off_axes(module: nn.Module, mesh: Any, data_parallel: set[str], ignored: set[Any]) -> None:
    """Make each parameter that lies on the whole mesh one on its other axes, or a plain one where there are none."""
    from torch.distributed.tensor import DTensor, Replicate

    new_params: dict[int, nn.Parameter] = {}
    for holder in _not_sharded_yet(module):
        for name, param in holder.named_parameters(recurse=False):
            if param in ignored or not isinstance(param, DTensor) or param.device_mesh != mesh:
                continue
            placed = dict(zip(mesh.mesh_dim_names, param.placements))
            wrong = [axis for axis in data_parallel if not isinstance(placed[axis], Replicate)]
            if wrong:
                raise ValueError(f"parameter {name!r} is {param.placements}; expected Replicate() on the data-parallel {wrong}")
            if id(param) not in new_params:
                new_params[id(param)] = _on(mesh, [axis for axis in placed if axis not in data_parallel], placed, param)
            setattr(holder, name, new_params[id(param)])


def _not_sharded_yet(module: nn.Module) -> Iterator[nn.Module]:
    """The modules in `module` without those that were sharded by themselves: their parameters are theirs."""
    from torch.distributed.fsdp import FSDPModule

    yield module
    for child in module.children():
        if not isinstance(child, FSDPModule):
            yield from _not_sharded_yet(child)


def _on(mesh: Any, axes: list[str], placed: dict[str, Any], param: Any) -> nn.Parameter:
    from torch.distributed.tensor import DTensor

    local = param.to_local()
    if axes:
        local = DTensor.from_local(
            local, mesh[tuple(axes)], [placed[axis] for axis in axes], run_check=False, shape=param.shape, stride=param.stride()
        )
    return nn.Parameter(local.detach(), requires_grad=param.requires_grad)


def _lacks(module: ModuleType | None) -> bool:
    import inspect

    return module is None or "dp_mesh_dims" not in inspect.signature(module.fully_shard).parameters


BACKPORT = Backport(
    name="fsdp_mesh_dims",
    summary="fully_shard over named axes of a larger mesh: DataParallelMeshDims and fully_shard(dp_mesh_dims=…)",
    target="torch.distributed.fsdp",
    since="2.12.0",
    came={"2.11.0": ("torch.distributed.fsdp._fully_shard._fsdp_init._get_mesh_info",)},
    first_forms={"2.11": "what FSDP knows of a mesh is asked in another way"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.12.0/torch/distributed/fsdp/_fully_shard/_fully_shard.py",
    differs=(
        "the sharded parameters lie on the data-parallel and then the other axes, not on the mesh that was given; "
        "only to replicate, and a mesh for each parameter (ShardPlacementResult), are refused"
    ),
    names={"DataParallelMeshDims": lambda: DataParallelMeshDims},
    elsewhere={
        "torch.distributed.fsdp._fully_shard": {"DataParallelMeshDims": lambda: DataParallelMeshDims},
        "torch.distributed.fsdp._fully_shard._fsdp_api": {"DataParallelMeshDims": lambda: DataParallelMeshDims},
        "torch.distributed.fsdp._fully_shard._fsdp_init": {"_get_mesh_info": lambda: _get_mesh_info},
        "torch.distributed.fsdp._fully_shard._fsdp_common": {
            "ShardPlacementResult": lambda: unavailable(
                f"{_COMMON}.ShardPlacementResult",
                "this torch's FSDP has one mesh for all parameters of a module",
                "2.12.0",
                "call fully_shard on the modules whose parameters lie on another mesh first",
            )
        },
    },
    redefines={"fully_shard": _taking_axes},
    lacks=_lacks,
)
