"""Movement of tensors and modules: ``.to("cuda")``, ``.cuda()``, ``.cpu()``, ``.type("torch.cuda.FloatTensor")``.

On a GPU a move between devices is a copy, and a move to where a tensor is already gives the tensor itself. What the program
moved or made there is marked: a move there copies what is not, a move back what may be there (docs/decisions/0003).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices import _redirect
from torchspan.devices._policy import KEEP_CPU
from torchspan.devices._redirect import NARROW, Redirection
from torchspan.devices._wrap import Function, is_compiling, named_like
from torchspan.environment.patch import Patch, Replacement

_TO_POSITIONAL = ("device", "dtype", "non_blocking", "copy")
_CUDA_TYPE = "torch.cuda."


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Tensor, storage and module methods."""
    methods: dict[str, Callable[..., Function]] = {"to": _to, "cuda": _cuda, "cpu": _cpu, "type": _type, "type_as": _type_as}
    if redirection.target == "mps":
        methods["double"] = _double
    for name, build in methods.items():
        yield Replacement("movement", "torch", f"Tensor.{name}", partial(_tensor_method, build, redirection), follow=True)
    yield Replacement("movement", "torch.nn.utils.rnn", "PackedSequence.cpu", partial(_packed_cpu, redirection))
    for name in ("to", "cuda"):
        yield Replacement("movement", "torch.nn.modules.module", f"Module.{name}", partial(_module_method, redirection, name))
    lazy = "UninitializedTensorMixin._allowed_methods"
    yield Replacement("movement", "torch.nn.parameter", lazy, lambda old: [*old, *_of_lazy_parameters()])


def _of_lazy_parameters() -> Iterable[Any]:
    """What a parameter without a shape allows is a list of the functions themselves: ours too."""
    return (getattr(torch.Tensor, name) for name in ("to", "cuda", "cpu", "get_device", "untyped_storage"))


def _tensor_method(build: Callable[..., Function], redirection: Redirection, old: Any) -> Function:
    new = build(redirection, old)
    redirection.originals[id(new)] = old
    return named_like(new, old, "torch._tensor")


def _to(redirection: Redirection, old: Function) -> Function:
    dtype = torch.dtype

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not kwargs and args and type(args[0]) is dtype:
            return old(self, *args)
        first = args[0] if args else kwargs.get("device", kwargs.get("other"))
        if first is None or type(first) is dtype:
            return old(self, *args, **kwargs)
        return _move(redirection, old, self, first, args, kwargs)

    return to if redirection.target != "mps" else _narrowing(redirection, to)


def _narrowing(redirection: Redirection, to: Function) -> Function:
    """``Tensor.to`` of what is on MPS already, which has no double precision."""

    def narrowing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _is_on_mps(self):
            narrow = NARROW.get if is_compiling() else partial(redirection.narrowed, "Tensor.to")
            args = tuple(narrow(value) if type(value) is torch.dtype and value in NARROW else value for value in args)
            if kwargs.get("dtype") in NARROW:
                kwargs["dtype"] = narrow(kwargs["dtype"])
        return to(self, *args, **kwargs)

    return narrowing


def _move(
    redirection: Redirection, old: Function, tensor: Any, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    if _redirect.in_force is not redirection:
        return old(tensor, *args, **kwargs)
    target = redirection.lookup(first)
    if target is None:
        return _move_elsewhere(redirection, old, tensor, first, args, kwargs)
    if len(args) > 1:
        kwargs.update(zip(_TO_POSITIONAL, args))
    kwargs["device"] = target
    redirection.note("Tensor.to", first)
    if redirection.mode == "torchdevice" and first == KEEP_CPU:
        return old(tensor, **kwargs)
    return _placed(redirection, old, tensor, kwargs)


def _move_elsewhere(
    redirection: Redirection, old: Function, tensor: Any, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """To where another tensor is, or back to the CPU.

    A name is what the program asks for: what may be on its device is copied. A ``torch.device`` of the CPU may be what a tensor
    that is there answered truthfully, so only what is known to be there is copied; in disguise, tensors answer otherwise.
    """
    if isinstance(first, torch.Tensor):
        comes = not redirection.is_marked(tensor) and redirection.is_marked(first)
        if redirection.masquerade and not comes:  # what is known there is that a tensor is on the host, not that it is placed
            comes = redirection.may_be_placed(first) and not redirection.may_be_placed(tensor)
        if comes or (redirection.masquerade and redirection.may_be_placed(tensor) and not redirection.may_be_placed(first)):
            mark = redirection.mark if comes else redirection.mark_host
            return mark(old(tensor, first, **{**dict(zip(_TO_POSITIONAL[2:], args[1:])), **kwargs, "copy": True}))
    elif _is_cpu(first):
        is_sure = isinstance(first, str) or redirection.masquerade
        if redirection.may_be_placed(tensor) if is_sure else redirection.is_marked(tensor):
            return redirection.mark_host(old(tensor, **{**dict(zip(_TO_POSITIONAL, args)), **kwargs, "copy": True}))
    return old(tensor, *args, **kwargs)


def _is_cpu(device: object) -> bool:
    return (device.partition(":")[0] if isinstance(device, str) else getattr(device, "type", None)) == "cpu"


def _placed(redirection: Redirection, to: Function, tensor: Any, kwargs: dict[str, Any]) -> Any:
    """`tensor` moved as `kwargs` say: a copy, unless the program has it there already."""
    if redirection.target == "cpu":
        if (
            not redirection.is_marked(tensor) or torch._C._get_tracing_state() is not None
        ):  # a trace serves tensors of both kinds
            kwargs["copy"] = True
    else:
        kwargs["dtype"] = redirection.narrowed("Tensor.to", kwargs.get("dtype") or tensor.dtype)
    return redirection.mark(to(tensor, **kwargs))


def _double(redirection: Redirection, old: Function) -> Function:
    def double(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_on_mps(self):
            return old(self, *args, **kwargs)
        return self.to(redirection.narrowed("Tensor.double", torch.float64))

    return double


def _is_on_mps(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "mps"


def _cuda(redirection: Redirection, old: Function) -> Function:
    to, preserve = torch._C.TensorBase.to, torch.preserve_format

    def cuda(
        self: Any, device: Any = None, non_blocking: bool = False, memory_format: torch.memory_format = torch.preserve_format
    ) -> Any:
        target = redirection.lookup("cuda" if device is None else device)
        if target is None or _redirect.in_force is not redirection:
            return old(self, device, non_blocking, memory_format=memory_format)
        redirection.note("Tensor.cuda", "cuda" if device is None else device)
        wanted: dict[str, Any] = {"device": target}  # what is as by default is left out: torch reads each argument
        if memory_format is not preserve:
            wanted["memory_format"] = memory_format
        return _placed(redirection, to, self, wanted)

    return cuda


def _cpu(redirection: Redirection, old: Function) -> Function:
    to = torch._C.TensorBase.to

    def cpu(self: Any, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        if _redirect.in_force is not redirection:
            return old(self, memory_format=memory_format)
        target = redirection.lookup("cpu")
        if target is not None:
            redirection.note("Tensor.cpu", "cpu")
            return to(self, device=target, memory_format=memory_format)
        if redirection.may_be_placed(self):
            return redirection.mark_host(to(self, device="cpu", copy=True, memory_format=memory_format))
        return old(self, memory_format=memory_format)

    return cpu


def _type(redirection: Redirection, old: Function) -> Function:
    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return old(self, *args, **kwargs)
        name = dtype if isinstance(dtype, str) else f"{getattr(dtype, '__module__', '')}.{getattr(dtype, '__name__', '')}"
        if not name.endswith("Tensor") or _redirect.in_force is not redirection:
            return old(self, dtype, *args, **kwargs)
        if not name.startswith(_CUDA_TYPE):
            leaves = redirection.may_be_placed(self) if redirection.masquerade else redirection.is_marked(self)
            return redirection.mark_host(old(self.clone() if leaves else self, name, *args, **kwargs))
        redirection.note(f"Tensor.type({name!r})")
        moved = self if redirection.is_marked(self) else self.clone()
        return redirection.mark(old(moved, name.replace(_CUDA_TYPE, "torch."), *args, **kwargs))

    return type_


def _type_as(redirection: Redirection, old: Function) -> Function:
    to = torch._C.TensorBase.to

    def type_as(self: Any, other: Any) -> Any:
        if is_compiling() or not isinstance(other, torch.Tensor) or _redirect.in_force is not redirection:
            return old(self, other)
        return _move_elsewhere(redirection, to, self, other, (other,), {})

    return type_as


def _packed_cpu(redirection: Redirection, old: Any) -> Function:
    """``PackedSequence.cpu``, which asks where its data is before it moves it."""

    @wraps(old)
    def cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        if redirection.may_be_placed(self.data):
            return self.to(*args, **{**kwargs, "device": "cpu"})
        return old(self, *args, **kwargs)

    return cpu


def _module_method(redirection: Redirection, name: str, old: Any) -> Function:
    """``Module.to`` and ``Module.cuda``: one entry in the report for the module, not one for each of its tensors."""

    @wraps(old)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = args[0] if args else kwargs.get("device")
        asked = "cuda" if asked is None and name == "cuda" else asked
        if name == "to" and isinstance(kwargs.get("tensor", asked), torch.Tensor):
            asked, args, kwargs = _like(redirection, kwargs.get("tensor", asked), args, kwargs)
        if redirection.lookup(asked) is None:
            return old(self, *args, **kwargs)
        redirection.note(f"Module.{name}", asked)
        if isinstance(asked, int) and name == "to":  # torch takes a number only where there is an accelerator
            args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "device"}
            args = (torch.device("cuda", asked), *args)
        with redirection.quiet():
            return old(self, *args, **kwargs)

    return method


def _like(redirection: Redirection, tensor: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """What ``Module.to(tensor)`` asks for: the device that the program believes the tensor to be on."""
    is_there = redirection.may_be_placed(tensor) if redirection.masquerade else redirection.is_marked(tensor)
    if not is_there:
        return tensor, args, kwargs
    asked = redirection.ordinal()
    rest = {key: value for key, value in kwargs.items() if key != "tensor"}
    dtype = tensor.dtype if tensor.dtype.is_floating_point or tensor.dtype.is_complex else None
    return asked, (asked, dtype, *(args[1:] if args else ())), rest
