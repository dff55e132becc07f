"""``checkpoint_wrapper(…, early_stop=…)``: whether recomputation ends as soon as all that the backward needs is there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
import torch.utils.checkpoint as torch_checkpoint

from torchspan.backports._base import Backport, Change

_overrides: list[bool] = []  # what set_checkpoint_early_stop says; it wins over the argument, as upstream


def _with_early_stop(init: Callable[..., None]) -> Callable[..., None]:
    """CheckpointWrapper's constructor, with `early_stop` for torch's own checkpoint; a user's own gets it as it is."""

    @functools.wraps(init)
    def construct(self: Any, mod: torch.nn.Module, *args: Any, **options: Any) -> None:
        arguments = inspect.signature(init).bind(self, mod, *args, **options).arguments
        if "early_stop" not in options or arguments.get("checkpoint_fn") is not None:
            init(self, mod, *args, **options)
            return
        early_stop = options.pop("early_stop")
        init(self, mod, *args, **options)
        BACKPORT.record_use(f"checkpoint_wrapper(early_stop={early_stop})")
        if self.checkpoint_impl.name == "NO_REENTRANT":  # the reentrant one never stops early, upstream ignores it too
            self.checkpoint_fn = functools.partial(_checkpoint, self.checkpoint_fn, early_stop)

    return construct


def _checkpoint(
    checkpoint: Callable[..., Any], early_stop: bool, function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call `checkpoint` so that this one frame, and none that is nested in it, has `early_stop`."""
    if torch.compiler.is_dynamo_compiling() or _overrides:  # compiled, the partitioner decides what is recomputed
        return checkpoint(function, *args, **kwargs)

    def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
        if _overrides:
            return function(*inner_args, **inner_kwargs)
        with _enabled(True):
            return function(*inner_args, **inner_kwargs)

    with _enabled(early_stop):
        return checkpoint(run, *args, **kwargs)


@contextmanager
def _enabled(early_stop: bool) -> Iterator[None]:
    before = torch_checkpoint._enable_checkpoint_early_stop
    torch_checkpoint._enable_checkpoint_early_stop = early_stop
    try:
        yield
    finally:
        torch_checkpoint._enable_checkpoint_early_stop = before


def _remembered(set_early_stop: Callable[[bool], Any]) -> Callable[[bool], Any]:
    """``set_checkpoint_early_stop``, so that one can tell ``True`` that was asked for from the default."""

    @contextmanager
    def set_checkpoint_early_stop(enable: bool) -> Iterator[None]:
        _overrides.append(enable)
        try:
            with set_early_stop(enable):
                yield
        finally:
            _overrides.pop()

    return functools.wraps(set_early_stop)(set_checkpoint_early_stop)


def _lacks(module: ModuleType | None) -> bool:
    return "early_stop" not in inspect.signature(torch_checkpoint.checkpoint).parameters


BACKPORT = Backport(
    name="checkpoint_early_stop",
    summary="checkpoint_wrapper(early_stop=…) for activation checkpointing",
    target="torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/160781",
    differs="torch.utils.checkpoint.checkpoint itself does not take the argument: dynamo knows that function by its identity",
    replaces={"CheckpointWrapper.__init__": _with_early_stop},
    also=(Change("torch.utils.checkpoint", "set_checkpoint_early_stop", _remembered),),
    lacks=_lacks,
)
