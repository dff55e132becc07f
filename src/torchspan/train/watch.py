"""What watches a job's pipeline: timing, counts, what is dumped, what is left of a pass that fails, and the other ranks."""

from __future__ import annotations

from torch import Tensor

from torchspan.capture._state import BoundGraph
from torchspan.core.graph import Graph
from torchspan.core.report import Report
from torchspan.passes._base import Pass
from torchspan.passes._bisect import Stages
from torchspan.passes._instruments import Counts, Dump, FailureFile, Instrument, Timing
from torchspan.report._graph_page import GraphPage
from torchspan.train.bisect import check_numbers
from torchspan.train.config import Compile
from torchspan.train.job import Job, check_same_collectives


class Watch:
    """The instruments of a job, and what is told at the end."""

    def __init__(self, settings: Compile, job: Job, report: Report) -> None:
        self._job, self._report = job, report
        self._counts, self._stages = Counts(), Stages()
        self.instruments: list[Instrument] = [self._counts, SameCollectives(job), FailureFile(settings.dump)]
        if settings.dump is not None and job.rank == 0:
            self.instruments += [Dump(settings.dump), GraphPage(settings.dump / "graph.html")]
        self._is_bisecting = settings.bisect
        if settings.bisect:
            self.instruments.append(self._stages)
        self.instruments.append(Timing(report))  # the last: of what the others do, nothing is the pass's time

    def tell(self) -> None:
        """Record what each pass changed."""
        for name, before, after in self._counts.rows:
            self._report.decide("pass", f"{name}: graph", _difference(before, after), "counted before and after")

    def check_numbers(self, step: BoundGraph, example: tuple[Tensor, Tensor]) -> None:
        """Where it was asked for, compare the numbers after each pass; PassError names the first that changes them."""
        if self._is_bisecting:
            check_numbers(self._stages, step, example, self._job)


class SameCollectives(Instrument):
    """Raises PassError where a pass gave the ranks of a job graphs whose collectives do not fit each other."""

    def __init__(self, job: Job) -> None:
        self._job = job

    def after(self, pass_: Pass, before: Graph, after: Graph) -> None:
        """Compare the ranks."""
        check_same_collectives(after, self._job, pass_.name)


def _difference(before: dict[str, int], after: dict[str, int]) -> str:
    """What changed between two counts, as text.

    >>> _difference({"nodes": 9, "all_reduce": 2}, {"nodes": 7, "all_reduce": 2})
    'nodes 9 → 7'
    """
    names = [name for name in {**before, **after} if before.get(name, 0) != after.get(name, 0)]
    return ", ".join(f"{name} {before.get(name, 0)} → {after.get(name, 0)}" for name in names) or "nothing changed"
