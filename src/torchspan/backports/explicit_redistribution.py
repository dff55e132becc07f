"""``ExplicitRedistributionContext``: inside, a DTensor that would be redistributed unasked is an error, or a warning."""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torchspan.backports._base import Backport, Change

_PLACE = "torch.distributed.tensor._utils"

log = logging.getLogger("torchspan")


class ExplicitRedistributionContext:
    """Inside, an operator whose DTensors would have to be redistributed raises RuntimeError: call ``redistribute()`` before.

    Args:
        enable: False switches it off, inside of another.
        strict: whether redistributions without communication count too.
        mode: "raise", or "warn" to log a warning instead.
    """

    _local = threading.local()

    def __init__(self, enable: bool = True, strict: bool = False, mode: str = "raise") -> None:
        if mode not in ("raise", "warn"):
            raise RuntimeError(f"Invalid mode {mode}; expected 'raise' or 'warn'")
        self._enable, self._strict, self._raises = enable, strict, mode == "raise"

    @classmethod
    def observe_redistribution(cls, src_spec: Any, dst_spec: Any, redistribution_msg: object) -> None:
        """Raise or log, if one is in force that does not allow to get from one spec to the other."""
        from torch.distributed.tensor._collective_utils import redistribute_cost

        active: ExplicitRedistributionContext | None = getattr(cls._local, "active", None)
        if active is None or not active._enable:
            return
        if not active._strict and redistribute_cost(src_spec, dst_spec) <= 0:
            return
        if active._raises:
            raise RuntimeError(str(redistribution_msg))
        log.warning("%s", redistribution_msg)

    def __enter__(self) -> ExplicitRedistributionContext:
        self._before = getattr(self._local, "active", None)
        self._local.active = self
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._local.active = self._before


ExplicitRedistributionContext.__module__ = _PLACE


def _observing(redistribute: staticmethod[..., None] | Callable[..., Any]) -> Any:
    """OpDispatcher's redistribution of an operator's arguments, which looks at each of them first."""
    function = redistribute.__func__ if isinstance(redistribute, staticmethod) else redistribute

    @functools.wraps(function)
    def redistribute_local_args(op_info: Any, suggested_input_schema: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(ExplicitRedistributionContext._local, "active", None) is not None:
            _observe(op_info, suggested_input_schema)
        return function(op_info, suggested_input_schema, *args, **kwargs)

    return staticmethod(redistribute_local_args)


def _observe(op_info: Any, schema: Any) -> None:
    from torch.distributed.tensor._dtensor_spec import DTensorSpec
    from torch.utils import _pytree as pytree

    targets = pytree.tree_leaves(schema.args_schema) if op_info.args_tree_spec is not None else schema.args_schema
    for source, target in zip(op_info.flat_args_schema, targets):
        if isinstance(source, DTensorSpec) and source.placements != target.placements:
            message = (
                f"Implicit redistribution occurred for {op_info.schema} while ExplicitRedistributionContext was active: "
                f"{source.placements} to {target.placements}"
            )
            ExplicitRedistributionContext.observe_redistribution(source, target, message)


BACKPORT = Backport(
    name="explicit_redistribution",
    summary="DTensors that are redistributed unasked are an error: ExplicitRedistributionContext",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/tensor/_utils.py",
    differs="the text of the error says the placements too",
    names={"ExplicitRedistributionContext": lambda: ExplicitRedistributionContext},
    also=(Change("torch.distributed.tensor._dispatch", "OpDispatcher.redistribute_local_args", _observing),),
)
