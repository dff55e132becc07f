"""Instruments: watch a pipeline and change nothing."""

from __future__ import annotations

import logging
import re
import shlex
import time
from pathlib import Path

from torchspan.core.files import write_whole
from torchspan.core.graph import Graph
from torchspan.core.report import Report
from torchspan.passes._base import Pass, PassContext
from torchspan.passes._recorded import written_failure

log = logging.getLogger("torchspan")


class Instrument:
    """Called before each pass with its graph, and after it with both, or with what it failed with; does nothing itself."""

    def before(self, pass_: Pass, graph: Graph) -> None:
        """A pass is about to run on `graph`."""

    def after(self, pass_: Pass, before: Graph, after: Graph) -> None:
        """A pass made `after` of `before`, and was verified."""

    def failed(self, pass_: Pass, graph: Graph, error: Exception, context: PassContext) -> str | None:
        """A pass failed on `graph`, or gave back what is not valid; the text that is returned is added to the error's."""
        return None


class Timing(Instrument):
    """Writes how long each pass took, with its verification, to a Report, as the figure ``pass_<name>_s``."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self._began: list[float] = []

    def before(self, pass_: Pass, graph: Graph) -> None:
        """Start the clock."""
        self._began.append(time.perf_counter())

    def after(self, pass_: Pass, before: Graph, after: Graph) -> None:
        """Stop it."""
        self._report.figure(f"pass_{pass_.name}_s", time.perf_counter() - self._began.pop())


class Counts(Instrument):
    """Keeps, of each pass, the numbers of nodes and collectives before and after."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, dict[str, int], dict[str, int]]] = []

    def after(self, pass_: Pass, before: Graph, after: Graph) -> None:
        """Count both."""
        self.rows.append((pass_.name, count(before), count(after)))


class Dump(Instrument):
    """Writes each graph as readable text: to `folder`, one file a pass, or to the log."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._num_written = 0

    def before(self, pass_: Pass, graph: Graph) -> None:
        """The graph that the first pass is given is written too."""
        if not self._num_written:
            self._write("captured", graph)

    def after(self, pass_: Pass, before: Graph, after: Graph) -> None:
        """Write the result."""
        self._write(pass_.name, after)

    def _write(self, name: str, graph: Graph) -> None:
        text = graph.module.print_readable(print_output=False)
        if self._folder is None:
            log.info("graph after %s\n%s", name, text)
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / f"{self._num_written:02}_{name}.py").write_text(text)
        self._num_written += 1


class FailureFile(Instrument):
    """Leaves one file where a pass fails: the pass, what it raised, and the graph that it was given.

    It is written to `folder` (to the current folder, if None) as ``torchspan-pass-failure-<pass>.py``; the ranks of a job that
    share a folder leave one. ``torchspan passes --replay FILE`` runs the pass again on that graph, in a process of its own.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path.cwd()

    def failed(self, pass_: Pass, graph: Graph, error: Exception, context: PassContext) -> str | None:
        """Write the file; the text says where it is, or why it could not be written."""
        path = self._folder / f"torchspan-pass-failure-{re.sub(r'[^A-Za-z0-9_.-]+', '-', pass_.name)}.py"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            write_whole(path, written_failure(pass_, graph, error, context).encode())
        except OSError as cause:
            return f"the graph before it could not be written: {cause}"
        return f"run it again on the graph before it: torchspan passes --replay {shlex.quote(str(path))}"


def count(graph: Graph) -> dict[str, int]:
    """Nodes and collectives of a graph."""
    return {"nodes": len(graph.module.graph.nodes), **graph.num_collectives()}
