"""Profilers and markers: CUDA's activities are left out, NVTX ranges are accepted."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Replacement

WHY = "nothing runs on a CUDA device"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """torch's two profilers, ``torch.cuda.nvtx`` and ``torch.cuda.profiler``."""
    for name in ("_KinetoProfile", "profile"):
        yield Replacement("profiling", "torch.profiler.profiler", f"{name}.__init__", partial(_profile, redirection))
    yield Replacement("profiling", "torch.autograd.profiler", "profile.__init__", partial(_old_profile, redirection))
    yield Replacement("profiling", "torch.autograd.profiler", "emit_nvtx.__init__", partial(_emit, redirection))
    yield from stand_ins("profiling", "torch.cuda.nvtx", _markers())
    yield from stand_ins("profiling", "torch.cuda.profiler", {"start": _nothing, "stop": _nothing, "init": _nothing})


def _profile(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        activities = kwargs.get("activities")
        if activities is not None:
            kept = [activity for activity in activities if activity.name not in ("CUDA", "XPU", "MTIA")]
            if len(kept) < len(list(activities)):
                redirection.leave_out("ProfilerActivity.CUDA", "left out", WHY)
                kwargs["activities"] = kept or None
        old(self, *args, **kwargs)

    return init


def _old_profile(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if kwargs.pop("use_cuda", False):
            redirection.leave_out("torch.autograd.profiler.profile(use_cuda=True)", "left out", WHY)
        if kwargs.get("use_device") in redirection.kinds:
            redirection.leave_out("torch.autograd.profiler.profile(use_device)", "left out", WHY, asked=kwargs["use_device"])
            kwargs["use_device"] = None
        old(self, *args, **kwargs)

    return init


def _emit(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, enabled: bool = True, *args: Any, **kwargs: Any) -> None:
        redirection.leave_out("torch.autograd.profiler.emit_nvtx", "left out", WHY)
        old(self, False, *args, **kwargs)

    return init


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _markers() -> dict[str, Function]:
    depth = [0]
    numbers = itertools.count(1)

    def range_push(msg: str) -> int:
        depth[0] += 1
        return depth[0] - 1

    def range_pop() -> int:
        depth[0] = max(0, depth[0] - 1)
        return depth[0]

    def range_start(msg: str) -> int:
        return next(numbers)

    return {
        "range_push": range_push,
        "range_pop": range_pop,
        "range_start": range_start,
        "range_end": _nothing,
        "mark": _nothing,
    }
