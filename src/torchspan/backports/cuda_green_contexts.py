"""``torch.cuda.green_contexts``: parts of a GPU's multiprocessors; they can be asked for here, and are refused."""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

from torchspan.backports._base import Backport, unavailable
from torchspan.core.report import current_report, user_site

_CAUSE = "this torch cannot divide a GPU's multiprocessors"
_INSTEAD = "leave it out: work runs on all multiprocessors"
_PLACE, _SINCE = "torch.cuda.green_contexts", "2.10.0"


def _refuse(name: str) -> Any:
    def refused(*args: object, **kwargs: object) -> NoReturn:
        unavailable(f"{_PLACE}.{name}", _CAUSE, _SINCE, _INSTEAD)()
        raise AssertionError(name)

    return staticmethod(refused)


def _refused_class(name: str, maker: str) -> type:
    """A class that can be imported, and whose making, by call or by `maker`, is an error that says why."""
    return type(name, (unavailable(f"{_PLACE}.{name}", _CAUSE, _SINCE, _INSTEAD),), {maker: _refuse(f"{name}.{maker}")})


GreenContext = _refused_class("GreenContext", "create")
SMPartition = _refused_class("SMPartition", "from_device")


def is_localization_supported(*args: object) -> bool:
    """Whether a GPU tells where its multiprocessors are: this torch cannot ask."""
    report = current_report()
    if report is not None:
        report.decide("backport", f"{_PLACE}.is_localization_supported", "False", _CAUSE, user_site())
    return False


BACKPORT = Backport(
    name="cuda_green_contexts",
    summary="parts of a GPU's multiprocessors: torch.cuda.green_contexts can be imported; its use is refused",
    target=_PLACE,
    since=_SINCE,
    came={
        "2.15.0": (
            "SMPartition",
            "is_localization_supported",
        )
    },
    upstream="https://github.com/pytorch/pytorch/tree/v2.10.0/torch/cuda/green_contexts.py",
    differs=f"{_CAUSE}: making one is an error that says so",
    is_module=True,
    names={
        "GreenContext": lambda: GreenContext,
        "SMPartition": lambda: SMPartition,
        "is_localization_supported": lambda: is_localization_supported,
    },
    elsewhere={
        "torch.cuda": {
            "green_contexts": lambda: importlib.import_module("torch.cuda.green_contexts"),
            "GreenContext": lambda: GreenContext,
        }
    },
)
