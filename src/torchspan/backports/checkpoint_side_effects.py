"""``torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint``: the option, and what old torch makes of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports import _options
from torchspan.backports._base import Backport, Change
from torchspan.core.report import current_report, user_site
from torchspan.private import dynamo

_PLACE = "torch._dynamo.config"
_OPTION = "skip_fwd_side_effects_in_bwd_under_checkpoint"


def _reporting(trace: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's tracing of a checkpointed function, which this torch ends where it changes what is outside of it."""

    @functools.wraps(trace)
    def call_function(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return trace(self, *args, **kwargs)
        except dynamo.Unsupported as cause:
            if getattr(dynamo.config, _OPTION) and "SideEffects" in str(cause):
                _report_that_it_runs_eagerly()
            raise

    return call_function


def _report_that_it_runs_eagerly() -> None:
    report = current_report()
    if report is not None:
        reason = f"this torch compiles none that changes what is outside of it; {BACKPORT.reason}"
        report.decide("backport", f"{_PLACE}.{_OPTION}", "the checkpointed function runs eagerly", reason, user_site())


def _lacks(module: ModuleType | None) -> bool:
    return module is None or not _options.has_native_option(module, _OPTION)


BACKPORT = Backport(
    name="checkpoint_side_effects",
    summary=f"compiled checkpoints of functions that change what is outside of them: the option {_OPTION}",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/169132",
    differs=(
        "such a function is not compiled but runs eagerly, where its effects are repeated in the backward pass; the report "
        "says so; with fullgraph=True it is dynamo's own error"
    ),
    replaces={"_config": _options.with_options({_OPTION: False}, left_out_by=None)},
    also=(Change("torch._dynamo.variables.higher_order_ops", "CheckpointHigherOrderVariable.call_function", _reporting),),
    lacks=_lacks,
)
