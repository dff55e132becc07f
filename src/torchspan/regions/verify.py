"""Checks compiled code against eager on copies: the program's state, gradients and random numbers stay untouched.

The copies share the parameters (which are only read) and own everything else: buffers, inputs, Python attributes.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from torchspan.core.errors import CompileError, GuardError
from torchspan.core.numerics import as_real, difference, is_below, rounding_limit, tensors
from torchspan.regions.ambient import autocast_state
from torchspan.regions.call import original
from torchspan.regions.outside import effects_of_hooks, undone
from torchspan.regions.signature import tensors_of

Call = Callable[..., Any]


@dataclass(frozen=True)
class Copied:
    """A copy of a call's target and arguments, which can be run without side effects on the program."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def inputs(self) -> list[torch.Tensor]:
        """The tensors among the arguments, and those that they hold."""
        return tensors_of(self.args, self.kwargs)

    def modules(self) -> list[torch.nn.Module]:
        """The modules that the call uses: its target, and those among its arguments."""
        return _modules((self.target, *self.args, *self.kwargs.values()))


class CannotCopyError(CompileError):
    """The program holds something that cannot be copied, so that no copy of it can be run for a check."""


class WouldBeNoticedError(CompileError):
    """A run of the program for a check would have effects outside of it."""


class EagerRaisesError(CompileError):
    """Eager raises with these arguments, so there is nothing to compare with."""


def copied(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Copied:
    """A copy of a call that shares parameters with it and nothing else; raises CannotCopyError."""
    memo: dict[int, Any] = {}
    for module in _modules((target, *args, *kwargs.values())):
        memo.update({id(parameter): _without_hooks(parameter) for parameter in module.parameters()})
        memo.update({id(buffer): _copy_tensor(buffer) for buffer in module.buffers()})
    target = original(target)
    for tensor in tensors_of(args, kwargs):
        memo.setdefault(id(tensor), _copy_tensor(tensor))
    try:
        return Copied(*copy.deepcopy((target, args, dict(kwargs)), memo))
    except Exception as cause:  # whatever a user's own __deepcopy__ or __reduce__ raises
        raise CannotCopyError(f"the program cannot be copied: {type(cause).__name__}: {cause}") from cause


def _modules(values: Sequence[Any]) -> list[torch.nn.Module]:
    owners = (getattr(value, "__self__", value) for value in values)
    return [owner for owner in owners if isinstance(owner, torch.nn.Module)]


def _without_hooks(parameter: torch.nn.Parameter) -> torch.nn.Parameter:
    """Another parameter of the same memory, whose gradients the hooks of this one do not see."""
    if type(parameter) is not torch.nn.Parameter or not parameter._backward_hooks:
        return parameter
    alias = torch.nn.Parameter(parameter.detach(), parameter.requires_grad)
    vars(alias).update(vars(parameter))
    return alias


def _copy_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A leaf with the same values, strides and ``requires_grad``."""
    if type(tensor) is torch.nn.Parameter:
        return tensor
    source = tensor.detach()
    is_expanded = any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    if is_expanded:  # nothing can write into it in place, so it can be shared
        return source.requires_grad_(tensor.requires_grad)
    with torch.no_grad():
        own = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device).copy_(source)
    return own.requires_grad_(tensor.requires_grad)


def mismatch(
    eager: Call,
    compiled: Call,
    call: tuple[Any, tuple[Any, ...], Mapping[str, Any]],
    *,
    is_random: bool,
    is_apart: bool = False,
) -> str | None:
    """What `compiled` gives that `eager` does not, for one call: outputs, gradients, buffers; None if they agree.

    With `is_random` the two are known to draw different random numbers: if the program draws any, only the shapes of the
    results are compared. What `compiled` raises is a mismatch. In a process of its own (`is_apart`) hooks may be called.

    Raises:
        EagerRaisesError: eager raises, so there is nothing to compare with.
        CannotCopyError: the call cannot be copied.
        WouldBeNoticedError: the program has hooks of its own, which a check would call.
        GuardError: `compiled` refuses the call.
    """
    target = original(call[0])
    if not is_apart:
        _check_hooks(_modules((target, *call[1], *call[2].values())))
    with undone(_functions(target)):
        return _mismatch(eager, compiled, (target, *call[1:]), is_random=is_random, is_apart=is_apart)


def _check_hooks(modules: list[torch.nn.Module]) -> None:
    noticed = effects_of_hooks(modules)
    if noticed is not None:
        raise WouldBeNoticedError(noticed)


def _mismatch(
    eager: Call,
    compiled: Call,
    call: tuple[Any, tuple[Any, ...], Mapping[str, Any]],
    *,
    is_random: bool,
    is_apart: bool,
) -> str | None:
    def copy_of_call() -> Copied:
        """A copy, checked for hooks again: another thread may have added one since the first check."""
        own = copied(*call)
        if not is_apart:
            _check_hooks(own.modules())
        return own

    first = copy_of_call()
    with preserved_random(), _without_saving_hooks():
        before = random_state()
        try:
            expected, expected_gradients = _run(eager, first)
        except Exception as cause:  # the program's own
            raise EagerRaisesError(f"the program raises {type(cause).__name__}: {cause}") from cause
        is_drawn = _differ(before, random_state())
        set_random_state(before)
        second, through = copy_of_call(), _dtypes(first)
        gradients = _Gradients(expected_gradients, through)
        try:
            actual, _ = _run(compiled, second, gradients)
        except GuardError:
            raise
        except Exception as cause:  # noqa: BLE001 - a foreign compiler's code
            return f"it raises {type(cause).__name__}: {cause}"
    if is_random and is_drawn:
        return difference(_shapes(actual), _shapes(expected))
    return (
        difference(actual, expected, *through)
        or difference(_held(actual), _held(expected), *through, name="in the output")
        or difference(second.inputs(), first.inputs(), *through, name="argument")
        or gradients.difference()
        or difference(_buffers(second), _buffers(first), *through, name="buffer")
    )


class _Gradients:
    """Eager's gradients: each is compared as soon as the compiled one is there, then freed; never are there two full sets."""

    def __init__(self, expected: list[torch.Tensor | None], through: set[torch.dtype]) -> None:
        self._expected: dict[int, torch.Tensor | None] = dict(enumerate(expected))
        self._limit = rounding_limit(expected, *through)
        self._through = through
        self._wrong: dict[int, str | None] = {}
        expected.clear()

    def take(self, number: int, actual: torch.Tensor) -> torch.Tensor:
        """Compare one gradient; gives a placeholder for it that takes no memory."""
        self._compare(number, actual)
        return actual.new_zeros(()).expand_as(actual) if actual.layout is torch.strided else actual

    def _compare(self, number: int, actual: torch.Tensor | None) -> None:
        expected = self._expected.pop(number, None)
        if not (is_below(expected, self._limit) and is_below(actual, self._limit)):
            self._wrong[number] = difference(actual, expected, *self._through, name=f"gradient[{number}]")

    def difference(self) -> str | None:
        """How the first gradient differs; one that compiled code has not computed counts as None."""
        for number in tuple(self._expected):
            self._compare(number, None)
        return next((self._wrong[number] for number in sorted(self._wrong) if self._wrong[number]), None)


def _run(function: Call, call: Copied, compared: _Gradients | None = None) -> tuple[Any, list[torch.Tensor | None]]:
    outputs = function(call.target, *call.args, **call.kwargs)
    differentiable = [output for output in tensors(outputs) if output.requires_grad and output.grad_fn is not None]
    sources: list[torch.Tensor] = [p for module in call.modules() for p in module.parameters() if p.requires_grad]
    sources += [tensor for tensor in call.inputs() if tensor.requires_grad and tensor.is_leaf]
    if not (differentiable and sources):
        return outputs, []
    # one scalar, not outputs with cotangents: for those torch imports sympy, which takes seconds of a step
    total = torch.stack([as_real(output * _cotangent(output)).sum().double().cpu() for output in differentiable]).sum()
    sources = _unique(sources)
    with _comparing(sources, compared):
        return outputs, list(torch.autograd.grad(total, sources, allow_unused=True))


@contextmanager
def _comparing(sources: list[torch.Tensor], compared: _Gradients | None) -> Iterator[None]:
    """Have the gradient of each source compared as soon as autograd has it."""
    numbered = enumerate(sources) if compared is not None else ()
    handles = [source.register_hook(partial(compared.take, number)) for number, source in numbered]  # type: ignore[union-attr]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _functions(target: Any) -> list[Call]:
    """The functions of the program's own that a call of it runs, as far as its modules name them."""
    own = [type(inner).forward for module in _modules((target,)) for inner in module.modules()]
    return [target, *{id(function): function for function in own if not str(function.__module__).startswith("torch.")}.values()]


@contextmanager
def _without_saving_hooks() -> Iterator[None]:
    """Set aside the hooks on what autograd saves: activation checkpointing counts what passes through its own."""
    aside = []
    while (hooks := torch._C._autograd._top_saved_tensors_default_hooks(True)) is not None:
        aside.append(hooks)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(aside):
            torch._C._autograd._push_saved_tensors_default_hooks(pack, unpack)


def _unique(values: list[torch.Tensor]) -> list[torch.Tensor]:
    return list({id(value): value for value in values}.values())


def _cotangent(output: torch.Tensor) -> torch.Tensor:
    """Fixed numbers of the output's shape, drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(0)
    real = torch.rand(output.shape, generator=generator, dtype=torch.float32) + 0.5
    return real.to(device=output.device, dtype=output.dtype)


def _buffers(call: Copied) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": value for i, module in enumerate(call.modules()) for name, value in module.named_buffers()}


def _dtypes(call: Copied) -> set[torch.dtype]:
    dtypes = {tensor.dtype for tensor in call.inputs()} | {dtype for _, dtype, _ in autocast_state()}
    return dtypes | {p.dtype for module in call.modules() for p in module.parameters()}


def _held(outputs: Any) -> list[torch.Tensor]:
    """The tensors of the outputs, those in objects such as caches included."""
    return tensors_of((outputs,), {})


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape) for tensor in tensors(value)]


# random numbers


def random_state() -> tuple[Any, ...]:
    """The state of every generator that a program draws from: torch's (each device), Python's, numpy's."""
    devices = [torch.cuda.get_rng_state_all()] if torch.cuda.is_initialized() else []
    numpy = [sys.modules["numpy"].random.get_state()] if "numpy" in sys.modules else []
    return torch.get_rng_state(), devices, random.getstate(), numpy


def set_random_state(state: tuple[Any, ...]) -> None:
    """Put the generators back."""
    cpu, devices, python, numpy = state
    torch.set_rng_state(cpu)
    for states in devices:
        torch.cuda.set_rng_state_all(states)
    random.setstate(python)
    for numpy_state in numpy:
        sys.modules["numpy"].random.set_state(numpy_state)


def _differ(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    on_device = zip((s for states in before[1] for s in states), (s for states in after[1] for s in states), strict=False)
    return not torch.equal(before[0], after[0]) or any(not torch.equal(a, b) for a, b in on_device)


@contextmanager
def preserved_random() -> Iterator[None]:
    """Restore every generator of random numbers when the block ends."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
