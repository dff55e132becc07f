"""torch's compilers keep tables of torch's functions by identity: they go on finding torch's own functions in them.

dynamo reads our wrappers as the plain Python that they are, so no graph breaks; TorchScript takes the function that is wrapped.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

from torchspan.devices import _redirect
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition, Replacement

# Names of private modules as text: they are patched when they are imported, never imported from here.
RULES = "torch._dynamo.trace_rules"
VARIABLES = "torch._dynamo.variables.torch"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The tables of dynamo and of TorchScript."""
    yield Redefinition("compilation", RULES, "load_object", partial(_unwrapping, redirection))
    yield Replacement("compilation", RULES, "get_tensor_method", partial(_methods, redirection))
    handlers = partial(_handlers, redirection)
    yield Replacement("compilation", VARIABLES, "TorchInGraphFunctionVariable._get_handlers", handlers)
    yield Replacement("compilation", VARIABLES, "BaseTorchVariable.__init__", partial(_variable, redirection))
    yield Replacement("compilation", VARIABLES, "get_overridable_functions", partial(_functions, redirection))
    yield Replacement("compilation", "torch._dynamo.comptime", "comptime", _remember)
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

    def _torch_methods(found: frozenset[Any], originals: tuple[Any, ...]) -> frozenset[Any]:
        if id(found) not in cache:
            cache[id(found)] = found | {value for value in originals if type(value).__name__ == "method_descriptor"}
        return cache[id(found)]

    get_tensor_method.cache_clear = old.cache_clear  # type: ignore[attr-defined]
    return get_tensor_method


def _handlers(redirection: Redirection, old: Any) -> Any:
    function = old.__func__ if isinstance(old, staticmethod) else old
    cache: dict[int, dict[Any, Any]] = {}

    def _get_handlers() -> dict[Any, Any]:
        found = function()
        if id(found) not in cache:
            cache[id(found)] = {_original(redirection, key): value for key, value in found.items()}
        return cache[id(found)]

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
