"""Tensor parallelism in chunks: what travels while what computes. Numbers on ranks: tests/train/test_overlap_on_ranks.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.core.report import Report
from torchspan.passes import async_tensor_parallel
from torchspan.passes._base import PassContext
from torchspan.passes.async_tensor_parallel import AsyncTensorParallel
from torchspan.private import distributed

CAPTURES = [capture_train_step, *([capture_joint] if is_supported() else [])]
GROUP = "0"


def run(graph: Graph, **options: int) -> tuple[Graph, list[str]]:
    """The graph after the pass, and what was decided."""
    pass_, report = AsyncTensorParallel(**{"min_rows": 2, **options}), Report()
    pass_.require(graph)
    after = pass_.run(graph, PassContext(report))
    after.verify()
    pass_.ensure(graph, after)
    return after, [f"{decision.choice}: {decision.reason}" for decision in report.decisions]


@pytest.mark.parametrize("capture", CAPTURES)
def test_each_gather_and_scatter_between_products_moves_in_chunks(sharded: Any, capture: Any) -> None:
    before = sharded(4, 2, capture)
    after, decided = run(before)
    # forward: two gathers and two scatters a block, and the gather of the output; backward: the same the other way
    assert decided[0].startswith("9 gathers with the products that read them, 9 products with the scatters of their sums, in 2")
    assert "no symmetric memory: symmetric memory is memory of CUDA GPUs" in decided[0]
    old, new = before.num_collectives(), after.num_collectives()
    assert {kind: new[kind] - old[kind] for kind in new} == {
        "all_gather_into_tensor": 9,
        "reduce_scatter_tensor": 9,
        "all_reduce": 0,
    }


def test_a_chunk_is_multiplied_before_the_next_is_waited_for_and_what_is_too_small_stays_whole(sharded: Any) -> None:
    before = sharded(4, 2)
    order = order_of(run(before)[0])
    queries_keys_values = ["gather", "gather", *["wait gather", *["mm"] * 3] * 2]
    output = ["mm", "scatter", "mm", "scatter", "wait scatter", "wait scatter"]
    gate_and_up = ["gather", "gather", *["wait gather", *["mm"] * 2] * 2]
    expected = [*queries_keys_values, *output, *gate_and_up, *output]
    assert order[order.index("gather") :][: len(expected)] == expected
    for options, reason in (
        ({"chunks": 3}, "18 left whole: the sequence of a rank, 4, is no multiple of 3 chunks"),
        ({"min_rows": 9}, "18 left whole: 8 rows a chunk; min_rows is 9"),
    ):
        after, decided = run(before, **options)
        assert decided == [reason] and after.num_collectives() == before.num_collectives()


def order_of(graph: Graph) -> list[str]:
    """Products, and what is begun and waited for of what moves the sequence, in order."""
    moves: dict[Any, str] = {}
    order = []
    for node in graph.module.graph.nodes:
        name = str(node.target)
        if name == "aten.mm.default":
            order.append("mm")
        elif name.startswith(("_c10d_functional.all_gather", "_c10d_functional.reduce")) and node.meta["val"].ndim == 3:
            moves[node] = "gather" if "all_gather" in name else "scatter"
            order.append(moves[node])
        elif "wait_tensor" in name and node.args[0] in moves:
            order.append(f"wait {moves[node.args[0]]}")
    return order


def test_a_graph_without_tensor_parallelism_is_left_alone_and_options_are_checked(graph: Graph) -> None:
    after, decided = run(graph)
    assert decided[0].startswith("nothing changed: no gather of the sequence feeds a product")
    assert after.count_targets() == graph.count_targets()
    with pytest.raises(InputError, match="chunks=1 and min_rows=128; expected 2 or more, and 1 or more"):
        AsyncTensorParallel(chunks=1).require(graph)
    with pytest.raises(PassError, match="changed how many numbers are moved"):
        AsyncTensorParallel().ensure(graph, graph.with_module(_one_gather_more(), ""))


def _one_gather_more() -> Any:
    return _layer()[0].module


# one rank alone, and torch's fused operators


@pytest.fixture
def alone() -> Iterator[None]:
    """A real group of this process alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def _layer() -> tuple[Graph, tuple[Tensor, ...]]:
    """A feed-forward between a gather and a scatter of the sequence, with its inputs."""
    draw = torch.Generator().manual_seed(0)
    inputs = tuple(torch.randn(*size, generator=draw) for size in ((3, 8, 16), (16, 32), (32, 16)))

    def layer(x_BSD: Tensor, up_DF: Tensor, down_FD: Tensor) -> tuple[Tensor, Tensor]:
        operators = torch.ops._c10d_functional
        gathered = operators.wait_tensor(operators.all_gather_into_tensor(x_BSD, 1, GROUP))
        gathered = torch.cat(gathered.split(3), 1)
        hidden = (gathered.view(-1, 16) @ up_DF).view(3, 8, 32).relu()
        y_BSD = (hidden.view(-1, 32) @ down_FD).view(3, 8, 16)
        scattered = operators.reduce_scatter_tensor(torch.cat(y_BSD.split(8, 1)), "sum", 1, GROUP)
        return operators.wait_tensor(scattered), gathered

    module = make_fx(layer, tracing_mode="fake")(*inputs)
    specs = [InputSpec("input", name) for name in ("x", "up", "down")]
    return Graph(module, tuple(specs), (OutputSpec("output", "y"), OutputSpec("output", "gathered"))), inputs


@pytest.mark.parametrize("chunks", [2, 4])
def test_chunks_give_the_numbers_of_the_whole(alone: None, chunks: int) -> None:
    graph, inputs = _layer()
    after, decided = run(graph, chunks=chunks)
    assert decided[0].startswith(
        f"1 gathers with the products that read them, 1 products with the scatters of their sums, in {chunks}"
    )
    for value, expected in zip(after.module(*inputs), graph.module(*inputs)):
        assert value.shape == expected.shape and torch.allclose(
            value, expected, rtol=0, atol=1e-5 * float(expected.abs().max())
        )
    assert torch.equal(after.module(*inputs)[1], inputs[0])


def test_where_symmetric_memory_is_torchs_fused_operators_are_called(alone: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed._symmetric_memory as symmetric_memory

    monkeypatch.setattr(async_tensor_parallel, "_why_not_fused", lambda matches: None)
    library = torch.library.Library("symm_mem", "IMPL")  # they run on GPUs; torch has what they compute for any device, too
    library.impl("fused_all_gather_matmul", symmetric_memory._fused_all_gather_matmul_fallback, "CPU")
    library.impl("fused_matmul_reduce_scatter", symmetric_memory._fused_matmul_reduce_scatter_fallback, "CPU")
    graph, inputs = _layer()
    after, decided = run(graph)
    assert decided[0].endswith("by torch's fused operators: symmetric memory is here")
    assert {name for name in after.count_targets() if "symm_mem" in name} == {
        "symm_mem.fused_all_gather_matmul.default",
        "symm_mem.fused_matmul_reduce_scatter.default",
    }
    assert not after.num_collectives()
    for value, expected in zip(after.module(*inputs), graph.module(*inputs)):
        assert torch.allclose(value, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert len(distributed.fused_products([])) == 2
    library._destroy()
