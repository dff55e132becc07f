"""Regions of a training step that rank 0 compiles and hands to all ranks: the others load, and compile nothing.

What is handed over are the entries that the compile left in torch's cache folder, so ranks need no folder in common. A region
waits until the graphs of all ranks are whole; then all agree on what rank 0 hands over, so that nobody waits for what does not
come. It is code: ranks of a job trust each other, as they do in every collective that sends objects.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule

from torchspan.core.errors import InputError
from torchspan.core.report import Attempt, Report
from torchspan.strategies._budget import Budget
from torchspan.strategies._graph import compile_graph, digest_of_graph, load_packed_graph, pack_graph
from torchspan.strategies._region import prepare_to_load
from torchspan.train.job import Job

_ALONE = "no graph of rank 0's, on a machine of its kind, is equal to it"


@dataclass
class _Region:
    """A region and, in the end, what runs it; `digest` is None for what cannot be compiled in a child."""

    module: GraphModule
    inputs: tuple[Any, ...]
    name: str
    digest: str | None
    function: Callable[..., Any] | None = None

    def call(self, *args: Any) -> Any:
        """Run it."""
        assert self.function is not None, f"{self.name} runs before it was settled what runs it"
        return self.function(*args)


class HandingOver:
    """Takes a step's regions by `compile_region`; `settle`, which every rank must call, then has each compiled or loaded."""

    def __init__(self, job: Job, budget: Budget, report: Report) -> None:
        self._job = job
        self._budget = budget
        self._report = report
        self._regions: list[_Region] = []

    def compile_region(self, module: GraphModule, inputs: Sequence[Any], name: str) -> Callable[..., Any]:
        """What will run a region, once it is settled."""
        try:
            digest = digest_of_graph(module, inputs)
        except InputError:
            digest = None  # compiling it says why
        region = _Region(module, tuple(inputs), name, digest)
        self._regions.append(region)
        return region.call

    def settle(self) -> None:
        """Compile on rank 0 and load on the others; what a rank has alone it compiles itself."""
        for digest in self._agreed():
            mine = [region for region in self._regions if region.digest == digest]
            packed = _broadcast(self._compiled(mine[0]) if self._job.rank == 0 else b"")
            if self._job.rank and mine:
                self._take(mine[0], packed)
            for region in mine[1:]:
                region.function = mine[0].function
        if self._job.rank:
            self._job.wait()  # for what rank 0 compiles below: its code is in the caches of ranks that share them
        for region in self._regions:
            if region.function is None:
                self._compile(region, self._report)
        if not self._job.rank:
            self._job.wait()

    def _agreed(self) -> list[str]:
        """Rank 0's digests, each once and in its order, which all ranks learn here."""
        mine = list(dict.fromkeys(region.digest for region in self._regions if region.digest))
        agreed: list[str] = json.loads(_broadcast(json.dumps(mine).encode() if self._job.rank == 0 else b""))
        if agreed and self._job.rank:
            prepare_to_load({})  # seconds, while rank 0 compiles
        for region in self._regions:
            if region.digest is not None and region.digest not in agreed:
                self._report.decide("compile", region.name, "compiled by this rank", _ALONE)
        self._report.decide(
            "compile", "ranks", f"rank 0 hands over {len(agreed)} regions", "the other ranks load what it compiles"
        )
        return agreed

    def _compile(self, region: _Region, report: Report) -> None:
        region.function = compile_graph(region.module, region.inputs, budget=self._budget, report=report, region=region.name)

    def _compiled(self, region: _Region) -> bytes:
        """Compile a region; its failed attempts as JSON, a line, and what others load it from, if it was compiled."""
        report = Report(parent=self._report)
        self._compile(region, report)
        failed = [asdict(attempt) for attempt in report.attempts] if region.function is region.module else []
        return json.dumps(failed).encode() + b"\n" + (pack_graph(region.module, region.inputs) or b"")

    def _take(self, region: _Region, packed: bytes) -> None:
        """Load what rank 0 compiled, or run the region as it is where rank 0 could not compile it."""
        failed, _, content = packed.partition(b"\n")
        for attempt in json.loads(failed):
            self._report.attempt(Attempt(**attempt))
            region.function = region.module
        if content:
            region.function = load_packed_graph(region.module, region.inputs, content, report=self._report, region=region.name)
        if region.function is None:
            self._report.decide("compile", region.name, "compiled by this rank", "what rank 0 compiled does not serve here")


def _broadcast(content: bytes) -> bytes:
    """Rank 0's bytes on every rank."""
    size = torch.tensor([len(content)])
    dist.broadcast(size, src=0)
    whole = torch.empty(int(size), dtype=torch.uint8)
    if content:
        whole.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(whole, src=0)
    return whole.numpy().tobytes()
