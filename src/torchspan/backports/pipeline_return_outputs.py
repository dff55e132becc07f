"""``schedule.step(…, return_outputs=False)`` of pipeline schedules: the last stage's outputs are not kept."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport


def _with_return_outputs(step: Callable[..., Any]) -> Callable[..., Any]:
    """A schedule's `step`, with `return_outputs`."""

    @functools.wraps(step)
    def run(self: Any, *args: Any, return_outputs: bool = True, **kwargs: Any) -> Any:
        if return_outputs:
            return step(self, *args, **kwargs)
        BACKPORT.record_use(f"{type(self).__name__}.step(return_outputs=False)")
        with _keeping_no_outputs(self):
            step(self, *args, **kwargs)
        return None

    signature = inspect.signature(step)
    *named, rest = signature.parameters.values()  # **kwargs comes last
    added = inspect.Parameter("return_outputs", inspect.Parameter.KEYWORD_ONLY, default=True, annotation=bool)
    run.__signature__ = signature.replace(parameters=[*named, added, rest])  # type: ignore[attr-defined]
    return run


@contextmanager
def _keeping_no_outputs(schedule: Any) -> Iterator[None]:
    """Inside, what the stages of `schedule` give is forgotten as soon as its loss and the next stage have had it."""
    stages = getattr(schedule, "_stages", None) or [schedule._stage]
    before = [stage.output_chunks for stage in stages]
    for stage in stages:
        stage.output_chunks = _Forgetful()
    schedule._merge_outputs = lambda output_chunks: None
    try:
        yield
    finally:
        del schedule._merge_outputs
        for stage, chunks in zip(stages, before):
            chunks.clear()
            stage.output_chunks = chunks


class _Forgetful(list[Any]):
    def append(self, value: Any) -> None:
        """Forget the value."""


def _lacks(module: ModuleType | None) -> bool:
    if module is None:
        return True
    return "return_outputs" not in inspect.signature(inspect.unwrap(module.PipelineScheduleSingle.step)).parameters


BACKPORT = Backport(
    name="pipeline_return_outputs",
    summary="step(return_outputs=False) of pipeline schedules",
    target="torch.distributed.pipelining.schedules",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/165822",
    replaces={"PipelineScheduleSingle.step": _with_return_outputs, "PipelineScheduleMulti.step": _with_return_outputs},
    lacks=_lacks,
)
