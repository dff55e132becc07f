"""``mark_unbacked(…, min=, max=, shape_id=, hint_override=)`` and ``override_optimization_hint``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport
from torchspan.core.errors import UnsupportedError
from torchspan.core.report import current_report, user_site

_INSTEAD = {
    "min": "write torch._check(x.size(dim) >= min) into the compiled function",
    "max": "write torch._check(x.size(dim) <= max) into the compiled function",
    "shape_id": "write torch._check(x.size(0) == y.size(0)) into the compiled function",
}
_SINCE = {"min": "2.12.0", "max": "2.12.0", "shape_id": "2.11.0", "hint_override": "2.10.0"}


def _taking_bounds(mark_unbacked: Callable[..., None]) -> Callable[..., None]:
    """mark_unbacked, whose newer arguments are told apart: a hint may be left out, bounds may not."""
    own = inspect.signature(mark_unbacked).parameters

    @functools.wraps(mark_unbacked)
    def mark(
        t: Any,
        index: Any,
        hint_override: int | None = None,
        strict: bool = False,
        specialize_on: list[Any] | None = None,
        shape_id: str | None = None,
        min: int | None = None,
        max: int | None = None,
    ) -> None:
        options = {"hint_override": hint_override, "shape_id": shape_id, "min": min, "max": max}
        own_options = {name: value for name, value in options.items() if name in own}
        for name, value in options.items():
            if value is not None and name not in own:
                _refuse(name, value)
        mark_unbacked(t, index, strict=strict, specialize_on=specialize_on, **own_options)

    return mark


def _refuse(name: str, value: object) -> None:
    if name == "hint_override":
        _left_out(f"mark_unbacked(hint_override={value})")
        return
    raise UnsupportedError(
        f"mark_unbacked({name}={value!r}): this torch has nothing that would check it when the compiled function runs; "
        f"torch has it since {_SINCE[name]}; {_INSTEAD[name]}"
    )


def _left_out(subject: str) -> None:
    report = current_report()
    if report is not None:
        reason = "this torch's compiler has a size of its own for what it does not know; a hint changes no result"
        report.decide("backport", subject, "without the hint", reason, user_site())


def override_optimization_hint(x: object, val: int) -> None:
    """Say how large an unbacked size is likely to be; it changes no result, and this torch's compiler does without it.

    Args:
        x: an unbacked ``SymInt``, or an int, of which nothing is noted.
        val: the likely value.
    """
    if torch.compiler.is_dynamo_compiling() or not isinstance(x, torch.SymInt):
        return
    _left_out(f"override_optimization_hint(…, {val})")


def _lacks(module: ModuleType | None) -> bool:
    return module is None or "max" not in inspect.signature(inspect.unwrap(module.mark_unbacked)).parameters


BACKPORT = Backport(
    name="unbacked_hints",
    summary="mark_unbacked(min=, max=, shape_id=, hint_override=), override_optimization_hint",
    target="torch._dynamo.decorators",
    since="2.13.0",
    first_forms={"2.11": "takes the bounds"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_dynamo/decorators.py",
    differs="bounds and shape ids are refused with what to write instead; hints are left out, which changes no result",
    names={"override_optimization_hint": lambda: override_optimization_hint},
    elsewhere={
        "torch._dynamo": {"override_optimization_hint": lambda: override_optimization_hint},
    },
    redefines={"mark_unbacked": _taking_bounds},
    lacks=_lacks,
)
