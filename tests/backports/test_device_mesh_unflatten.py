"""DeviceMesh._unflatten and _concatenate: shapes, ranks and process groups, and what is trained over them, on real ranks."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed import fake_pg  # noqa: F401 - it registers the backend "fake"

from torchspan.environment.scope import Environment


def world() -> Any:
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("world",))


def ranks_of(mesh: Any, dim: int | str | None = None) -> list[int]:
    return dist.get_process_group_ranks(mesh.get_group(dim))


def as_torchtitan_does() -> tuple[Any, Any, Any]:
    """Two meshes over the same four ranks, cut differently, and one that flattens a part of the first."""
    root = world()
    data = root._unflatten(
        0, (1, 2, 1, 2), ("pp", "batch", "cp", "tp"), backend_override={"pp": "fake", "batch": "fake", "cp": "fake"}
    )
    dense = root._unflatten(0, (1, 1, 2, 2), ("pp", "dp_replicate", "fsdp", "tp"), backend_override={0: "fake", 1: "fake"})
    return data, dense, data["batch", "cp"]._flatten("loss_mesh")


# what ranks are asked: two of them


def a_mesh_of_all_ranks_is_cut() -> None:
    root = world()
    assert root._unflatten("world", (2, 1), ("dp", "tp")).shape == (2, 1)
    rows = root._unflatten(0, (1, 2), ("dp", "tp"))
    assert (rows.mesh.tolist(), rows.mesh_dim_names, rows.device_type) == ([[0, 1]], ("dp", "tp"), "cpu")
    assert (rows.ndim, rows.size(), rows.size(0), rows.size(1)) == (2, 2, 1, 2)
    assert rows.mesh.device.type == "cpu" and rows.mesh.dtype == torch.int32
    assert ranks_of(rows, "tp") == [0, 1] and ranks_of(rows, 0) == [dist.get_rank()]
    assert rows.get_group("tp") is dist.group.WORLD is root.get_group()
    assert list(rows.get_coordinate()) == [0, dist.get_rank()]
    assert root._get_root_mesh() is root is rows._get_root_mesh() is rows["tp"]._get_root_mesh()
    assert rows._get_mesh_dim_by_name("tp") == 1 and rows["dp", "tp"] is rows


def what_is_wrong_is_said() -> None:
    root = world()
    for dim in (1, "dp"):
        with pytest.raises(ValueError, match=f"dim {dim} specified in `_unflatten` is"):
            root._unflatten(dim, (2,), ("tp",))
    with pytest.raises(
        ValueError, match=r"The product of mesh_sizes=\(2, 2\) is 4, but the original dimension at dim=0 has size 2"
    ):
        root._unflatten(0, (2, 2), ("dp", "tp"))
    with pytest.raises(RuntimeError, match="mesh_dim_names must have same length as mesh_sizes in _unflatten"):
        root._unflatten(0, (2,), ("dp", "tp"))
    with pytest.raises(RuntimeError, match=r"keys.*\['cp'\]"):
        root._unflatten(0, (1, 2), ("dp", "tp"), backend_override={"cp": "fake"})
    with pytest.raises(RuntimeError, match=r"dim index 1 and .*name '?tp"):
        root._unflatten(0, (1, 2), ("dp", "tp"), backend_override={"tp": "fake", 1: "fake"})
    mesh = root._unflatten(0, (1, 2), ("dp", "tp"))
    with pytest.raises(KeyError, match="Invalid mesh_dim_names"):
        mesh["cp"]
    with pytest.raises(KeyError):
        root["tp"]
    with pytest.raises(TypeError):
        init_device_mesh("cpu", (2,))._unflatten(0, (1, 2), ("dp", "tp"))
    with pytest.raises(RuntimeError, match="Cannot concatenate overlapping meshes"):
        DeviceMesh._concatenate([mesh["tp"], root])
    with pytest.raises(RuntimeError, match="derived from different device mesh"):
        DeviceMesh._concatenate([mesh["tp"], DeviceMesh("cpu", torch.tensor([1, 0]), mesh_dim_names=("dp",))])


def the_backend_is_the_one_asked_for() -> None:
    options = dist.ProcessGroupGloo._Options()
    mesh = world()._unflatten(0, (2, 1), ("dp", "tp"), backend_override={"dp": ("gloo", options), "tp": "fake"})
    assert (dist.get_backend(mesh.get_group("dp")), dist.get_backend(mesh.get_group("tp"))) == ("gloo", "fake")
    assert mesh.get_group("dp") is not dist.group.WORLD
    from_options = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "tp"), backend_override={"dp": options, 1: "fake"})
    assert (dist.get_backend(from_options.get_group("dp")), dist.get_backend(from_options.get_group("tp"))) == ("gloo", "fake")
    assert dist.get_backend(init_device_mesh("cpu", (2,)).get_group()) == "gloo", "what was asked is of one mesh"
    with pytest.raises(RuntimeError):
        init_device_mesh("cpu", (2,), mesh_dim_names=("dp",), backend_override={"cp": "fake"})
    flat = mesh._flatten("all", backend_override="fake")
    tensor = torch.ones(1)
    dist.all_reduce(tensor, group=flat.get_group())
    assert tensor == 1  # nothing was sent
    dist.all_reduce(tensor, group=mesh.get_group("dp"))
    assert tensor == 2


def a_mesh_is_flattened() -> None:
    root = world()
    mesh = root._unflatten(0, (1, 2, 1), ("pp", "batch", "cp"))
    flat = mesh["batch", "cp"]._flatten()
    assert (flat.mesh_dim_names, flat.mesh.tolist()) == (("batch_cp",), [0, 1])
    assert mesh["batch", "cp"]._flatten() is flat is mesh["batch"]._flatten("batch_cp")
    assert mesh["batch"]._flatten() == mesh["batch"]
    assert mesh.get_group("batch_cp") is flat.get_group() is root.get_group("batch_cp")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert root["batch_cp"] == flat
    with pytest.raises(ValueError, match="has been created before"):
        mesh["pp", "cp"]._flatten("batch_cp")
    with pytest.raises(ValueError, match="world already exists"):
        mesh["batch", "cp"]._flatten("world")
    assert root["world"]._flatten("world") is root


def replicated_over_a_part() -> None:
    torch.manual_seed(dist.get_rank())
    mesh = world()._unflatten(0, (2, 1), ("dp", "tp"))
    model = DistributedDataParallel(torch.nn.Linear(3, 1), device_mesh=mesh["dp"])
    model(torch.ones(1, 3) * (dist.get_rank() + 1)).sum().backward()
    assert [parameter.grad.mean().item() for parameter in model.parameters()] == [1.5, 1.0]


# four of them


def two_cuts_of_the_same_ranks() -> None:
    rank = dist.get_rank()
    data, dense, loss = as_torchtitan_does()
    assert (data.shape, dense.shape, loss.shape) == ((1, 2, 1, 2), (1, 1, 2, 2), (2,))
    assert ranks_of(data["tp"]) == [rank // 2 * 2, rank // 2 * 2 + 1] == data["tp"].mesh.tolist()
    assert ranks_of(dense["fsdp"]) == ranks_of(loss) == [rank % 2, rank % 2 + 2]
    assert data["batch"].get_local_rank() == rank // 2 and data["tp"].get_local_rank() == rank % 2
    assert data["batch"].size() == 2 and data["cp"].size() == 1
    assert [dist.get_backend(group) for group in dense.get_all_groups()] == ["fake", "fake", "gloo", "gloo"]
    assert data["tp"] == dense["tp"] and hash(data["tp"]) == hash(dense["tp"]) and data["tp"] != data["cp"]
    both = dense["dp_replicate", "fsdp"]
    assert both.mesh_dim_names == ("dp_replicate", "fsdp") and both["fsdp"] == dense["fsdp"]
    assert both["fsdp"].get_group() is dense.get_group("fsdp")
    assert functional.all_reduce(torch.tensor([float(rank)]), "sum", dense["fsdp"]).item() == 2 * (rank % 2) + 2
    assert functional.all_reduce(torch.tensor([float(rank)]), "sum", (data, 3)).item() == 4 * (rank // 2) + 1
    with pytest.raises(KeyError, match="ascending order"):
        dense["tp", "fsdp"]


def a_dim_of_a_part_is_cut_again() -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "tp"))
    finer = mesh._unflatten("dp", (2, 2), ("outer", "inner"))
    assert (finer.shape, finer.mesh_dim_names) == ((2, 2, 1), ("outer", "inner", "tp"))
    assert ranks_of(finer, "outer") == [rank % 2, rank % 2 + 2] and ranks_of(finer, "inner") == [
        rank // 2 * 2,
        rank // 2 * 2 + 1,
    ]
    assert finer.get_group("tp") is mesh.get_group("tp")
    part = mesh["dp"]._unflatten(0, (2, 2), ("outer", "inner"))
    assert part == finer["outer", "inner"] and list(part.get_coordinate()) == [rank // 2, rank % 2]
    assert [other.mesh.tolist() for other in part._get_all_submeshes("outer")] == [[0, 2], [1, 3]]


def ranks_in_another_order() -> None:
    order = [3, 1, 0, 2]
    mesh = DeviceMesh("cpu", torch.tensor(order), mesh_dim_names=("world",))._unflatten(0, (2, 2), ("dp", "tp"))
    assert mesh.mesh.tolist() == [[3, 1], [0, 2]]
    row, column = divmod(order.index(dist.get_rank()), 2)
    assert mesh["tp"].mesh.tolist() == [order[2 * row], order[2 * row + 1]]
    assert sorted(ranks_of(mesh["dp"])) == sorted([order[column], order[column + 2]])
    assert list(mesh.get_coordinate()) == [row, column]


def meshes_are_joined() -> None:
    data, dense, _ = as_torchtitan_does()
    joined = DeviceMesh._concatenate([dense["fsdp"], data["tp"]])
    assert (joined.mesh.tolist(), joined.mesh_dim_names) == ([[0, 1], [2, 3]], ("fsdp", "tp"))
    assert joined.get_all_groups() == [dense.get_group("fsdp"), data.get_group("tp")]
    assert joined["tp"].get_group() is data.get_group("tp")
    turned = DeviceMesh._concatenate([data["tp"], dense["fsdp"]])
    assert turned.mesh.tolist() == [[0, 2], [1, 3]]
    old = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    assert DeviceMesh._concatenate([old["dp"], old["tp"]]) == old


def slices_of_slices() -> None:
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("dp", "cp", "tp"))
    part = mesh["dp", "tp"]
    assert part["tp"] == mesh["tp"] and part["tp"].get_group() is mesh.get_group("tp")
    with pytest.raises(KeyError):
        part["cp"]


def they_are_copied_and_pickled() -> None:
    _, dense, _ = as_torchtitan_does()
    for mesh in (dense, dense["fsdp"]):
        for again in (pickle.loads(pickle.dumps(mesh)), copy.deepcopy(mesh)):
            assert again == mesh and again.get_group("fsdp") is mesh.get_group("fsdp")
            assert again["fsdp"] == dense["fsdp"]


def tensors_over_them() -> None:
    data, dense, _ = as_torchtitan_does()
    whole = torch.arange(16.0).reshape(4, 4)
    sharded = distribute_tensor(whole, dense["fsdp", "tp"], [Shard(0), Shard(1)])
    assert sharded.to_local().shape == (2, 2)
    torch.testing.assert_close(sharded.full_tensor(), whole)
    torch.testing.assert_close((sharded @ sharded).full_tensor(), whole @ whole)
    replicated = sharded.redistribute(placements=[Shard(0), Replicate()])
    torch.testing.assert_close(replicated.to_local(), whole.chunk(2)[dense["fsdp"].get_local_rank()])
    assert distribute_tensor(whole, data["tp"], [Shard(1)]).sum().full_tensor() == whole.sum()


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(4, 8), torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


def check_trains_as_the_whole(model: Any, whole: Any, group_size: int, group_rank: int) -> None:
    """Three steps of data-parallel training leave the parameters where training of the whole model leaves them."""
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (model, whole)]
    for step in range(3):
        batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        for module, part in ((model, batch.chunk(group_size)[group_rank]), (whole, batch)):
            module(part).square().mean().backward()
        norms = [torch.nn.utils.clip_grad_norm_(module.parameters(), 0.05) for module in (model, whole)]
        torch.testing.assert_close(norms[0].full_tensor() if isinstance(norms[0], DTensor) else norms[0], norms[1])
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for sharded, parameter in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(sharded.full_tensor(), parameter)


def fsdp_and_tensor_parallel_of_two_cuts() -> None:
    torch.manual_seed(0)
    data, dense, _ = as_torchtitan_does()
    model = Block()
    whole = copy.deepcopy(model)
    parallelize_module(model, data["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=dense["fsdp"])
    assert {parameter.device_mesh.mesh_dim_names for parameter in model.parameters()} == {("fsdp", "tp")}
    check_trains_as_the_whole(model, whole, 2, dense["fsdp"].get_local_rank())
    state = copy.deepcopy(model.state_dict())
    torch.testing.assert_close(state["up.weight"].full_tensor(), whole.up.weight.detach())


def hybrid_sharding() -> None:
    torch.manual_seed(0)
    mesh = world()._unflatten(0, (1, 2, 2, 1), ("pp", "dp_replicate", "fsdp", "tp"))
    model = Block()
    whole = copy.deepcopy(model)
    fully_shard(model.up, mesh=mesh["dp_replicate", "fsdp"])
    fully_shard(model, mesh=mesh["dp_replicate", "fsdp"])
    check_trains_as_the_whole(model, whole, 4, dist.get_rank())


QUESTIONS = {
    2: [
        a_mesh_of_all_ranks_is_cut,
        what_is_wrong_is_said,
        the_backend_is_the_one_asked_for,
        a_mesh_is_flattened,
        replicated_over_a_part,
    ],
    4: [
        two_cuts_of_the_same_ranks,
        a_dim_of_a_part_is_cut_again,
        ranks_in_another_order,
        meshes_are_joined,
        slices_of_slices,
        they_are_copied_and_pickled,
        tensors_over_them,
        fsdp_and_tensor_parallel_of_two_cuts,
        hybrid_sharding,
    ],
}


@pytest.mark.parametrize(
    ("num", "question"), [(num, question.__name__) for num, questions in QUESTIONS.items() for question in questions]
)
def test_on_ranks(failures: dict[str, dict[str, list[str]]], num: int, question: str) -> None:
    assert not failures[str(num)][question], failures[str(num)][question][0]


def test_a_mesh_is_sliced_while_a_model_is_traced_with_fake_tensors(environment: Environment) -> None:
    from torch._subclasses import FakeTensorMode

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = world()._unflatten(0, (1, 1), ("dp", "tp"))
        with FakeTensorMode(), torch.device("meta"):
            part = mesh["tp"]
        assert part.mesh.tolist() == [0]
    finally:
        dist.destroy_process_group()
