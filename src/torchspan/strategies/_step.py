"""Profiles one eager step of a model: how long each of its parts works, and how much of that a compiler could fuse."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchspan.strategies._blocks import blocks_of, distinct, is_container, kind_name, kinds_of

# operations that a compiler hands to the library that eager uses too: they take as long when compiled
_LIBRARY = {"mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "matmul", "convolution", "_convolution"}
_LIBRARY_PREFIXES = ("_scaled_dot_product", "_flash", "_efficient", "_cudnn", "mkldnn", "miopen", "_fused", "lstm", "gru")
_HAS_THREAD_TIME = time.get_clock_info("thread_time").resolution < 1e-6


@dataclass(frozen=True)
class Cost:
    """What the equal `modules` took in one step: `calls`, and seconds in operations, of which `fusible_s` could be fused."""

    name: str
    modules: tuple[nn.Module, ...]
    calls: int
    seconds: float
    fusible_s: float


@dataclass(frozen=True)
class StepProfile:
    """One eager forward of a model: `seconds` in operations, and the Cost of each of its units."""

    seconds: float
    costs: tuple[Cost, ...]


class Profiler:
    """Profiles the second call of `model`; the first warms up what is made once."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._num_calls = 0
        self._lock = threading.Lock()

    def takes_turn(self) -> bool:
        """Whether the call that asks is the one to profile."""
        with self._lock:
            self._num_calls += 1
            return self._num_calls == 2

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, StepProfile]:
        """Call the model eagerly: what it gives, and what it took."""
        kinds = kinds_of(units_of(self._model))
        clock = _Clock(self._model)
        with ExitStack() as stack:
            for number, kind in enumerate(kinds):
                for module in kind:
                    stack.enter_context(_watched(module, number, clock))
            with clock:
                outputs = self._model(*args, **kwargs)
        names = {id(module): name for name, module in self._model.named_modules()}
        costs = tuple(
            Cost(kind_name(kind, names), tuple(kind), *clock.spent.get(number, (0, 0.0, 0.0)))
            for number, kind in enumerate(kinds)
        )
        return outputs, StepProfile(clock.seconds, costs)


def units_of(model: nn.Module) -> list[nn.Module]:
    """Parts of `model` that do not overlap: its blocks, and the outermost modules that hold none.

    >>> model = nn.Sequential(nn.Linear(4, 4), *(nn.TransformerEncoderLayer(4, 2, 8) for _ in range(2)))
    >>> [type(unit).__name__ for unit in units_of(model)]
    ['Linear', 'TransformerEncoderLayer', 'TransformerEncoderLayer']
    """
    blocks = {id(block) for block in blocks_of(model)}
    return distinct(unit for child in model.children() for unit in _units(child, blocks))


def _units(module: nn.Module, blocks: set[int]) -> Iterator[nn.Module]:
    holds_blocks = id(module) not in blocks and any(id(inner) in blocks for inner in module.modules())
    if not holds_blocks and not is_container(module):
        yield module
        return
    for child in module.children():
        yield from _units(child, blocks)


class _Clock(TorchDispatchMode):
    """Times every operation of one thread, for the unit that it is called in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.seconds = 0.0
        self.spent: dict[int, tuple[int, float, float]] = {}  # a kind's number → calls, seconds, fusible seconds
        self._thread = threading.get_ident()
        self._inside: list[int] = []
        self._has_device = any(parameter.device.type not in ("cpu", "meta") for parameter in model.parameters())
        # of a CPU, the thread's own time: what other processes take of the machine says nothing of the program
        self._now = time.perf_counter if self._has_device or not _HAS_THREAD_TIME else time.thread_time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = self._now()
        outputs = func(*args, **(kwargs or {}))
        if self._has_device:
            torch.accelerator.synchronize()
        self._add(self._now() - started, not _is_view(func) and is_fusible(func.overloadpacket.__name__))
        return outputs

    def _add(self, seconds: float, fuses: bool) -> None:
        self.seconds += seconds
        if self._inside:
            calls, total, fusible = self.spent[self._inside[0]]
            self.spent[self._inside[0]] = calls, total + seconds, fusible + (seconds if fuses else 0.0)

    def enter(self, number: int) -> None:
        """A module of this kind is called; of units that call each other, the outermost counts."""
        if threading.get_ident() == self._thread:
            self._inside.append(number)
            calls, total, fusible = self.spent.get(number, (0, 0.0, 0.0))
            self.spent[number] = calls + 1, total, fusible

    def leave(self) -> None:
        """The call of :meth:`enter` has ended."""
        if threading.get_ident() == self._thread:
            self._inside.pop()


def is_fusible(operation: str) -> bool:
    """Whether a compiler makes its own code for an operation of this name, which can be fused with what is around it.

    >>> is_fusible("gelu"), is_fusible("addmm"), is_fusible("_scaled_dot_product_flash_attention_for_cpu")
    (True, False, False)
    """
    return operation not in _LIBRARY and not operation.startswith(_LIBRARY_PREFIXES)


def _is_view(operator: Any) -> bool:
    """Whether an operator gives another look at its input, which costs nothing, compiled or not."""
    return any(argument.alias_info is not None and not argument.alias_info.is_write for argument in operator._schema.arguments)


@contextmanager
def _watched(module: nn.Module, number: int, clock: _Clock) -> Iterator[None]:
    def before(*_: Any) -> None:
        clock.enter(number)

    def after(*_: Any) -> None:
        clock.leave()

    handles: list[Any] = [
        module.register_forward_pre_hook(before, prepend=True),
        module.register_forward_hook(after, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
