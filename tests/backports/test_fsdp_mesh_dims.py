"""FSDP over named axes of a mesh: parameters of the whole mesh are sharded over those, as on newer torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError
from torchspan.environment.scope import Environment

BACKPORT = REGISTRY.get("fsdp_mesh_dims").BACKPORT


@pytest.fixture
def mesh(environment: Environment) -> Iterator[Any]:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    yield init_device_mesh("cpu", (4, 2), mesh_dim_names=("dp", "tp"))
    distributed.destroy_process_group()


def on_mesh(mesh: Any) -> nn.Module:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    module = nn.Linear(16, 8, bias=False)
    module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [Replicate(), Shard(0)]))
    return module


def test_a_parameter_of_the_whole_mesh_is_sharded_over_the_named_axis(mesh: Any) -> None:
    from torch.distributed.fsdp import DataParallelMeshDims, FSDPModule, fully_shard

    module = fully_shard(on_mesh(mesh), mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="dp"))
    assert isinstance(module, FSDPModule)
    assert module.weight.shape == (8, 16)
    assert module.weight.to_local().shape == (1, 16)  # a quarter of a half
    module.unshard()
    assert module.weight.to_local().shape == (4, 16)
    assert module.weight.device_mesh.mesh_dim_names in (("tp",), ("dp", "tp"))


def test_without_axes_it_is_fsdp_as_ever(mesh: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    module = fully_shard(nn.Linear(16, 8, bias=False), mesh=mesh["dp"], dp_mesh_dims=None)
    assert module.weight.to_local().shape == (2, 16)


def test_axes_are_one_or_several_and_not_none() -> None:
    with Environment([*BACKPORT.patches()]):
        from torch.distributed.fsdp import DataParallelMeshDims

        axes = DataParallelMeshDims(shard=("dp", "cp"), replicate="r")
        assert (axes.shard_names, axes.replicate_names) == (("dp", "cp"), ("r",))
        assert DataParallelMeshDims(replicate="r").shard_names == ()
        with pytest.raises(ValueError, match="At least one of shard or replicate must be set"):
            DataParallelMeshDims()


def test_what_fsdp_knows_of_a_mesh(mesh: Any) -> None:
    from torch.distributed.fsdp import DataParallelMeshDims
    from torch.distributed.fsdp._fully_shard._fsdp_init import _get_mesh_info

    assert _get_mesh_info(mesh, DataParallelMeshDims(shard="dp")).shard_mesh_size == 4
    both = _get_mesh_info(mesh, DataParallelMeshDims(shard="tp", replicate="dp"))
    assert (both.shard_mesh_size, both.replicate_mesh_size) == (2, 4)
    assert _get_mesh_info(mesh["tp"]).shard_mesh_size == 2


def test_what_this_torch_cannot_do_is_refused(mesh: Any) -> None:
    from torch.distributed.fsdp import DataParallelMeshDims, fully_shard
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult

    if not is_lacking(BACKPORT):
        return
    with pytest.raises(UnsupportedError, match="does not only replicate"):
        fully_shard(on_mesh(mesh), mesh=mesh, dp_mesh_dims=DataParallelMeshDims(replicate="dp"))
    with pytest.raises(UnsupportedError, match="one mesh for all parameters of a module"):
        ShardPlacementResult(placement=None, mesh_info=None)
    with pytest.raises(ValueError, match=r"names \['other'\]; expected axes of the mesh"):
        fully_shard(on_mesh(mesh), mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="other"))
    with pytest.raises(ValueError, match=r"expected Replicate\(\) on the data-parallel \['tp'\]"):
        fully_shard(on_mesh(mesh), mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="tp"))


@pytest.mark.skipif(not is_lacking(BACKPORT), reason="torch's own asks for parameters that are DTensors of the whole mesh")
def test_what_is_sharded_already_stays_as_it_is(environment: Environment) -> None:
    from torch.distributed.fsdp import DataParallelMeshDims, fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,), mesh_dim_names=("dp",))
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        for module in (model[0], model):
            fully_shard(module, mesh=mesh, dp_mesh_dims=DataParallelMeshDims(shard="dp"))
        sharded = [layer.get_parameter("weight") for layer in model]
        assert [weight.to_local().shape for weight in sharded] == [(2, 8), (2, 8)]
    finally:
        distributed.destroy_process_group()
