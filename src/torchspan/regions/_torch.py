"""The private names of torch that this folder uses; imported on use, so that a plug-in costs nothing until it compiles."""

from __future__ import annotations

import copyreg
import dataclasses
import functools
import logging
import os
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from torchspan.capture import _torch as capture_torch
from torchspan.core.replaced import entries_replaced, replaced
from torchspan.jobs.groups import portable_groups

_compile_holder: list[Callable[..., Any]] = []
_loading = threading.RLock()


class CacheMiss(BaseException):
    """Inductor was about to work where it may only load; no Exception, so that torch does not take it for a bad entry."""


def torch_compile() -> Callable[..., Any]:
    """torch's own ``torch.compile``, also while an environment has a bounded one in its place."""
    return _compile_holder[0] if _compile_holder else torch.compile


def set_torch_compile(original: Callable[..., Any]) -> None:
    """Remember torch's own ``torch.compile`` before it is replaced."""
    _compile_holder[:] = [original]


def entry_point(is_block: bool) -> Callable[..., Any]:
    """A function that calls its first argument, with a code object of its own.

    Dynamo keeps what it compiled, and its limit of recompiles, by code object: each generation has its own.
    """
    template = _call_block if is_block else _call_target
    return types.FunctionType(template.__code__.replace(co_name="region"), template.__globals__, "region")


def _call_target(target: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _call_block(target: Any, *args: Any, **kwargs: Any) -> Any:
    return target._call_impl(*args, **kwargs)  # hooks and forward, without the dispatcher that stands before them


def run_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with what dynamo has compiled for it; where its guards fail it runs eagerly, and nothing is compiled."""
    from torch._dynamo import run

    return run(function)


def inductor(mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None) -> Callable[..., Any]:
    """What ``torch.compile(backend="inductor")`` would call, with `mode` and then `options` applied."""
    return torch._TorchCompileInductorWrapper(mode, dict(options or {}), dynamic)


def named_backend(name: str) -> Callable[..., Any] | str:
    """The function behind a backend that this process registered, to be sent to another; the name of one that torch brings."""
    registry = sys.modules.get("torch._dynamo.backends.registry")
    found = registry._COMPILER_FNS.get(name) if registry else None
    is_ours = found is not None and not str(getattr(found, "__module__", "")).startswith("torch.")
    return found if is_ours else name  # type: ignore[return-value]


def backend_function(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a backend that torch brings, that is registered here, or that was given."""
    from torch._dynamo.backends.registry import lookup_backend

    found: Callable[..., Any] = lookup_backend(backend)
    return found


def import_compiler() -> None:
    """Import dynamo and inductor: seconds of CPU, so not in a step. Their pool of worker processes is not started."""
    before = os.environ.get("TORCH_WARM_POOL")
    os.environ["TORCH_WARM_POOL"] = "0"
    try:
        import torch._dynamo
        import torch._functorch._aot_autograd.autograd_cache
        import torch._inductor.compile_fx
        import torch._inductor.cpp_builder
        import torch._inductor.cpu_vec_isa  # noqa: F401
    finally:  # this one variable only: the program may change others meanwhile, in another thread
        if before is None:
            os.environ.pop("TORCH_WARM_POOL", None)
        else:
            os.environ["TORCH_WARM_POOL"] = before


def standalone_compile(graph: torch.fx.GraphModule, inputs: list[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Inductor's code for `graph` with static shapes, without dynamo."""
    import torch._inductor

    settings = {"config_patches": dict(options)} if options else {}
    return torch._inductor.standalone_compile(graph, inputs, dynamic_shapes="from_example_inputs", options=settings)


def cache_folder() -> Path:
    """The folder of inductor's caches, and of AOTAutograd's."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def cxx_names() -> list[str]:
    """The C++ compilers that inductor looks for, in its order."""
    from torch._inductor import config

    wanted = config.cpp.cxx
    return [name for name in (wanted if isinstance(wanted, (tuple, list)) else (wanted,)) if name]


def counters() -> dict[str, int]:
    """How many graphs were compiled, and what the caches did, since this process began."""
    from torch._dynamo.utils import counters as counted

    names = {
        "graphs": ("stats", "unique_graphs"),
        "saved": ("aot_autograd", "autograd_cache_saved"),
        "hits": ("aot_autograd", "autograd_cache_hit"),
        "bypassed": ("aot_autograd", "autograd_cache_bypass"),
        "codegen_bypassed": ("inductor", "fxgraph_cache_bypass"),
    }
    return {name: counted[group][key] for name, (group, key) in names.items()}


def reset() -> None:
    """Forget what dynamo has compiled in this process."""
    import torch._dynamo

    torch._dynamo.reset()


@contextmanager
def keeping_buffers() -> Iterator[None]:
    """Have AOTAutograd's backward take no saved tensor's memory for its own results: it may be asked for again."""
    import torch._functorch.config as functorch_config

    with functorch_config.patch(donated_buffer=False):
        yield


@contextmanager
def outside_vmap() -> Iterator[None]:
    """Run what is inside as if no vmap were around it, neither functorch's nor that of ``is_grads_batched``."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    depth = torch._C._vmapmode_increment_nesting()
    for _ in range(depth):
        torch._C._vmapmode_decrement_nesting()
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        for _ in range(depth - 1):
            torch._C._vmapmode_increment_nesting()


def note_kept_buffers(node: Any) -> None:
    """Tell the backward of code compiled under :func:`keeping_buffers` so: torch takes "not asked" for "some are taken"."""
    metadata = type(node)._forward_cls.metadata
    if metadata.bw_donated_idxs is None:
        metadata.bw_donated_idxs = []


@contextmanager
def caching() -> Iterator[None]:
    """Have torch keep what it compiles in its caches on disk, whatever the settings say."""
    import torch._functorch.config as functorch_config
    import torch._inductor.config as inductor_config

    with (
        _portable_keys(),
        _checkpoint_is_cacheable(),
        inductor_config.patch(fx_graph_cache=True, compile_threads=1),
        functorch_config.patch(enable_autograd_cache=True),
        keeping_buffers(),
    ):
        yield


@contextmanager
def _portable_keys() -> Iterator[None]:
    """Have a memory format enter a cache key by its name, and a process group a key and an entry by its.

    Pickle names a format by the first module in ``sys.modules`` that has a global ``torch``, so that a key depends on what a
    program imported before torch, and two processes disagree about the same graph. A group cannot be pickled at all, so that
    torch (2.13) keeps no graph of DTensors.
    """
    portable = dict.fromkeys((torch.memory_format, torch.layout), _reduce_by_name)
    with entries_replaced(copyreg.dispatch_table, portable), portable_groups():
        yield


@contextmanager
def _checkpoint_is_cacheable() -> Iterator[None]:
    """Let a graph with activation checkpointing into AOTAutograd's cache, where torch (2.8) does not.

    Its key holds the checkpointed graph as it stands; which values are kept (`context_fn`) is not in it, so that stays outside.
    """
    from torch._functorch._aot_autograd import autograd_cache
    from torch._higher_order_ops.wrap import tag_activation_checkpoint

    if tag_activation_checkpoint.cacheable():
        yield
        return
    check = autograd_cache.check_node_safe

    def check_node_safe(node: Any) -> None:
        if node.target is tag_activation_checkpoint:
            body = node.graph.owning_module.get_submodule(node.args[0].target)
            if "_checkpoint_context_fn" in body.meta:
                raise autograd_cache.BypassAOTAutogradCache("a context_fn is not in the key")
            return
        check(node)

    with (
        replaced(tag_activation_checkpoint, "_cacheable", True),
        replaced(autograd_cache, "check_node_safe", check_node_safe),
    ):
        yield


@contextmanager
def breaking_at_old_collectives() -> Iterator[None]:
    """Have dynamo leave the functions of ``torch.distributed.nn.functional`` to eager, and compile what is around them.

    Newer torch (2.13) raises in each where it is traced, by which the whole function that calls it is left to eager.
    """
    from torch.distributed.nn import functional

    if not hasattr(functional, "_not_supported_under_compile"):
        yield
        return
    public = [one for one in vars(functional).values() if isinstance(one, types.FunctionType)]
    with ExitStack() as stack:
        for one in public:
            if one.__module__ == functional.__name__ and not hasattr(one, "_torchdynamo_disable"):
                one._torchdynamo_disable = True  # type: ignore[attr-defined]
                stack.callback(delattr, one, "_torchdynamo_disable")
        yield


@contextmanager
def noting_refusals(reasons: list[str]) -> Iterator[None]:
    """Gather in `reasons` why torch's caches did not take a graph, which torch says in its log only."""
    names = ("torch._inductor.codecache", "torch._functorch._aot_autograd.autograd_cache")

    def note(record: logging.LogRecord) -> bool:
        said = record.getMessage()
        if "unable to" in said or said.startswith("Bypassing"):
            error = record.exc_info[1] if record.exc_info else None
            reasons.append(f"{said}: {type(error).__name__}: {error}" if error else said)
        return record.levelno >= levels[record.name][1]

    loggers = [logging.getLogger(name) for name in names]
    levels = {one.name: (one.level, one.getEffectiveLevel()) for one in loggers}
    for one in loggers:
        one.addFilter(note)
        one.setLevel(min(logging.INFO, one.getEffectiveLevel()))
    try:
        yield
    finally:
        for one in loggers:
            one.removeFilter(note)
            one.setLevel(levels[one.name][0])


def _reduce_by_name(value: Any) -> tuple[Callable[..., Any], tuple[str]]:
    return _torch_name, (str(value).removeprefix("torch."),)


def _torch_name(name: str) -> Any:
    return getattr(torch, name)


@contextmanager
def only_loading() -> Iterator[None]:
    """Let inductor load in this thread, and raise CacheMiss where it would trace, generate or build."""
    from torch._functorch._aot_autograd.autograd_cache import AOTAutogradCache
    from torch._inductor import codecache, compile_fx
    from torch._inductor.cpp_builder import CppBuilder

    mine = threading.get_ident()

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def refused(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == mine:
                raise CacheMiss(f"inductor asked for {original.__qualname__}")
            return original(*args, **kwargs)

        return refused

    lookup = AOTAutogradCache._lookup

    def found(*args: Any, **kwargs: Any) -> Any:
        entry = lookup(*args, **kwargs)
        if entry is None and threading.get_ident() == mine:
            raise CacheMiss("the graph is not in the cache of the compile process")
        return entry

    prepare_header = codecache._precompile_header

    def no_header(*args: Any, **kwargs: Any) -> str:
        # a header is of use for building only, but asked for (by a process each time) before it is known whether to build
        return "" if threading.get_ident() == mine else prepare_header(*args, **kwargs)

    with _loading, ExitStack() as stack:
        stack.enter_context(caching())
        stack.enter_context(replaced(compile_fx, "fx_codegen_and_compile", refuse(compile_fx.fx_codegen_and_compile)))
        stack.enter_context(replaced(codecache, "_precompile_header", no_header))
        stack.enter_context(replaced(CppBuilder, "build", refuse(CppBuilder.build)))
        stack.enter_context(replaced(AOTAutogradCache, "_lookup", staticmethod(found)))
        before = counters()["bypassed"]
        yield
        if counters()["bypassed"] != before:
            raise CacheMiss("torch cannot cache this graph, so it cannot load it either")


def dynamic_dims(tensors: Sequence[torch.Tensor], dims: Sequence[Iterable[int]]) -> AbstractContextManager[None]:
    """Have dynamo take these dimensions of each tensor as symbols in what it traces inside; the tensors forget it after."""
    return capture_torch.dynamic_dims(tensors, [dict.fromkeys(which, capture_torch.Dynamic()) for which in dims])


@contextmanager
def dynamic_numbers(numbers: Sequence[float]) -> Iterator[None]:
    """Have dynamo take what this thread traces inside, and what equals one of these numbers, as a symbol.

    A number is known by its value and class, not by its source: behind a graph break the same one has another source. A
    constant of the program's own that has the value too becomes a symbol with it: a guard less, and the same results.
    """
    from torch._dynamo.pgo import auto_dynamic
    from torch._dynamo.variables import builder
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    if not numbers:
        yield
        return
    mine, wanted = threading.get_ident(), {(type(one), one) for one in numbers}
    wrap, process = builder.VariableBuilder.wrap_symint, builder.process_automatic_dynamic  # type: ignore[attr-defined]

    def is_wanted(value: Any) -> bool:
        return threading.get_ident() == mine and type(value) in (int, float) and (type(value), value) in wanted

    def wrap_symint(self: Any, value: int, dynamism: Any = None, *args: Any, **kwargs: Any) -> Any:
        return wrap(self, value, DimDynamic.DYNAMIC if dynamism is None and is_wanted(value) else dynamism, *args, **kwargs)

    def processed(tx: Any, name: str, entry: Any, **kwargs: Any) -> Any:
        found = process(tx, name, entry, **kwargs)
        return dataclasses.replace(found, scalar=auto_dynamic) if is_wanted(entry.scalar) else found

    with (
        replaced(builder.VariableBuilder, "wrap_symint", wrap_symint),
        replaced(builder, "process_automatic_dynamic", processed),
    ):
        yield


def guards_hold(function: Callable[..., Any], names: Mapping[str, Any]) -> bool:
    """Whether some code that dynamo compiled for `function` serves a call with these local names; nothing is run."""
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list

    entries = _debug_get_cache_entry_list(function.__code__)
    return any(one.guard_manager.check(dict(names)) for one in entries)


def recompile_limit() -> int:
    """Dynamo's limit of compiles for one function, where dynamo is imported; else what it is by default."""
    config = sys.modules.get("torch._dynamo.config")
    return int(config.recompile_limit) if config is not None else 8


def is_transformed() -> bool:
    """Whether a call stands inside a transform of ``torch.func``, or is recorded by ``torch.jit.trace``."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None


@contextmanager
def known_isas(known: dict[str, bool]) -> Iterator[None]:
    """Answer which vector instructions work here from `known`, and note there what had to be tried.

    Trying takes a C++ compile and a process that imports torch: once a machine is enough, not once a process.
    """
    from torch._inductor.cpu_vec_isa import VecISA

    try_out = VecISA.check_build

    def check_build(self: Any, code: str) -> bool:
        name = f"{type(self).__name__}: {self}"
        if name not in known:
            known[name] = try_out(self, code)
        return known[name]

    with replaced(VecISA, "check_build", check_build):
        yield


@contextmanager
def watching_compiler(
    on_event: Callable[[str, int, str, Mapping[str, Any]], None],
    on_graph: Callable[[torch.fx.GraphModule, str, int], None],
    on_break: Callable[[str, list[traceback.FrameSummary], str], None],
) -> Iterator[None]:
    """Call back with what dynamo, AOTAutograd and inductor do, from their own thread, while they do it.

    `on_event` is told of each timed event of torch: name, nanoseconds since the epoch, ``B`` or ``E``, metadata; `on_graph` of
    each graph before its backend gets it, with its compile id and how many guards there were; `on_break` of each graph break:
    reason, the user's stack, compile id.
    """
    from torch._dynamo.output_graph import OutputGraph
    from torch._dynamo.utils import ChromiumEventLogger

    log_event, call_backend, end_graph = (
        ChromiumEventLogger._log_timed_event,
        OutputGraph.call_user_compiler,
        OutputGraph.compile_subgraph,
    )

    def logged(self: Any, name: str, time_ns: int, phase: str, metadata: Any = None) -> Any:
        on_event(name, time_ns, phase, metadata or {})
        return log_event(self, name, time_ns, phase, metadata)

    def called(self: Any, graph: Any, *args: Any, **kwargs: Any) -> Any:
        on_graph(graph, _compile_id(), len(self.guards))
        return call_backend(self, graph, *args, **kwargs)

    def ended(self: Any, tx: Any, reason: Any, *args: Any, **kwargs: Any) -> Any:
        if reason.graph_break:
            on_break(str(reason.reason), list(reason.user_stack), _compile_id())
        return end_graph(self, tx, reason, *args, **kwargs)

    with (
        replaced(ChromiumEventLogger, "_log_timed_event", logged),
        replaced(OutputGraph, "call_user_compiler", called),
        replaced(OutputGraph, "compile_subgraph", ended),
    ):
        yield


@contextmanager
def around_compiles(on_start: Callable[[], None], on_end: Callable[[], None]) -> Iterator[None]:
    """Call back when dynamo begins a compile and when it is done, in its thread; one inside another is a part of it."""
    from torch._dynamo.callback import callback_handler

    start = callback_handler.register_start_callback(lambda of: on_start())
    end = callback_handler.register_end_callback(lambda of: on_end())
    try:
        yield
    finally:
        callback_handler.remove_start_callback(start)
        callback_handler.remove_end_callback(end)


def traced_line() -> str | None:
    """The user's ``file:line`` that dynamo traces in this thread."""
    from torch._guards import TracingContext

    stack = TracingContext.extract_stack() if TracingContext.try_get() else []
    return f"{stack[-1].filename}:{stack[-1].lineno}" if stack else None


def _compile_id() -> str:
    """Which compile is under way: dynamo's number of the frame, and how often that was compiled before."""
    from torch._guards import CompileContext

    return str(CompileContext.current_compile_id())


def minify(
    graph: torch.fx.GraphModule,
    inputs: list[torch.Tensor],
    goes_wrong: Callable[[torch.fx.GraphModule, Sequence[Any]], bool],
    keep: Callable[[torch.fx.GraphModule, Sequence[Any]], None],
) -> None:
    """Make `graph` smaller with torch's minifier as long as it `goes_wrong`; `keep` is told of each smaller one."""
    from torch._functorch.fx_minifier import minifier

    with torch.no_grad():
        minifier(graph, inputs, goes_wrong, keep, skip_offload=True, skip_sanity=True)


def module_code(graph: torch.fx.GraphModule) -> str:
    """Python text of a module class ``Repro`` that does what `graph` does."""
    from torch._dynamo.debug_utils import NNModuleToString

    return str(NNModuleToString.convert(graph))


def config_code() -> str:
    """Python text that sets dynamo's, AOTAutograd's and inductor's settings that are not as torch has them by default."""
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    configs = (torch._dynamo.config, torch._functorch.config, torch._inductor.config)
    lines = [line for config in configs for line in config.codegen_config().splitlines()]
    wanted = [line for line in lines if line and not any(name in line for name in ("compile_threads", "fx_graph_cache"))]
    imports = sorted({f"import {line.partition('.config.')[0]}.config" for line in wanted if ".config." in line})
    return "\n".join([*imports, *wanted])


@contextmanager
def noting_recompiles() -> Iterator[Callable[[], list[tuple[str, str, str, str]]]]:
    """Gives a function that says what was compiled again since then: compile id, function, site and reason of each."""
    from torch._dynamo import utils

    utils.clear_compilation_metrics()
    utils.set_compilation_metrics_limit(100_000)

    def recompiles() -> list[tuple[str, str, str, str]]:
        return [
            (str(one.compile_id), str(one.co_name), f"{one.co_filename}:{one.co_firstlineno}", one.recompile_reason)
            for one in utils.get_compilation_metrics()
            if one.recompile_reason
        ]

    try:
        yield recompiles
    finally:
        utils.set_compilation_metrics_limit(utils.DEFAULT_COMPILATION_METRICS_LIMIT)
