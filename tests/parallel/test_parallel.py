"""Meshes, tensor parallelism and SimpleFSDP: how parameters are stored, and what that costs in collectives."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from torchspan.core.errors import InputError, UnknownNameError
from torchspan.models.llama3 import FLAVOURS, MODEL, Llama3
from torchspan.parallel.mesh import DP_SHARD, TP, Degrees, build_meshes, check_sizes, submesh
from torchspan.parallel.reshard import Resharding
from torchspan.parallel.simple_fsdp import MixedPrecision, apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel
from torchspan.train.parallelize import parallelize

TINY = FLAVOURS["tiny"]


def test_one_process_needs_no_mesh_and_no_process_group() -> None:
    assert build_meshes(Degrees(), world_size=1).dense is None and submesh(None, TP) is None


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Degrees(2, 2).check(3), "dp_shard 2 × tp 2 are 4 processes, this job has 3"),
        (lambda: Degrees(tp=0), "the degree of tp is 0; expected 1 or more"),
        (lambda: check_sizes({"hidden_dim": 10}, 4), "hidden_dim is 10, which tp 4 does not divide; expected a multiple of 4"),
    ],
)
def test_impossible_degrees_are_refused(make, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_a_mesh_has_an_axis_for_each_degree_above_one(fake_ranks: int) -> None:
    both, only = build_meshes(Degrees(4, 2), fake_ranks).dense, build_meshes(Degrees(8, 1), fake_ranks).dense
    assert both is not None and both.mesh_dim_names == (DP_SHARD, TP)
    assert only is not None and only.mesh_dim_names == (DP_SHARD,) and submesh(only, TP) is None
    assert submesh(both, DP_SHARD).size() == 4 and submesh(both, TP).size() == 2  # type: ignore[union-attr]


def test_parameters_are_stored_sharded_under_their_names_and_read_whole(fake_ranks: int) -> None:
    model = Llama3(TINY).init_weights(0)
    names, kind = list(model.state_dict()), type(model.layers[0])
    mesh = build_meshes(Degrees(8, 1), fake_ranks).dense
    assert mesh is not None
    apply_simple_fsdp(model, mesh)
    assert list(model.state_dict()) == names and isinstance(model.layers[0], kind)
    stored = dict(model.named_parameters())["layers.0.attention.wq.weight"]
    assert isinstance(stored, DTensor) and stored.placements == (Shard(0),) and stored.is_leaf
    assert stored.shape == (32 * 32,) and stored.to_local().shape == (4 * 32,)
    weight = model.state_dict()["layers.0.attention.wq.weight"]
    assert isinstance(weight, DTensor) and weight.shape == (32, 32) and weight.to_local().shape == (4, 32)
    read = model.layers[0].attention.wq.weight
    assert type(read) is torch.Tensor and read.shape == (32, 32)


def test_fsdp_on_top_of_tensor_parallelism_keeps_the_tensor_parallel_split(fake_ranks: int) -> None:
    model = Llama3(TINY).init_weights(0)
    mesh = build_meshes(Degrees(4, 2), fake_ranks).dense
    assert mesh is not None
    apply_tensor_parallel(model, submesh(mesh, TP), MODEL.tensor_parallel)  # type: ignore[arg-type]
    apply_simple_fsdp(model, mesh)
    stored, state = dict(model.named_parameters()), model.state_dict()
    column, row = state["layers.0.feed_forward.w1.weight"], state["layers.0.feed_forward.w2.weight"]
    assert column.to_local().shape == (64 // 2 // 4, 32) and row.to_local().shape == (32 // 4, 64 // 2)
    assert row.placements == (Shard(1), Shard(0)) and state["norm.weight"].placements == (Replicate(), Shard(0))
    assert stored["layers.0.feed_forward.w1.weight"].to_local().shape == (64 * 32 // 8,)  # type: ignore[attr-defined]
    assert stored["norm.weight"].to_local().shape == (32 // 4,)  # type: ignore[attr-defined]
    read = model.layers[0].feed_forward.w1.weight
    assert isinstance(read, DTensor) and read.placements == (Shard(0),) and read.device_mesh.mesh_dim_names == (TP,)


def test_every_rank_stores_as_many_numbers_and_the_state_dict_has_the_true_shape(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(8, 1), fake_ranks).dense
    assert mesh is not None
    layer = apply_simple_fsdp(nn.Linear(4, 10), mesh)
    assert layer._parameters["weight"].to_local().shape == (5,)  # type: ignore[union-attr]
    assert layer._parameters["bias"].to_local().shape == (2,)  # type: ignore[union-attr]
    assert layer.weight.shape == (10, 4) and layer.bias.shape == (10,)  # type: ignore[union-attr]
    state = layer.state_dict()
    assert state["weight"].shape == (10, 4) and state["weight"].to_local().shape == (2, 4)
    assert state["bias"].shape == (10,)
    with pytest.raises(InputError, match=r"bias of the state has the shape \(9,\); expected \(10,\)"):
        layer.load_state_dict({"weight": torch.zeros(10, 4), "bias": torch.zeros(9)})


def test_a_tied_parameter_stays_tied(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(8, 1), fake_ranks).dense
    assert mesh is not None
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    apply_simple_fsdp(model, mesh)
    assert model[0]._parameters["weight"] is model[1]._parameters["weight"] and len(list(model.parameters())) == 1


def test_mixed_precision_gathers_in_the_lower_dtype(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(8, 1), fake_ranks).dense
    assert mesh is not None
    layer = apply_simple_fsdp(nn.Linear(8, 8), mesh, MixedPrecision(param_dtype=torch.bfloat16, reduce_dtype=torch.float32))
    assert layer.weight.dtype is torch.bfloat16  # type: ignore[union-attr]
    assert layer._parameters["weight"].dtype is torch.float32  # type: ignore[union-attr]


def test_a_plan_that_does_not_fit_the_model_is_refused(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(1, 8), fake_ranks).dense
    assert mesh is not None
    with pytest.raises(UnknownNameError, match="no shard style 'colum'; did you mean 'column'"):
        apply_tensor_parallel(Llama3(TINY), mesh, {"output": "colum"})
    with pytest.raises(InputError, match=r"no submodule answers to 'layers\.\*\.mlp'"):
        apply_tensor_parallel(Llama3(TINY), mesh, {"layers.*.mlp": "column"})
    with pytest.raises(InputError, match="is on no tp axis; apply tensor parallelism"):
        apply_simple_fsdp(Llama3(TINY), mesh)


def test_a_frozen_parameter_of_each_style_stays_frozen(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(4, 2), fake_ranks).dense
    assert mesh is not None
    model = Llama3(TINY).init_weights(0)
    frozen = ["tok_embeddings.weight", "norm.weight", "output.weight", *(f"layers.0.feed_forward.w{i}.weight" for i in (1, 2))]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    parallelize(model, MODEL, build_meshes(Degrees(4, 2), fake_ranks))
    assert sorted(name for name, parameter in model.named_parameters() if not parameter.requires_grad) == sorted(frozen)


def test_one_parameter_under_two_names_stays_one(fake_ranks: int) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.ones(4))
            self.b = self.a

    mesh = build_meshes(Degrees(8), fake_ranks).dense
    assert mesh is not None
    module = apply_simple_fsdp(Twice(), mesh)
    assert module._parameters["a"] is module._parameters["b"] and isinstance(module._parameters["a"], DTensor)
    tied = Llama3(TINY).init_weights(0)
    tied.output.weight = tied.tok_embeddings.weight
    parallelize(tied, MODEL, build_meshes(Degrees(4, 2), fake_ranks))
    assert tied.output._parameters["weight"] is tied.tok_embeddings._parameters["weight"]


def test_what_would_be_trained_wrongly_is_refused(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(8), fake_ranks).dense
    assert mesh is not None
    layer = apply_simple_fsdp(nn.Linear(4, 4), mesh)
    layer.weight = nn.Parameter(torch.ones(4, 4))
    with pytest.raises(InputError, match=r"replaced by a Parameter of shape \(4, 4\); change its values with load_state_dict"):
        layer(torch.ones(1, 4))
    with pytest.raises(InputError, match="draw weights before the model is made parallel"):
        apply_simple_fsdp(Llama3(TINY), mesh).init_weights(0)  # type: ignore[operator]


def test_a_parameter_that_changed_before_its_backward_is_not_gathered_again(fake_ranks: int) -> None:
    mesh = build_meshes(Degrees(8), fake_ranks).dense
    assert mesh is not None
    layer = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    apply_simple_fsdp(layer, mesh, resharding=Resharding(layer))
    loss = layer(torch.ones(1, 4)).sum()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(1.0)
    with pytest.raises(InputError, match="changed between the forward and its backward"):
        loss.backward()
