"""Puts the bounded compile in the place of ``torch.compile``, for programs that know nothing of torchspan."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torchspan.environment.patch import Replacement
from torchspan.jobs.budget import Budget
from torchspan.regions.entry_point import set_torch_compile
from torchspan.strategies._compile import compile_bounded
from torchspan.strategies._plan import Verify


def torch_compile_patch(
    *, budget: Budget | None = None, strategy: str = "auto", wait: bool = False, verify: Verify = "first"
) -> Replacement:
    """The patch under which ``torch.compile`` is bounded: as a call and as a decorator, with all its arguments.

    torch's own uses stay what they are, but for ``Module.compile``, which is a program's.
    """

    def build(original: Callable[..., Any]) -> Callable[..., Any]:
        set_torch_compile(original)

        @functools.wraps(original)
        def compile(model: Callable[..., Any] | None = None, **arguments: Any) -> Any:
            if _is_torch(sys._getframe(1).f_globals.get("__name__", "")) or arguments.get("disable"):
                return original(model, **arguments)
            arguments.pop("disable", None)
            if arguments.get("backend", "") is None:  # newer torch: its default
                del arguments["backend"]

            def bounded(program: Callable[..., Any]) -> Callable[..., Any]:
                return compile_bounded(program, budget=budget, strategy=strategy, wait=wait, verify=verify, **arguments)

            return bounded if model is None else bounded(model)

        return compile

    return Replacement("bounded_compile", "torch", "compile", build)


def _is_torch(caller: str) -> bool:
    return caller.split(".")[0] == "torch" and caller != "torch.nn.modules.module"
