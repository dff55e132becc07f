"""``cuda-semantics``: what CUDA refuses is refused on the CPU, as every operator is followed and the random streams are apart.

The operators are followed by a mode of torch's dispatcher (see ``_following``). Here is what no operator does: what is handed
to numpy, assigned as a gradient, saved, run in another thread or compiled.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from torchspan.core.topics import Standing
from torchspan.devices._memories import DEVICE, HOST, UNKNOWN, memory_of, memory_of_storage
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, named_like
from torchspan.environment.patch import Effect, Patch, Redefinition, Replacement

_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
_KINDS = {DEVICE: "cuda", HOST: "cpu"}
_DEVICES = {DEVICE: "cuda:0", HOST: "cpu"}


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The mode itself, and what it does not see; nothing in other modes."""
    if not redirection.follows:
        return
    from torchspan.devices._following import begin, in_new_threads

    yield Effect("semantics", "torch", partial(begin, redirection))
    yield Replacement("semantics", "threading", "Thread.start", partial(in_new_threads, redirection))
    yield Replacement("semantics", "torch", "Tensor.numpy", partial(_numpy, redirection), follow=True)
    yield Replacement("semantics", "torch", "Tensor.grad", partial(_grad, redirection))
    yield Redefinition("semantics", "torch.autograd", "_make_grads", partial(_make_grads, redirection))
    yield Replacement("semantics", "torch.autograd.function", "Function.apply", partial(_applied, redirection))
    yield Redefinition("semantics", "torch.autograd.function", "BackwardCFunction.apply", partial(_backward, redirection))
    yield Redefinition("semantics", "torch.serialization", "location_tag", _location)
    yield Redefinition("semantics", "torch", "compile", partial(_compile, redirection))


def _refuse(redirection: Redirection, name: str, error: Exception) -> Exception:
    """`error`, recorded at the program's line."""
    redirection.note(name, None, str(error), "an error, as on CUDA", Standing.UNSUPPORTED)
    return error


def _numpy(redirection: Redirection, old: Function) -> Function:
    def numpy(self: Any, *, force: bool = False) -> Any:
        if not force and memory_of(self) is DEVICE:
            raise _refuse(redirection, "Tensor.numpy", TypeError(_NUMPY))
        return old(self, force=force)

    redirection.originals[id(numpy)] = old
    return named_like(numpy, old, "torch._tensor")


# gradients


def _grad(redirection: Redirection, old: Any) -> property:
    read, write, delete = old.__get__, old.__set__, old.__delete__

    def assign(self: Any, value: Any) -> None:
        here, there = memory_of(self), memory_of(value) if isinstance(value, torch.Tensor) else UNKNOWN
        if {here, there} == {DEVICE, HOST}:
            text = (
                f"attempting to assign a gradient with device type '{_KINDS[there]}' to a tensor with device type "
                f"'{_KINDS[here]}'. Please ensure that the gradient and the tensor are on the same device"
            )
            raise _refuse(redirection, "Tensor.grad", RuntimeError(text))
        write(self, value)

    return property(lambda self: read(self), assign, lambda self: delete(self), old.__doc__)


def _make_grads(redirection: Redirection, old: Function) -> Function:
    """What ``backward(gradient=…)`` is given."""

    def _make_grads(outputs: Any, grads: Any, *args: Any, **kwargs: Any) -> Any:
        for position, (output, grad) in enumerate(zip(outputs, grads)):
            _check_gradient(redirection, "invalid gradient", position, output, grad)
        return old(outputs, grads, *args, **kwargs)

    return _make_grads


def _check_gradient(redirection: Redirection, what: str, position: int, of: Any, grad: Any) -> None:
    """Raise the autograd engine's error where `grad` lies elsewhere than `of`, which is a tensor or a memory."""
    expected = memory_of(of) if isinstance(of, torch.Tensor) else of
    actual = memory_of(grad) if isinstance(grad, torch.Tensor) else UNKNOWN
    if {expected, actual} == {DEVICE, HOST}:
        text = f"{what} at index {position} - expected device {_DEVICES[expected]} but got {_DEVICES[actual]}"
        raise _refuse(redirection, "backward", RuntimeError(text))


def _applied(redirection: Redirection, old: Any) -> Any:
    """A function of the program's own: its node of the graph remembers where what it was given lies."""
    unbound = old if isinstance(old, classmethod) else vars(torch._C._FunctionBase)["apply"]  # torch 2.15's is inherited

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        result = unbound.__get__(None, cls)(*args, **kwargs)
        first = next((value for value in (result if isinstance(result, tuple) else (result,)) if _is_of(cls, value)), None)
        if first is not None:
            first.grad_fn._torchspan_memories = [
                memory_of(value) if isinstance(value, torch.Tensor) else UNKNOWN for value in args
            ]
        return result

    return classmethod(apply)


def _is_of(cls: Any, value: Any) -> bool:
    node = value.grad_fn if isinstance(value, torch.Tensor) else None
    return getattr(node, "_forward_cls", None) is cls


def _backward(redirection: Redirection, old: Function) -> Function:
    def apply(self: Any, *args: Any) -> Any:
        grads = old(self, *args)
        for position, (memory, grad) in enumerate(
            zip(getattr(self, "_torchspan_memories", ()), grads if isinstance(grads, tuple) else (grads,))
        ):
            what = f"Function {type(self).__name__} returned an invalid gradient"
            _check_gradient(redirection, what, position, memory, grad)
        return grads

    return apply


# what is saved, and compiled


def _location(old: Function) -> Function:
    """A checkpoint says what it would say on a GPU."""

    def location_tag(storage: Any) -> str:
        tag: str = old(storage)
        return "cuda:0" if tag == "cpu" and memory_of_storage(storage) is DEVICE else tag

    return location_tag


def _compile(redirection: Redirection, old: Function) -> Function:
    """dynamo leaves a program alone in which a mode of the dispatcher is in force."""

    def compile(*args: Any, **kwargs: Any) -> Any:
        redirection.leave_out("torch.compile", "eager", "compiled code is not followed: the program runs eagerly")
        return old(*args, **kwargs)

    return compile
