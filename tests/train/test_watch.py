"""What a job's instruments tell: numbers after each pass, the page, what a failing pass leaves, ranks that do not fit."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from torchspan.core.errors import CaptureError, InputError, PassError
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.parallel.mesh import Meshes
from torchspan.passes._base import Pass, PassContext, editable
from torchspan.passes._pipeline import Pipeline
from torchspan.train import check, loop
from torchspan.train.config import Compile, TrainConfig, Training
from torchspan.train.job import Job, check_same_collectives
from torchspan.train.watch import SameCollectives

TINY = Training(steps=1, global_batch_size=2, seq_len=8)


@dataclass(frozen=True)
class Scales(Pass):
    """Makes the first silu of a graph another function, and says that it changes no bit."""

    name: ClassVar[str] = "scales"
    how: str = "tanh"

    def run(self, graph: Graph, context: PassContext) -> Graph:
        if self.how == "raise":
            raise RuntimeError("no such luck")
        module = editable(graph)
        node = next(node for node in module.graph.nodes if node.target is torch.ops.aten.silu.default)
        node.target = torch.ops.aten.tanh.default
        module.recompile()
        return graph.with_module(module, "scales")


def run(monkeypatch: pytest.MonkeyPatch, settings: Compile, *passes: Pass) -> Any:
    monkeypatch.setattr(check, "_pipeline", lambda config: Pipeline(passes))
    return loop.train(TrainConfig(config="tiny", training=TINY, compile=settings))


def test_bisect_names_pass_and_node_on_the_first_batch_or_says_that_nothing_differs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    bucketing = Pipeline.parse("transformer_block_bucketing").passes[0]
    with pytest.raises(
        PassError, match=r"(?s)bisect: numbers differ first after pass 2 of 2, scales, which .*first node: silu.*aten.tanh"
    ):
        run(monkeypatch, Compile(bisect=True, dump=tmp_path), bucketing, Scales())
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "00_captured.py",
        "01_transformer_block_bucketing.py",
        "02_scales.py",
        "graph.html",
    ]
    with caplog.at_level(logging.INFO, "torchspan.train"):
        assert len(run(monkeypatch, Compile(bisect=True), bucketing).losses) == 1
    assert "every pass keeps what it claims of the numbers: transformer_block_bucketing (bitwise)" in caplog.text


def test_a_pass_that_fails_leaves_its_file_in_the_folder_of_the_dump(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(
        PassError, match=r"pass scales failed: RuntimeError: no such luck; run it again .* torchspan passes --rep"
    ):
        run(monkeypatch, Compile(dump=tmp_path), Scales("raise"))
    assert (tmp_path / "torchspan-pass-failure-scales.py").is_file()


def test_bisect_without_a_graph_is_refused() -> None:
    with pytest.raises(InputError, match=r"--compile.bisect compares graphs after each pass; expected it without --no-compile"):
        Compile(enable=False, bisect=True)


def collective(size: int) -> Graph:
    """A tensor of `size` numbers, summed over ranks."""
    module = torch.fx.GraphModule(torch.nn.Module(), torch.fx.Graph())
    x = module.graph.placeholder("x")
    x.meta["val"] = torch.empty(size)
    summed = module.graph.call_function(torch.ops._c10d_functional.all_reduce.default, (x, "sum", "0"))
    module.graph.output([module.graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (summed,))])
    return Graph(module, (InputSpec("input", "0"),), (OutputSpec("output", "0"),))


def test_ranks_whose_collectives_differ_are_named_with_the_pass_and_the_first_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = Job(0, 2, Meshes(dense=object()))  # type: ignore[arg-type]
    graphs = [collective(4), collective(8)]
    calls: list[Any] = []

    def gather(gathered: list[Any], mine: Any) -> None:
        """What rank 0 is given by both ranks, as each tells it."""
        calls.append(mine)
        gathered[:] = [mine, others[len(calls) - 1]]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    others: list[Any] = [None, None]
    ways = {
        PassError: lambda: SameCollectives(job).after(Scales(), graphs[0], graphs[0]),
        CaptureError: lambda: check_same_collectives(graphs[0], job),
    }
    for error, compare in ways.items():
        calls.clear()
        others[:] = told_by(graphs[1], job, monkeypatch)
        monkeypatch.setattr(dist, "all_gather_object", gather)
        with pytest.raises(
            error, match=r"ranks \[1\] call other .*: collective 1 is all_reduce.* of torch.Size\(\[4\]\) torch.float"
        ):
            compare()
    others[:] = told_by(graphs[0], job, monkeypatch)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    calls.clear()
    SameCollectives(job).after(Scales(), graphs[0], graphs[0])  # equal ones are no error
    assert len(calls) == 1


def told_by(graph: Graph, job: Job, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What a rank with `graph` tells the others, where it finds that they differ."""
    messages: list[Any] = []

    def gather(gathered: list[Any], mine: Any) -> None:
        messages.append(mine)
        gathered[:] = [mine, "another"] if len(messages) == 1 else [mine, []]

    monkeypatch.setattr(dist, "all_gather_object", gather)
    with pytest.raises(CaptureError):
        check_same_collectives(graph, job)
    return messages
