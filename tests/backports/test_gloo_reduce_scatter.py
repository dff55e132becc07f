"""Reduce-scatter on gloo gives what was asked for, by every way that leads to it, on real ranks."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard

REDUCTIONS: dict[str, Callable[[list[float]], float]] = {
    "sum": sum,
    "avg": lambda values: sum(values) / len(values),
    "max": max,
    "min": min,
    "product": math.prod,
}


def value_of(rank: int) -> torch.Tensor:
    """What a rank gives: two numbers for each rank."""
    return torch.arange(2.0 * dist.get_world_size()) + 3 * rank + 1


def expected(name: str) -> torch.Tensor:
    """This rank's part of what all ranks' values reduce to."""
    start = 2 * dist.get_rank()
    columns = zip(*(value_of(rank)[start : start + 2].tolist() for rank in range(dist.get_world_size())))
    return torch.tensor([REDUCTIONS[name](list(column)) for column in columns])


def check_each(run: Callable[[Any, torch.Tensor], torch.Tensor]) -> None:
    for name in REDUCTIONS:
        torch.testing.assert_close(run(getattr(dist.ReduceOp, name.upper()), value_of(dist.get_rank())), expected(name))


# what ranks are asked


def one_tensor() -> None:
    def run(operation: Any, tensor: torch.Tensor) -> torch.Tensor:
        output = torch.zeros(2)
        assert dist.reduce_scatter_tensor(output, tensor, op=operation) is None
        torch.testing.assert_close(tensor, value_of(dist.get_rank()))  # it is left as it was
        return output

    check_each(run)


def one_tensor_later() -> None:
    def run(operation: Any, tensor: torch.Tensor) -> torch.Tensor:
        output = torch.zeros(2)
        work = dist.reduce_scatter_tensor(output, tensor, op=operation, async_op=True)
        assert isinstance(work, dist.Work)
        work.wait()
        return output

    check_each(run)


def a_list_of_tensors() -> None:
    def run(operation: Any, tensor: torch.Tensor) -> torch.Tensor:
        output = torch.zeros(2)
        dist.reduce_scatter(output, list(tensor.chunk(dist.get_world_size())), op=operation)
        return output

    check_each(run)


def tensors_of_other_shapes() -> None:
    output = torch.zeros(2, 3)
    tensor = torch.full((2 * dist.get_world_size(), 3), float(dist.get_rank()))
    dist.reduce_scatter_tensor(output, tensor, op=dist.ReduceOp.MAX)
    torch.testing.assert_close(output, torch.full((2, 3), dist.get_world_size() - 1.0))


def several_at_once() -> None:
    def run(operation: Any, tensor: torch.Tensor) -> torch.Tensor:
        outputs = [torch.zeros(2), torch.zeros(2)]
        with dist._coalescing_manager():
            for output in outputs:
                dist.reduce_scatter_tensor(output, tensor, op=operation)
        torch.testing.assert_close(*outputs)
        return outputs[1]

    check_each(run)


def as_functions() -> None:
    def run(operation: Any, tensor: torch.Tensor) -> torch.Tensor:
        name = next(name for name in REDUCTIONS if getattr(dist.ReduceOp, name.upper()) == operation)
        first = functional.reduce_scatter_tensor(tensor, name, 0, dist.group.WORLD)
        (many,) = functional.reduce_scatter_tensor_coalesced([tensor], name, [0], dist.group.WORLD)
        columns = tensor.expand(3, -1).contiguous()
        along_columns = functional.reduce_scatter_tensor(columns, name, 1, dist.group.WORLD)
        torch.testing.assert_close(along_columns + 0, expected(name).expand(3, -1))
        torch.testing.assert_close(many + 0, first + 0)
        return first + 0

    check_each(run)


def compiled() -> None:
    @functools.partial(torch.compile, backend="aot_eager", fullgraph=True)
    def average(tensor: torch.Tensor) -> torch.Tensor:
        return functional.reduce_scatter_tensor(tensor, "avg", 0, dist.group.WORLD) * 2

    torch.testing.assert_close(average(value_of(dist.get_rank())), expected("avg") * 2)


def a_distributed_tensor() -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name in ("sum", "avg", "max", "min"):
        partial = DTensor.from_local(value_of(dist.get_rank()), mesh, [Partial(name)])
        torch.testing.assert_close(partial.redistribute(placements=[Shard(0)]).to_local(), expected(name))


def gradients_of_fsdp() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2 * dist.get_world_size())
    whole = copy.deepcopy(model)
    inputs = torch.randn(2 * dist.get_world_size(), 4)
    whole(inputs).square().mean().backward()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    model(inputs.chunk(dist.get_world_size())[dist.get_rank()]).square().mean().backward()
    for sharded, parameter in zip(model.parameters(), whole.parameters()):
        torch.testing.assert_close(sharded.grad.full_tensor(), parameter.grad)


def what_gloo_refuses_is_refused() -> None:
    with pytest.raises(RuntimeError, match="BAND"):
        dist.reduce_scatter_tensor(torch.zeros(1), torch.ones(dist.get_world_size()), op=dist.ReduceOp.BAND)


QUESTIONS = {
    2: [
        one_tensor,
        one_tensor_later,
        a_list_of_tensors,
        tensors_of_other_shapes,
        several_at_once,
        as_functions,
        compiled,
        a_distributed_tensor,
        gradients_of_fsdp,
        what_gloo_refuses_is_refused,
    ],
    3: [one_tensor, one_tensor_later, a_list_of_tensors, as_functions, gradients_of_fsdp],
}


@pytest.mark.parametrize(
    ("num", "question"), [(num, question.__name__) for num, questions in QUESTIONS.items() for question in questions]
)
def test_on_ranks(failures: dict[str, dict[str, list[str]]], num: int, question: str) -> None:
    assert not failures[str(num)][question], failures[str(num)][question][0]
