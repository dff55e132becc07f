"""Compiles one FX graph of plain operators (a region of a training step) in a bounded child, and loads it here."""

from __future__ import annotations

import hashlib
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from torchspan.artifacts.manifest import digest_of, platform_entries
from torchspan.caches import ledger
from torchspan.caches.package import Entries, pack, unpack
from torchspan.core.errors import InputError, IntegrityError
from torchspan.core.graph import output_node
from torchspan.core.groups import list_groups
from torchspan.core.report import Report, current_report
from torchspan.jobs import transport
from torchspan.jobs.budget import DEFAULT_BUDGET, Budget
from torchspan.jobs.supervisor import Ending, Job, run_bounded
from torchspan.private import inductor
from torchspan.private.distributed import group_size, start_fake_groups
from torchspan.regions import ambient, caching
from torchspan.regions.ambient import Ambient
from torchspan.regions.compiler_state import known_isas, known_isas_here, prepare_to_load
from torchspan.regions.worker import check_compiler

_loaded: dict[str, Callable[..., Any]] = {}
_entries: dict[str, Entries] = {}  # where it comes from
_lock = threading.Lock()


@dataclass(frozen=True)
class NodeRef:
    """An argument that is another node's result, by that node's number."""

    index: int


@dataclass(frozen=True)
class GraphSpec:
    """A graph as plain values: (op, name, target, args, kwargs) a node, and what its get_attr nodes refer to."""

    nodes: tuple[tuple[str, str, Any, Any, Any], ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class InputSpec:
    """A tensor without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: str

    def empty(self) -> torch.Tensor:
        """A tensor like it; its memory is not touched."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class GraphTask:
    """What the child compiles: a graph, its inputs (InputSpec or plain numbers), inductor's options, and the caller's state.

    `groups` are the process groups that the graph calls, by name with their numbers of ranks: the child has stand-ins for them.
    """

    graph: GraphSpec
    inputs: tuple[Any, ...]
    options: dict[str, Any]
    ambient: Ambient
    groups: tuple[tuple[str, int], ...] = ()


def compile_graph(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    *,
    budget: Budget | None = None,
    report: Report | None = None,
    region: str = "graph",
    options: dict[str, Any] | None = None,
    strategy: str = "regional",
) -> Callable[..., Any]:
    """`graph`, compiled by inductor in a child inside `budget`; `graph` itself, with an Attempt in the Report, if that fails.

    `example_inputs` are tensors (fake ones too; only their shape, strides, dtype and device matter) or plain numbers, one a
    placeholder. `options` are inductor's. Blocks until it is done. Equal graphs are compiled once a process.
    """
    report = report or Report(parent=current_report())
    budget = budget or DEFAULT_BUDGET
    try:
        task = _task(graph, example_inputs, options)
        payload = transport.dumps(task, keep_values=True)
    except InputError as cause:
        report.attempt(Ending("failed", 0.0, cause=str(cause), where="sending the graph").attempt(strategy, region, "inductor"))
        return graph
    digest = _digest(task)
    with _lock:
        if digest in _loaded:
            report.decide("compile", region, "shared", "an equal graph was compiled before")
            return _loaded[digest]
    ending = run_bounded(Job("torchspan.regions.graph_job:compile_in_child", payload), budget)
    if ending.result is not None:
        entries: Entries = pickle.loads(ending.result)
        ending, compiled = _load(task, ending, entries)
        if compiled is not None:
            with _lock:
                _loaded[digest], _entries[digest] = compiled, entries
    report.attempt(ending.attempt(strategy, region, "inductor"))
    return _loaded.get(digest, graph)


def _task(graph: GraphModule, example_inputs: Sequence[Any], options: dict[str, Any] | None) -> GraphTask:
    inputs = tuple(describe_input(value) for value in example_inputs)
    groups = tuple((name, group_size(name)) for name in list_groups(graph))
    return GraphTask(describe(graph), inputs, dict(options or {}), ambient.capture(), groups)


def _digest(task: GraphTask) -> str:
    alike = replace(task, ambient=replace(task.ambient, configs={}))  # these are not known before inductor is imported here
    return hashlib.sha256(transport.dumps(alike, keep_values=True)).hexdigest()


# handing a compiled graph to another process


def digest_of_graph(graph: GraphModule, example_inputs: Sequence[Any]) -> str:
    """Text that is equal for two graphs if the compiled code of one serves the other: equal graphs, machines and Pythons.

    Raises:
        InputError: the graph cannot be compiled in a child.
    """
    return digest_of([_digest(_task(graph, example_inputs, None)), platform_entries()])


def pack_graph(graph: GraphModule, example_inputs: Sequence[Any]) -> bytes | None:
    """The compiled code of a graph, packed for another process; None if it was not compiled here, or its entries are gone."""
    try:
        entries = _entries.get(_digest(_task(graph, example_inputs, None)))
        return None if entries is None else pack(entries, inductor.cache_folder())
    except (InputError, IntegrityError, OSError):
        return None  # it was removed from the cache meanwhile: who asked compiles it


def load_packed_graph(
    graph: GraphModule, example_inputs: Sequence[Any], packed: bytes, *, report: Report | None = None, region: str = "graph"
) -> Callable[..., Any] | None:
    """The code of `graph` from what :func:`pack_graph` gave elsewhere; None, with a failed Attempt, if it does not serve here.

    Nothing is compiled.
    """
    report = report or Report(parent=current_report())
    started = time.monotonic()
    task = _task(graph, example_inputs, None)
    prepare_to_load({})
    try:
        entries = unpack(packed, inductor.cache_folder())
    except (IntegrityError, OSError) as cause:
        ending, compiled = Ending("failed", 0.0, cause=str(cause), where="unpacking"), None
    else:
        ending, compiled = _load(task, Ending("loaded", 0.0), entries)
    report.attempt(replace(ending, seconds=time.monotonic() - started).attempt("regional", region, "inductor"))
    if compiled is not None:
        with _lock:
            _loaded[_digest(task)], _entries[_digest(task)] = compiled, entries
    return compiled


# loading, and what the child does


def _load(task: GraphTask, ending: Ending, entries: Entries) -> tuple[Ending, Callable[..., Any] | None]:
    started = time.monotonic()
    prepare_to_load(entries.isas)
    try:
        with known_isas(known_isas_here()), caching.only_loading():
            return ending, _compile(task)
    except caching.CacheMiss as miss:
        cause = f"its cache entries do not serve this process: {miss}"
    except Exception as error:  # noqa: BLE001 - a foreign compiler; the graph runs eagerly, and the Report says why
        cause = f"{type(error).__name__}: {error}"
    seconds = ending.seconds + time.monotonic() - started
    return Ending("failed", seconds, ending.peak_bytes, cause, "loading"), None


def compile_in_child(payload: bytes) -> bytes:
    """Compile a pickled GraphTask so that its result lies in torch's caches; gives what lies there, pickled Entries."""
    task: GraphTask = transport.loads(payload)
    ambient.restore(task.ambient)
    check_compiler()
    if task.groups:
        start_fake_groups(0, {name: range(size) for name, size in task.groups})
    isas: dict[str, bool] = {}
    with ledger.watching(inductor.cache_folder()) as note:
        with caching.caching(), known_isas(isas):
            _compile(task)
        changes = note()
    counts = caching.counters()
    if not counts["saved"] + counts["hits"]:
        raise InputError("torch's caches did not take the graph, so it cannot be handed over")
    return pickle.dumps(Entries(changes.files, isas))


def _compile(task: GraphTask) -> Callable[..., Any]:
    module = build(task.graph)
    inputs = [value.empty() if isinstance(value, InputSpec) else value for value in task.inputs]
    is_single = _returns_one(module)
    with torch.no_grad():
        compiled = inductor.compile_static(module, inputs, task.options)

    def call(*args: Any) -> Any:
        with torch.no_grad():
            outputs = compiled(*args)
        return outputs[0] if is_single else outputs

    return call


def _returns_one(module: GraphModule) -> bool:
    """Whether the graph returns one tensor and no tuple; inductor wants a tuple, so it is given one."""
    output = output_node(module.graph)
    if isinstance(output.args[0], (tuple, list)):
        return False
    output.args = ((output.args[0],),)
    module.recompile()
    return True


def describe(module: GraphModule) -> GraphSpec:
    """The graph of `module` as plain values; raises InputError for shapes that are symbols."""
    numbers = {node: index for index, node in enumerate(module.graph.nodes)}

    def refer(node: Node) -> Any:
        return NodeRef(numbers[node])

    def plain(value: Any) -> Any:
        return map_arg(value, refer)

    nodes = tuple((n.op, n.name, n.target, plain(n.args), plain(n.kwargs)) for n in module.graph.nodes)
    names = {str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module")}
    return GraphSpec(nodes, {name: _attribute(module, name) for name in sorted(names)})


def _attribute(module: GraphModule, name: str) -> Any:
    value = attrgetter(name)(module)
    return describe(value) if isinstance(value, GraphModule) else value


def build(spec: GraphSpec) -> GraphModule:
    """The module that :func:`describe` was given, without metadata."""
    graph = Graph()
    built: list[Node] = []

    def resolve(value: Any) -> Any:
        if isinstance(value, NodeRef):
            return built[value.index]
        if isinstance(value, slice):
            return slice(resolve(value.start), resolve(value.stop), resolve(value.step))
        if isinstance(value, (tuple, list)):
            return type(value)(resolve(item) for item in value)
        if isinstance(value, dict):
            return {key: resolve(item) for key, item in value.items()}
        return value

    for op, name, target, args, kwargs in spec.nodes:
        built.append(graph.create_node(op, target, resolve(args), resolve(kwargs), name))
    values = {name: build(value) if isinstance(value, GraphSpec) else value for name, value in spec.attributes.items()}
    return GraphModule(values, graph)


def describe_input(value: Any) -> Any:
    """A tensor as an InputSpec, a plain number as it is; raises InputError for symbols and for anything else."""
    if not isinstance(value, torch.Tensor):
        if isinstance(value, (bool, int, float)):
            return value
        raise InputError(f"an example input is a tensor or a plain number, not {type(value).__name__}")
    sizes = (*value.shape, *value.stride())
    if not all(type(size) is int for size in sizes):
        raise InputError(f"an example input has symbols for sizes ({tuple(value.shape)}); give one with numbers")
    return InputSpec(tuple(value.shape), tuple(value.stride()), value.dtype, str(value.device))
