"""``torch.distributed.config``: options of torch.distributed; what this torch lacks cannot be turned on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport, has_module
from torchspan.core.errors import UnsupportedError

_PLACE = "torch.distributed.config"
_CAUSES = {
    "compile_on_one_rank": "a graph of this torch has its own rank's numbers in it",
    "use_torchcomms": "this torch's process groups know no TorchComms",
    "pipeline_per_edge_p2p": "this torch's pipelines send and receive on the group of all their ranks",
}


class _Options(ModuleType):
    """The module: each option is False, and to turn one on is an error."""

    pipeline_per_edge_p2p = False  # since 2.15

    def __setattr__(self, name: str, value: object) -> None:
        if name in _CAUSES and value:
            raise UnsupportedError(f"{_PLACE}.{name} = {value!r}: {_CAUSES[name]}; {BACKPORT.reason}; leave it False")
        super().__setattr__(name, value)


@contextmanager
def patch(arg1: Any = None, arg2: Any = None, **changes: Any) -> Iterator[None]:
    """Inside, options have other values; raises UnsupportedError for one that cannot be turned on here.

    Takes a name and a value, a dict of them, or keywords.
    """
    values = {arg1: arg2} if isinstance(arg1, str) else {**(arg1 or {}), **changes}
    options = _module()
    before = {name: getattr(options, name) for name in values}  # an AttributeError names what is no option
    try:
        for name, value in values.items():
            setattr(options, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(options, name, value)


def _module() -> Any:
    import importlib

    return importlib.import_module(_PLACE)


class _Configuration(Backport):
    """The module has the class that refuses, from when it is first imported."""

    def _build_module(self, module: str = "") -> dict[str, object]:
        return {"__class__": _Options, **super()._build_module(module)}


def _lacks(module: ModuleType | None) -> bool:
    return not has_module(_PLACE)


BACKPORT = _Configuration(
    name="distributed_config",
    summary="options of torch.distributed, as a module: torch.distributed.config",
    target=_PLACE,
    since="2.11.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/config.py",
    differs="every option is False, and to turn one on is an error",
    is_module=True,
    names={
        "compile_on_one_rank": lambda: False,
        "use_torchcomms": lambda: False,
        "patch": lambda: patch,
    },
    lacks=_lacks,
)
