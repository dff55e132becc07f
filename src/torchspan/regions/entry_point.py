"""torch's own ``torch.compile``, and what a region gives it to compile."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_compile_holder: list[Callable[..., Any]] = []


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


@contextmanager
def breaking_at_old_collectives() -> Iterator[None]:
    """Have dynamo leave the functions of ``torch.distributed.nn.functional`` to eager, and compile what is around them.

    Newer torch (2.13) raises when it traces one of them, and then leaves the whole function that calls it to eager.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):  # then none of them can be called
        yield
        return
    from torch.distributed.nn import functional

    if not hasattr(functional, "_not_supported_under_compile"):
        yield
        return
    functions = [value for value in vars(functional).values() if isinstance(value, types.FunctionType)]
    with ExitStack() as stack:
        for function in functions:
            if function.__module__ == functional.__name__ and not hasattr(function, "_torchdynamo_disable"):
                function._torchdynamo_disable = True  # type: ignore[attr-defined]
                stack.callback(vars(function).pop, "_torchdynamo_disable", None)
        yield
