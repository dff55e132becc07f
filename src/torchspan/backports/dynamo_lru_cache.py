"""``torch._C._dynamo.eval_frame._set_lru_cache``: it can be called, and says what this torch does."""

from __future__ import annotations

from types import ModuleType

from torchspan.backports._base import Backport, Change
from torchspan.core.report import current_report, user_site

_NAME = "_set_lru_cache"


def _set_lru_cache(enabled: bool) -> bool:
    """Ask that dynamo looks first at the compiled code that was used last (True), or keeps one order (False).

    This torch always does the first. Asked for the other, a Decision says so: which of several versions of a function runs
    when more than one fits its arguments then depends on the calls before. Returns what held before, which is True.
    """
    report = current_report()
    if not enabled and report is not None:
        cause = "this torch moves the compiled code that it used to the front, and has no switch for that; torch 2.10 has"
        report.decide("backport", f"{_NAME}(False)", "the order of compiled code still follows its use", cause, user_site())
    return True


def _lacks(module: ModuleType | None) -> bool:
    return module is None or vars(module._dynamo.eval_frame).get(_NAME, _set_lru_cache) is _set_lru_cache


BACKPORT = Backport(
    name="dynamo_lru_cache",
    summary="the switch for the order in which dynamo tries its compiled code can be called: _set_lru_cache",
    target="torch._C",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/167038",
    differs="the order is always that of use; a Decision says so where a program asks for the other",
    also=(Change("torch._C", f"_dynamo.eval_frame.{_NAME}", lambda old: old or _set_lru_cache, create=True),),
    lacks=_lacks,
)
