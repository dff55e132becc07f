"""A step that a job keeps for its next start: its graph after the passes, with the code that was compiled of it.

`--compile.artifact` names the folder. Its one file begins with a manifest (`artifacts.manifest`) of what the step was made of
and for; a start for which every entry is equal loads it, on all ranks, and captures and compiles nothing. Rank 0 reads and
writes; what a rank has alone is kept for that rank. The step is Python and machine code, as torch's caches hold it: whoever can
write the file can run code in the job.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import torchspan
from torchspan.artifacts.manifest import mismatches, platform_entries, read_manifest, write_manifest
from torchspan.core.errors import InputError, IntegrityError
from torchspan.core.files import write_whole
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.core.groups import rename_groups
from torchspan.core.report import Report
from torchspan.jobs import transport
from torchspan.passes._groups import create_named_groups
from torchspan.regions.graph_job import GraphSpec, build, describe, describe_input, load_packed_graph, pack_graph
from torchspan.regions.graph_job import InputSpec as TensorSpec
from torchspan.train._handing_over import CompiledPart, broadcast, register_groups
from torchspan.train.check import Plan
from torchspan.train.config import TrainConfig
from torchspan.train.job import Job

FILE = "step.torchspan"


@dataclass(frozen=True)
class _Part:
    """A part that was compiled: its graph, its inputs, and what its code is loaded from."""

    name: str
    graph: GraphSpec
    inputs: tuple[Any, ...]
    packed: bytes


@dataclass(frozen=True)
class _PartRef:
    """Stands in a graph for the part of that number."""

    index: int


@dataclass(frozen=True)
class _Step:
    """A Graph as plain values; `meta` is its module's, `values` are like what its placeholders take."""

    graph: GraphSpec
    inputs: tuple[InputSpec, ...]
    outputs: tuple[OutputSpec, ...]
    kind: Any
    notes: tuple[str, ...]
    meta: Mapping[str, Any]
    values: tuple[Any, ...]
    parts: tuple[_Part, ...]


class KeptStep:
    """The step of one job in `folder`; every rank calls `load`, and, where that gave None, `save`."""

    def __init__(self, folder: Path, entries: Mapping[str, Any], job: Job, report: Report) -> None:
        self._path = folder / FILE
        self._entries = entries
        self._job = job
        self._report = report
        self._groups = register_groups(job)

    def load(self) -> Graph | None:
        """The step that was kept, if it was made for this job, and if every rank could load its own; else None, and why."""
        content = self._read()
        try:
            graph, why_not = self._loaded(content), None
        except (InputError, IntegrityError) as cause:
            graph, why_not = None, str(cause)
        reasons = [reason for reason in _gathered(self._job, why_not) if reason is not None]
        if reasons:
            self._report.decide("artifact", "step", "captured and compiled anew", reasons[0])
            return None
        if graph is not None and self._job.mesh is not None:
            create_named_groups(graph)  # those that separate_process_groups had made
        self._report.decide(
            "artifact", "step", "loaded", f"{self._path} was made for this job; nothing is captured or compiled"
        )
        return graph

    def save(self, graph: Graph) -> None:
        """Keep `graph`; where that is not possible, the report says why."""
        why_not, content = None, b""
        try:
            content = transport.dumps(_described(graph, self._groups), keep_values=True)
        except InputError as cause:
            why_not = str(cause)
        reasons = [reason for reason in _gathered(self._job, why_not) if reason is not None]
        if reasons:
            self._report.decide("artifact", "step", "not kept", reasons[0])
            return
        steps = _gathered_once(self._job, content)
        if self._job.rank == 0:
            self._write(steps)
        self._report.decide("artifact", "step", "kept", f"the next start of this job loads it from {self._path}")

    def _read(self) -> bytes:
        """Rank 0's file on every rank; nothing where there is none."""
        content = b""
        if self._job.rank == 0 and self._path.is_file():
            content = self._path.read_bytes()
        return content if self._job.mesh is None else broadcast(content)

    def _loaded(self, content: bytes) -> Graph:
        """The step of a file's bytes; InputError where it was made for something else, IntegrityError where it is damaged."""
        if not content:
            raise InputError(f"there is no {self._path} yet")
        size = int.from_bytes(content[:8], "big")
        manifest = read_manifest(content[8 : 8 + size])
        differ = mismatches(manifest, self._entries)
        if differ:
            differences = "; ".join(f"entry {name!r}: {how}" for name, how in differ.items())
            raise InputError(f"{self._path} was made for another job: {differences}")
        start = 8 + size
        payloads: dict[str, bytes] = {}
        for payload in manifest["payloads"]:
            part = content[start : start + payload["size"]]
            if hashlib.sha256(part).hexdigest() != payload["sha256"]:
                raise IntegrityError(f"{self._path} is damaged: the bytes of {payload['name']} are not those that were written")
            payloads[payload["name"]] = part
            start += payload["size"]
        name = f"rank{self._job.rank}"
        with warnings.catch_warnings():  # torch 2.13 warns of its own TreeSpec as it is unpickled
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            step = transport.loads(payloads[name if name in payloads else "rank0"])
        return self._restored(step)

    def _restored(self, step: _Step) -> Graph:
        functions = [self._function(part) for part in step.parts]
        attributes = {
            name: _Call(functions[value.index]) if isinstance(value, _PartRef) else value
            for name, value in step.graph.attributes.items()
        }
        module = build(replace(step.graph, attributes=attributes))
        names = {name: own for own, name in self._groups.items()}
        module = rename_groups(module, names)
        module.meta.update(step.meta)
        graph = Graph(module, step.inputs, step.outputs, step.kind, step.notes)
        for node, value in zip(graph.placeholders(), step.values, strict=True):
            node.meta["val"] = value.empty() if isinstance(value, TensorSpec) else value
        return graph

    def _function(self, part: _Part) -> Callable[..., Any]:
        inputs = [spec.empty() if isinstance(spec, TensorSpec) else spec for spec in part.inputs]
        function = load_packed_graph(build(part.graph), inputs, part.packed, report=self._report, region=part.name)
        if function is None:
            raise InputError(f"the code of {part.name} in {self._path} does not load here; its attempt says why")
        return function

    def _write(self, steps: Sequence[bytes]) -> None:
        payloads = {f"rank{rank}": step for rank, step in enumerate(steps) if step}
        manifest = write_manifest(self._entries, payloads, [])
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, b"".join([len(manifest).to_bytes(8, "big"), manifest, *payloads.values()]))


class _Call(nn.Module):
    """A function as a submodule."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = function


def _described(graph: Graph, groups: Mapping[str, str]) -> _Step:
    """A Graph as plain values; InputError where a part of it was not compiled, or cannot be sent."""
    module = rename_groups(graph.module, groups)
    parts: list[_Part] = []
    numbers: dict[str | None, int] = {}
    spec = describe(module)
    attributes = dict(spec.attributes)
    for name, value in attributes.items():
        part = getattr(getattr(value, "forward", None), "__self__", None)
        if isinstance(part, CompiledPart):
            if part.digest not in numbers:
                numbers[part.digest] = len(parts)
                parts.append(_packed(part))
            attributes[name] = _PartRef(numbers[part.digest])
        elif isinstance(value, nn.Module):
            raise InputError(f"{name}, a {type(value).__name__}, is of this process and cannot be kept")
    return _Step(
        graph=replace(spec, attributes=attributes),
        inputs=graph.inputs,
        outputs=graph.outputs,
        kind=graph.kind,
        notes=graph.notes,
        meta={key: value for key, value in module.meta.items() if key.startswith("torchspan")},
        values=tuple(describe_input(node.meta["val"]) for node in graph.placeholders()),
        parts=tuple(parts),
    )


def _packed(part: CompiledPart) -> _Part:
    packed = pack_graph(part.module, part.inputs) if part.is_compiled else None
    if packed is None:
        raise InputError(f"{part.name} was not compiled, so that the next start may still compile it")
    return _Part(part.name, describe(part.module), tuple(describe_input(value) for value in part.inputs), packed)


# what a step is made of and for


def entries_of(config: TrainConfig, plan: Plan, job: Job, program: nn.Module) -> dict[str, Any]:
    """What must be equal in two starts for one to use the other's step, by name."""
    training, compile_ = config.training, config.compile
    return {
        **platform_entries(),
        "torchspan": _digest_of_files(Path(torchspan.__file__).parent.rglob("*.py")),
        "model": f"{plan.spec.name} {plan.flavour}: {plan.spec.flavour(plan.flavour)}",
        "code": _digest_of_files(_files([*(type(module) for module in program.modules()), *map(type, plan.pipeline.passes)])),
        "state": {
            name: [list(tensor.shape), str(tensor.dtype), str(tensor.device)] for name, tensor in _state(program).items()
        },
        "ranks": f"{job.world_size} ranks: {plan.degrees}",
        "parallelism": asdict(config.parallelism),
        "batch": [training.global_batch_size, training.gradient_accumulation_steps, training.seq_len],
        "threads": torch.get_num_threads(),
        "capture": compile_.capture,
        "passes": str(plan.pipeline),
        "optimizer": {"weight_decay": config.optimizer.weight_decay} if compile_.optimizer else None,
        "device": job.device.type,
    }


def _state(program: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(program.named_parameters()), **dict(program.named_buffers())}


def _files(classes: Iterable[type]) -> set[Path]:
    """The files of these classes and their bases, but for torch's, whose version is an entry of its own."""
    paths: set[Path] = set()
    for cls in {base for subclass in classes for base in inspect.getmro(subclass)}:
        module = sys.modules.get(cls.__module__)
        file = getattr(module, "__file__", None)
        if file is not None and not cls.__module__.startswith("torch."):
            paths.add(Path(file))
    return paths


def _digest_of_files(files: Iterable[Path]) -> str:
    """One digest of the contents of these files."""
    return hashlib.sha256(json.dumps(sorted(hashlib.sha256(p.read_bytes()).hexdigest() for p in files)).encode()).hexdigest()


# ranks


def _gathered(job: Job, value: Any) -> list[Any]:
    """Every rank's `value`, on every rank."""
    if job.mesh is None:
        return [value]
    values: list[Any] = [None] * job.world_size
    dist.all_gather_object(values, value)
    return values


def _gathered_once(job: Job, content: bytes) -> list[bytes]:
    """Each rank's bytes, on rank 0; empty for a rank whose bytes are equal to rank 0's."""
    digests = _gathered(job, hashlib.sha256(content).hexdigest())
    if len(set(digests)) == 1:
        return [content]
    contents: list[Any] = [None] * job.world_size
    own = content if job.rank == 0 or digests[job.rank] != digests[0] else b""
    dist.gather_object(own, contents if job.rank == 0 else None)
    return contents
