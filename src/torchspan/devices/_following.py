"""Every operator is followed: its result lies where CUDA would put it, and what CUDA refuses is refused (``cuda-semantics``).

A mode of torch's dispatcher sees each operator of the thread that it is entered in, those of backward too, below autograd.
Tensors stay what they are, on the CPU; the mark on the storage says which memory they would lie in (see ``_memories``).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode

from torchspan.core.topics import Standing
from torchspan.devices import _redirect
from torchspan.devices._cuda_checks import OF_MANY, Judge, Operand, judge_of
from torchspan.devices._memories import DEVICE, NO_STORAGE, PLAIN, UNKNOWN, Memory, memory_of, storage_of
from torchspan.devices._redirect import Redirection

_LISTS = (list, tuple)
_TENSOR = torch.Tensor
_drawing = threading.RLock()


class _Making(threading.local):
    memory: Memory | None = None


_making = _Making()


@dataclass(frozen=True)
class Rule:
    """What is known of one operator; `judge` is asked only where its tensors lie in both memories, or always if `is_strict`."""

    name: str
    arguments: tuple[tuple[str, bool], ...] = ()
    judge: Judge | None = None
    is_factory: bool = False
    is_drawing: bool = False
    is_of_many: bool = False
    is_strict: bool = False
    is_copy: bool = False


def rule_of(operator: Any) -> Rule:
    """The rule of an operator, read off its schema; nothing is checked of what is not torch's own."""
    schema = getattr(operator, "_schema", None)
    if schema is None:
        return Rule(str(operator))
    name = schema.name.partition("::")[2]
    is_own = schema.name.startswith("aten::")
    arguments = tuple(
        (argument.name, bool(argument.alias_info and argument.alias_info.is_write)) for argument in schema.arguments
    )
    return Rule(
        name=schema.name,
        arguments=arguments,
        judge=judge_of(name, schema.overload_name) if is_own else None,
        is_factory=any(argument == "device" for argument, _ in arguments) and name != "_to_copy",
        is_drawing=torch.Tag.nondeterministic_seeded in operator.tags,
        is_of_many=name.startswith(OF_MANY),
        is_strict=name == "_pack_padded_sequence",
        is_copy=name in ("copy_", "_foreach_copy_"),
    )


class Following(TorchDispatchMode):
    """The mode, for one thread."""

    supports_higher_order_operators = True

    def __init__(self, redirection: Redirection) -> None:
        super().__init__()
        self._redirection = redirection
        self._rules: dict[Any, Rule] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _redirect.in_force is not self._redirection:
            return func(*args, **kwargs)
        rule = self._rules.get(func)
        if rule is None:
            rule = self._rules[func] = rule_of(func)
        memory = self._memory(rule, args, kwargs)
        result = self._drawn(rule, memory, func, args, kwargs) if rule.is_drawing else func(*args, **kwargs)
        if memory is not UNKNOWN:
            _settle(result, memory)
        return result

    def _memory(self, rule: Rule, args: Any, kwargs: Any) -> Memory | list[Memory]:
        """Where the result lies; for an operator of many, a list of it where they differ."""
        if rule.is_factory and _making.memory is not None:
            return _making.memory
        if rule.is_copy:  # between memories, too: what is copied says nothing of where it goes
            return list(map(memory_of, args[0])) if rule.is_of_many else memory_of(args[0])
        memory = _common((*args, *kwargs.values()) if kwargs else args)
        if memory is None:
            return self._judged(rule, args, kwargs)
        if rule.is_strict:
            self._judged(rule, args, kwargs)
        return memory

    def _judged(self, rule: Rule, args: Any, kwargs: Any) -> Memory | list[Memory]:
        if rule.judge is None:
            return UNKNOWN
        try:
            if rule.is_of_many:
                return [_judged_one(rule.judge, group) for group in _groups(rule, args)]
            return rule.judge(list(_operands(rule, args, kwargs)))
        except RuntimeError as refusal:
            self._refused(rule.name, refusal)
            raise

    def _refused(self, name: str, refusal: RuntimeError) -> None:
        self._redirection.note(name, None, str(refusal), "an error, as on CUDA", Standing.UNSUPPORTED)

    def _drawn(self, rule: Rule, memory: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """The result of an operator that draws random numbers: on the device, from the device's generator."""
        generator = next((value for value in (*args, *kwargs.values()) if isinstance(value, torch._C.Generator)), None)
        if generator is None:
            if memory is not DEVICE:
                return func(*args, **kwargs)
            with drawing_on_device(self._redirection.generator):
                return func(*args, **kwargs)
        expected, actual = ("cuda", "cpu") if memory is DEVICE else ("cpu", "cuda")
        if memory is not UNKNOWN and self._redirection.is_placed(generator) == (actual == "cuda"):
            refusal = RuntimeError(f"Expected a '{expected}' device type for generator but found '{actual}'")
            self._refused(rule.name, refusal)
            raise refusal
        return func(*args, **kwargs)


# tensors


def _common(values: Iterable[Any]) -> Memory | None:
    """The memory in which all tensors among `values` lie, as far as it is known; None where they lie in both."""
    memory = UNKNOWN
    for value in values:
        if isinstance(value, _TENSOR):
            other: Memory | None = memory_of(value)
        elif type(value) in _LISTS:
            other = _common(value)
        else:
            continue
        if other is memory or other is UNKNOWN:
            continue
        if other is None or memory is not UNKNOWN:
            return None
        memory = other
    return memory


def _operands(rule: Rule, args: Any, kwargs: Any) -> Iterator[Operand]:
    """What the operator writes to, then what it reads, as torch's kernels check them."""
    positional = [(name, is_written, value) for (name, is_written), value in zip(rule.arguments, args)]
    named = [(name, is_written, kwargs[name]) for name, is_written in rule.arguments if name in kwargs]
    for name, is_written, value in [
        *(entry for entry in named if entry[1]),
        *positional,
        *(entry for entry in named if not entry[1]),
    ]:
        for tensor in _tensors(value):
            yield Operand(name, tensor, memory_of(tensor), is_written)


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, _TENSOR):
        yield value
    elif type(value) in _LISTS:
        for element in value:
            yield from _tensors(element)


def _groups(rule: Rule, args: Any) -> Iterator[list[Operand]]:
    """The operands of an operator on lists, for each tensor of the first list."""
    for position in range(len(args[0])):
        pairs = zip(rule.arguments, args)
        values = [(name, w, value[position] if type(value) in _LISTS else value) for (name, w), value in pairs]
        yield [Operand(name, element, memory_of(element), w) for name, w, element in values if isinstance(element, _TENSOR)]


def _judged_one(judge: Judge, group: Sequence[Operand]) -> Memory:
    """The memory of the result for one tensor of a list."""
    memories = {operand.memory for operand in group} - {UNKNOWN}
    return judge(group) if len(memories) > 1 else next(iter(memories), UNKNOWN)


def _settle(result: Any, memory: Memory | list[Memory]) -> None:
    """Mark what was computed, where it carries no mark yet."""
    if isinstance(result, _TENSOR):
        if type(result) in PLAIN and memory_of(result) is UNKNOWN:
            _mark(result, memory)
    elif type(result) in _LISTS:
        for element, where in zip(result, memory if isinstance(memory, list) else [memory] * len(result)):
            _settle(element, where)


def _mark(tensor: Any, memory: Any) -> None:
    try:
        storage_of(tensor)._torchspan_memory = memory
    except NO_STORAGE:  # of what is sparse
        tensor._torchspan_memory = memory


# what is made, and drawn


@contextmanager
def _made_in(memory: Memory | None) -> Iterator[None]:
    before, _making.memory = _making.memory, memory
    try:
        yield
    finally:
        _making.memory = before


def making(redirection: Redirection, factory: Callable[..., Any], is_beside: bool) -> Callable[..., Any]:
    """`factory`, whose result lies where the program asks for it; without a device, beside its argument if `is_beside`."""

    @wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if _redirect.in_force is not redirection or torch.compiler.is_compiling():
            return factory(*args, **kwargs)
        if device is None and is_beside and args and isinstance(args[0], _TENSOR):
            return factory(*args, **kwargs)
        memory = redirection.default_memory() if device is None else redirection.memory_asked(device)
        with _made_in(memory):
            return factory(*args, **kwargs)

    return made


@contextmanager
def drawing_on_device(generator: torch.Generator) -> Iterator[None]:
    """Inside, what is drawn from torch's default generator comes from `generator`."""
    default = torch.default_generator
    with _drawing:
        before = default.get_state()
        default.set_state(generator.get_state())
        try:
            yield
        finally:
            generator.set_state(default.get_state())
            default.set_state(before)


# where it is in force


def begin(redirection: Redirection) -> Callable[[], None]:
    """Follow the operators of this thread from now on; returns what ends it."""
    redirection.begin_use()
    mode = Following(redirection)
    mode.__enter__()

    def end() -> None:
        if _get_current_dispatch_mode() is mode:  # another thread's is left alone, which follows nothing any more
            mode.__exit__(None, None, None)

    return end


def in_new_threads(redirection: Redirection, old: Callable[..., Any]) -> Callable[..., Any]:
    """``threading.Thread.start``, of a thread whose operators are followed as well."""

    @wraps(old)
    def start(self: Any) -> Any:
        run = self.run

        def following() -> None:
            with Following(redirection):
                run()

        self.run = following
        return old(self)

    return start
