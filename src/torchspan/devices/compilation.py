"""The tables in which torch's compilers look functions up by identity: wrapped functions are found in them, too.

dynamo reads our wrappers as the plain Python that they are, so no graph breaks; TorchScript takes the function that is wrapped.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch._compile import _disable_dynamo

from torchspan.devices import _redirect
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition, Replacement

# Names of private modules as text: they are patched when they are imported, never imported from here.
RULES = "torch._dynamo.trace_rules"
VARIABLES = "torch._dynamo.variables.torch"
STREAMS = "torch._dynamo.variables.streams"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The tables of dynamo and of TorchScript."""
    yield Redefinition("compilation", RULES, "load_object", partial(_unwrapping, redirection))
    yield Replacement("compilation", RULES, "get_tensor_method", partial(_methods, redirection))
    handlers = partial(_handlers, redirection)
    yield Replacement("compilation", VARIABLES, "TorchInGraphFunctionVariable._get_handlers", handlers)
    yield Replacement("compilation", VARIABLES, "BaseTorchVariable.__init__", partial(_variable, redirection))
    yield Replacement("compilation", VARIABLES, "get_overridable_functions", partial(_functions, redirection))
    yield Replacement("compilation", "torch._dynamo.comptime", "comptime", _remember)
    if redirection.target == "cpu":
        current = partial(_current_stream, redirection)
        yield Replacement("compilation", STREAMS, "SymbolicStreamState.cur_stream", current)
        yield Replacement("compilation", STREAMS, "StreamContextVariable.__init__", partial(_stream_context, redirection))
        for kind in ("StreamVariable", "EventVariable"):
            yield Replacement("compilation", STREAMS, f"{kind}.call_method", partial(_ordering, redirection))
        for name in ("Stream", "Event"):
            build = partial(_building, redirection, name)
            yield Redefinition("compilation", "torch._dynamo.utils", f"build_{name.lower()}", build)
    yield Redefinition("compilation", "torch.jit._builtins", "_find_builtin", partial(_builtin, redirection))


def _original(redirection: Redirection, value: Any) -> Any:
    return redirection.originals.get(id(value), value)


def _remember(comptime: Any) -> Any:
    """Keep dynamo's function where the wrappers find it; it is not changed."""
    _redirect.comptime = comptime
    return comptime


def _unwrapping(redirection: Redirection, old: Function) -> Function:
    def load_object(name: str) -> Any:
        return _original(redirection, old(name))

    return load_object


def _methods(redirection: Redirection, old: Any) -> Function:
    def get_tensor_method() -> frozenset[Any]:
        return _torch_methods(old(), tuple(redirection.originals.values()))

    cache: dict[int, frozenset[Any]] = {}

    def _torch_methods(methods: frozenset[Any], originals: tuple[Any, ...]) -> frozenset[Any]:
        if id(methods) not in cache:
            cache[id(methods)] = methods | {value for value in originals if type(value).__name__ == "method_descriptor"}
        return cache[id(methods)]

    get_tensor_method.cache_clear = old.cache_clear  # type: ignore[attr-defined]
    return get_tensor_method


def _handlers(redirection: Redirection, old: Any) -> Any:
    function = old.__func__ if isinstance(old, staticmethod) else old
    cache: dict[int, dict[Any, Any]] = {}

    def _get_handlers() -> dict[Any, Any]:
        handlers = function()
        if id(handlers) not in cache:
            cache[id(handlers)] = {_original(redirection, key): value for key, value in handlers.items()}
        return cache[id(handlers)]

    return staticmethod(_get_handlers)


def _variable(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, value: Any, **kwargs: Any) -> None:
        old(self, _original(redirection, value), **kwargs)

    return init


def _functions(redirection: Redirection, old: Any) -> Function:
    def get_overridable_functions() -> set[Any]:
        return {_original(redirection, value) for value in old()}

    return get_overridable_functions


def _builtin(redirection: Redirection, old: Function) -> Function:
    def _find_builtin(fn: Any) -> Any:
        return old(_original(redirection, fn))

    return _find_builtin


def _current_stream(redirection: Redirection, old: Any) -> Function:
    """dynamo begins with the stream of an accelerator where there is one; here, the program's first question begins it."""

    @wraps(old)
    def cur_stream(self: Any, device: Any = None) -> Any:
        if not self.cur_stream_stack and _redirect.in_force is redirection:
            self.cur_stream_stack.append(_stream_variable(sys.modules[old.__module__]))
        return old(self, device)

    return cur_stream


def _stream_variable(streams: Any) -> Any:
    """What dynamo holds for the current stream: an object of the program, which the graph finds by its number."""
    stream = torch.cuda.current_stream()
    sources: Any = sys.modules["torch._dynamo.source"]
    module = sources.AttrSource(sources.ImportSource("torch"), "cuda")
    source = sources.CallFunctionNoArgsSource(sources.AttrSource(module, "current_stream"))
    index = streams.register_user_object(stream, source)
    translator = sys.modules["torch._dynamo.symbolic_convert"].InstructionTranslator.current_tx()
    proxy = translator.output.create_proxy("call_function", streams.get_external_object_by_index, (index,), {})
    proxy.node.meta["example_value"] = stream
    return streams.StreamVariable(proxy, stream, index, source=source)


def _stream_context(redirection: Redirection, old: Any) -> Function:
    """No node is annotated with a stream: the compilers' code for streams is for devices that have some."""

    @wraps(old)
    def init(self: Any, stream: Any, **kwargs: Any) -> None:
        old(self, stream, **kwargs)
        if _redirect.in_force is redirection:
            held = "annotation" if hasattr(self, "annotation") else "target_values"  # torch 2.15's name, and the one before
            setattr(self, held, getattr(self, held) and {})

    return init


def _ordering(redirection: Redirection, old: Any) -> Function:
    """Calls that only keep order are left out of a graph: work is done in the order in which it is asked for."""

    @wraps(old)
    def call_method(self: Any, tx: Any, name: str, args: Any, kwargs: Any) -> Any:
        if name in ("wait", "wait_event", "wait_stream", "synchronize") and _redirect.in_force is redirection:
            return sys.modules[STREAMS].ConstantVariable.create(None)
        return old(self, tx, name, args, kwargs)

    return call_method


def _building(redirection: Redirection, name: str, old: Function) -> Function:
    """What a graph makes is a stand-in, as it is for the program."""

    @_disable_dynamo  # compiled code calls it
    def build(args: Any, kwargs: Any) -> Any:
        return getattr(torch, name)(*args, **kwargs)

    return build
