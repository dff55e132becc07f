"""Compiled code for all ranks: rank 0 compiles the parts of a step and hands them over; the others load them.

That is a region, or the whole step with its collectives. What is handed over are the entries that the compile left in torch's
cache folder, so ranks need no folder in common. A region waits until the graphs of all ranks are whole; then all agree on what
rank 0 hands over, so that nobody waits for what does not come. torch counts process groups, so that their names differ by rank:
code calls a group by the name of its mesh axis, under which each rank registers its own. It is code: ranks of a job trust each
other, as they do in every collective that sends objects.
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
from torchspan.core.groups import rename_groups
from torchspan.core.report import Attempt, Report
from torchspan.jobs.budget import Budget
from torchspan.private.distributed import name_group
from torchspan.regions.compiler_state import prepare_to_load
from torchspan.regions.graph_job import compile_graph, digest_of_graph, load_packed_graph, pack_graph
from torchspan.train.job import Job

_ALONE = "no graph of rank 0's, on a machine of its kind, is equal to it"


@dataclass
class CompiledPart:
    """A region, or the whole step, and, in the end, what runs it; `digest` is None for what cannot be compiled in a child.

    `module` calls process groups by the names of their mesh axes.
    """

    module: GraphModule
    inputs: tuple[Any, ...]
    name: str
    digest: str | None
    function: Callable[..., Any] | None = None

    def call(self, *args: Any) -> Any:
        """Run it."""
        assert self.function is not None, f"{self.name} is called before settle() has compiled or loaded it"
        return self.function(*args)

    @property
    def is_compiled(self) -> bool:
        """Whether code runs it, and not the graph as it is."""
        return self.function is not None and self.function is not self.module


class HandingOver:
    """Takes a step's parts by `compile_region`; `settle`, which every rank must call, then has each compiled or loaded."""

    def __init__(self, job: Job, budget: Budget, report: Report) -> None:
        self._job = job
        self._budget = budget
        self._report = report
        self._groups = register_groups(job)
        self.parts: list[CompiledPart] = []

    def compile_region(self, module: GraphModule, inputs: Sequence[Any], name: str) -> Callable[..., Any]:
        """The part, as an object that can be called once `settle` has run."""
        module = rename_groups(module, self._groups) if self._groups else module
        try:
            digest = digest_of_graph(module, inputs)
        except InputError:
            digest = None  # compiling it says why
        part = CompiledPart(module, tuple(inputs), name, digest)
        self.parts.append(part)
        return part.call

    def settle(self) -> None:
        """Compile on rank 0 and load on the others; what a rank has alone it compiles itself."""
        if self._job.mesh is not None:
            self._hand_over()
            if self._job.rank:
                self._job.wait()  # for what rank 0 compiles below: its code is in the caches of ranks that share them
        for part in self.parts:
            if part.function is None:
                self._compile(part, self._report)
        if not self._job.rank:
            self._job.wait()

    def _hand_over(self) -> None:
        for digest in self._agreed():
            own_parts = [part for part in self.parts if part.digest == digest]
            packed = broadcast(self._compiled(own_parts[0]) if self._job.rank == 0 else b"")
            if self._job.rank and own_parts:
                self._take(own_parts[0], packed)
            for part in own_parts[1:]:
                part.function = own_parts[0].function

    def _agreed(self) -> list[str]:
        """Rank 0's digests, each once and in its order, which all ranks learn here."""
        digests = list(dict.fromkeys(part.digest for part in self.parts if part.digest))
        agreed: list[str] = json.loads(broadcast(json.dumps(digests).encode() if self._job.rank == 0 else b""))
        if agreed and self._job.rank:
            prepare_to_load({})  # seconds, while rank 0 compiles
        for part in self.parts:
            if part.digest is not None and part.digest not in agreed:
                self._report.decide("compile", part.name, "compiled by this rank", _ALONE)
        self._report.decide(
            "compile", "ranks", f"rank 0 hands over {len(agreed)} regions", "the other ranks load what it compiles"
        )
        return agreed

    def _compile(self, part: CompiledPart, report: Report) -> None:
        part.function = compile_graph(part.module, part.inputs, budget=self._budget, report=report, region=part.name)

    def _compiled(self, part: CompiledPart) -> bytes:
        """Compile a part; its failed attempts as JSON, a line, and what others load it from, if it was compiled."""
        report = Report(parent=self._report)
        self._compile(part, report)
        failed = [] if part.is_compiled else [asdict(attempt) for attempt in report.attempts]
        return json.dumps(failed).encode() + b"\n" + (pack_graph(part.module, part.inputs) or b"")

    def _take(self, part: CompiledPart, packed: bytes) -> None:
        """Load what rank 0 compiled, or run the part as it is where rank 0 could not compile it."""
        failed, _, content = packed.partition(b"\n")
        for attempt in json.loads(failed):
            self._report.attempt(Attempt(**attempt))
            part.function = part.module
        if content:
            part.function = load_packed_graph(part.module, part.inputs, content, report=self._report, region=part.name)
        if part.function is None:
            self._report.decide("compile", part.name, "compiled by this rank", "what rank 0 compiled does not serve here")


def register_groups(job: Job) -> dict[str, str]:
    """For each process group of a mesh axis, by torch's name, the name that is the same on all ranks; each is registered here.

    ``torchspan.dp_shard`` is this rank's group of that axis of the dense parameters' mesh, ``torchspan.experts.ep`` one of the
    experts'.
    """
    names: dict[str, str] = {}
    for prefix, mesh in (("torchspan", job.meshes.dense), ("torchspan.experts", job.meshes.experts)):
        if mesh is None:
            continue
        for axis in mesh.mesh_dim_names or ():
            group = mesh.get_group(axis)
            name_group(group, f"{prefix}.{axis}")
            names.setdefault(group.group_name, f"{prefix}.{axis}")
    return names


def broadcast(content: bytes) -> bytes:
    """Rank 0's bytes on every rank."""
    size = torch.tensor([len(content)])
    dist.broadcast(size, src=0)
    whole = torch.empty(int(size), dtype=torch.uint8)
    if content:
        whole.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    dist.broadcast(whole, src=0)
    return whole.numpy().tobytes()
