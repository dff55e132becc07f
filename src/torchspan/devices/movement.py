"""Movement of tensors and modules: ``.to("cuda")``, ``.cuda()``, ``.cpu()``, ``.type("torch.cuda.FloatTensor")``.

On a GPU a move between the host's memory and the device's is a copy, and a move to where a tensor is already gives the tensor
itself. So it is here: a move copies, unless the tensor is known to lie there (docs/decisions/0008).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices import _redirect
from torchspan.devices._memories import DEVICE, HOST, UNKNOWN, Memory, mark, memory_of
from torchspan.devices._policy import KEEP_CPU
from torchspan.devices._redirect import NARROW, Redirection, is_cpu
from torchspan.devices._wrap import Function, is_compiling, is_read_by_dynamo, named_like
from torchspan.environment.patch import Patch, Replacement

_TO_POSITIONAL = ("device", "dtype", "non_blocking", "copy")
_CUDA_TYPE = "torch.cuda."
_CPU = torch.device("cpu")
_tracing_state = torch._C._get_tracing_state


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Tensor, storage and module methods."""
    methods: dict[str, Callable[..., Function]] = {"to": _to, "cuda": _cuda, "cpu": _cpu, "type": _type, "type_as": _type_as}
    if redirection.has_target_module:
        methods["copy_"] = _copy
    for name, build in methods.items():
        yield Replacement("movement", "torch", f"Tensor.{name}", partial(_tensor_method, build, redirection), follow=True)
    for name, build in {"cpu": _packed_cpu, "to": _packed_to}.items():
        yield Replacement("movement", "torch.nn.utils.rnn", f"PackedSequence.{name}", partial(build, redirection))
    for name in ("to", "cuda"):
        yield Replacement("movement", "torch.nn.modules.module", f"Module.{name}", partial(_module_method, redirection, name))
    lazy = "UninitializedTensorMixin._allowed_methods"
    yield Replacement("movement", "torch.nn.parameter", lazy, lambda old: [*old, *_of_lazy_parameters()])


def _of_lazy_parameters() -> Iterable[Any]:
    """The functions that a parameter without a shape allows are listed themselves: add those that replace them."""
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
        first = args[0] if args else kwargs.get("device", kwargs.get("tensor"))
        if first is None or type(first) is dtype:
            return old(self, *args, **kwargs)
        return _move(redirection, old, self, first, args, kwargs)

    return _narrowing(redirection, to) if redirection.lacks_float64 else to


def _narrowing(redirection: Redirection, to: Function) -> Function:
    """``Tensor.to`` of what is on a target already that has no double precision."""

    def narrowing(self: Any, *args: Any, **kwargs: Any) -> Any:
        if redirection.is_on_target(self):
            narrow = NARROW.get if is_compiling() else partial(redirection.narrowed, "Tensor.to")
            args = tuple(narrow(value) if type(value) is torch.dtype and value in NARROW else value for value in args)
            if kwargs.get("dtype") in NARROW:
                kwargs["dtype"] = narrow(kwargs["dtype"])
        return to(self, *args, **kwargs)

    return narrowing


def _move(
    redirection: Redirection, old: Function, tensor: Any, first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``tensor.to(first, …)``, where `first` is a device or a tensor."""
    if _redirect.in_force is not redirection:
        return old(tensor, *args, **kwargs)
    target = redirection.lookup(first)
    if target is None and not redirection.in_use:
        return old(tensor, *args, **kwargs)
    if is_read_by_dynamo():
        return _move_compiled(redirection, old, tensor, first, target, args, kwargs)
    if target is None:
        memory = redirection.memory_asked(first, depth=3)
        if memory is None:
            return old(tensor, *args, **kwargs)
    else:
        redirection.note("Tensor.to", first, depth=3)
        memory = HOST if first == KEEP_CPU else DEVICE
    if len(args) > 1 or kwargs:
        kwargs = _named(first, args, kwargs)
    return _brought(redirection, old, tensor, memory, first if target is None else target, kwargs)


def _named(first: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``Tensor.to`` but the first, by name."""
    names = _TO_POSITIONAL[2:] if isinstance(first, torch.Tensor) else _TO_POSITIONAL[1:]
    return {key: value for key, value in (kwargs | dict(zip(names, args[1:]))).items() if key not in ("device", "tensor")}


def _brought(redirection: Redirection, to: Function, tensor: Any, memory: Memory, place: Any, kwargs: dict[str, Any]) -> Any:
    """``to(tensor, place, …)``, where `place` is in `memory`: a copy, unless the tensor is known to lie there."""
    if not redirection.in_use:  # the target has a memory of its own, or nothing was put there
        if memory is DEVICE:
            kwargs["dtype"] = redirection.narrowed("Tensor.to", kwargs.get("dtype") or tensor.dtype)
            if kwargs.get("non_blocking") and redirection.waits_for_copy("Tensor.to", tensor.device, place):
                kwargs["non_blocking"] = False
        return to(tensor, place, **kwargs)
    lies = memory_of(tensor)
    if lies is not memory or lies is UNKNOWN or _tracing_state() is not None:  # a trace serves both kinds
        kwargs["copy"] = True
        if lies is UNKNOWN:
            redirection.say_result_copied()
    moved = to(tensor, place, **kwargs)
    return moved if moved is tensor else mark(moved, memory)


def _move_compiled(
    redirection: Redirection,
    old: Function,
    tensor: Any,
    first: Any,
    target: torch.device | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """What a compiler reads: nothing says where a tensor lies while the graph runs, so each move between the two is a copy."""
    if target is not None:
        redirection.note("Tensor.to", first)
    named = _named(first, args, kwargs)
    if target is not None and not redirection.in_use:
        named["dtype"] = redirection.narrowed("Tensor.to", named.get("dtype") or tensor.dtype)
        named["non_blocking"] = False
    elif target is not None or is_cpu(first.device if isinstance(first, torch.Tensor) else first):
        named["copy"] = True
    return old(tensor, first if target is None else target, **named)


def _copy(redirection: Redirection, old: Function) -> Function:
    def copy_(self: Any, src: Any, non_blocking: bool = False) -> Any:
        if (
            non_blocking
            and isinstance(src, torch.Tensor)
            and redirection.waits_for_copy("Tensor.copy_", src.device, self.device)
        ):
            non_blocking = False
        return old(self, src, non_blocking)

    return copy_


def _cuda(redirection: Redirection, old: Function) -> Function:
    to, preserve = torch._C.TensorBase.to, torch.preserve_format

    def cuda(
        self: Any, device: Any = None, non_blocking: bool = False, memory_format: torch.memory_format = torch.preserve_format
    ) -> Any:
        request = "cuda" if device is None else device
        target = redirection.lookup(request)
        if target is None or _redirect.in_force is not redirection:
            return old(self, device, non_blocking, memory_format=memory_format)
        redirection.note("Tensor.cuda", request)
        options: dict[str, Any] = {} if memory_format is preserve else {"memory_format": memory_format}
        if is_read_by_dynamo():
            return to(self, target, copy=redirection.in_use, **options)
        if non_blocking:
            options["non_blocking"] = True
        return _brought(redirection, to, self, DEVICE, target, options)

    return cuda


def _cpu(redirection: Redirection, old: Function) -> Function:
    to, preserve, host = torch._C.TensorBase.to, torch.preserve_format, torch.device("cpu")

    def cpu(self: Any, memory_format: torch.memory_format = torch.preserve_format) -> Any:
        if _redirect.in_force is not redirection:
            return old(self, memory_format=memory_format)
        target = redirection.lookup("cpu")
        if target is not None:
            redirection.note("Tensor.cpu", "cpu")
        if target is not None or not redirection.in_use:
            return to(self, device=target or host, memory_format=memory_format)
        options: dict[str, Any] = {} if memory_format is preserve else {"memory_format": memory_format}
        if is_read_by_dynamo():
            return to(self, host, copy=True, **options)
        return _brought(redirection, to, self, HOST, host, options)

    return cpu


def _type(redirection: Redirection, old: Function) -> Function:
    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is None:
            return old(self, *args, **kwargs)
        if type(dtype) is torch.dtype and redirection.is_on_target(self):
            dtype = redirection.narrowed("Tensor.type", dtype)
        name = dtype if isinstance(dtype, str) else f"{getattr(dtype, '__module__', '')}.{getattr(dtype, '__name__', '')}"
        if not name.endswith("Tensor") or _redirect.in_force is not redirection:
            return old(self, dtype, *args, **kwargs)
        if name.startswith(_CUDA_TYPE):
            redirection.begin_use()
            redirection.note(f"Tensor.type({name!r})")
            if redirection.has_target_module:
                return self.to("cuda", getattr(torch, name.removeprefix(_CUDA_TYPE)).dtype)
            memory = DEVICE
        else:  # a name may be what a tensor on the device answered, a class is the program's own
            memory = UNKNOWN if isinstance(dtype, str) else HOST
        if not redirection.in_use:
            return old(self, name.replace(_CUDA_TYPE, "torch."), *args, **kwargs)
        is_there = not is_compiling() and memory is memory_of(self) is not UNKNOWN
        moved = self if is_there else self.clone()
        return mark(old(moved, name.replace(_CUDA_TYPE, "torch."), *args, **kwargs), memory)

    return type_


def _type_as(redirection: Redirection, old: Function) -> Function:
    to = torch._C.TensorBase.to

    def type_as(self: Any, other: Any) -> Any:
        if not redirection.in_use or not isinstance(other, torch.Tensor) or _redirect.in_force is not redirection:
            return old(self, other)
        return _move(redirection, to, self, other, (other,), {})

    return type_as


def _packed_cpu(redirection: Redirection, old: Any) -> Function:
    """``PackedSequence.cpu``, which asks where its data is before it moves it."""

    @wraps(old)
    def cpu(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not redirection.in_use:
            return old(self, *args, **kwargs)
        return self.to(*args, **{**kwargs, "device": redirection.answers.of(_CPU, HOST)})

    return cpu


def _packed_to(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not redirection.in_use:
            return old(self, *args, **kwargs)
        with redirection.asking(redirection.memory_asked(args[0] if args else kwargs.get("device"))):
            return old(self, *args, **kwargs)

    return to


def _module_method(redirection: Redirection, name: str, old: Any) -> Function:
    """``Module.to`` and ``Module.cuda``: one entry in the report for the module, not one for each of its tensors."""

    @wraps(old)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        request = args[0] if args else kwargs.get("device", kwargs.get("tensor"))
        request = "cuda" if request is None and name == "cuda" else request
        if request is None or isinstance(request, torch.dtype):
            return old(self, *args, **kwargs)
        if redirection.lookup(request) is None:
            return _module_elsewhere(redirection, old, self, request, args, kwargs)
        redirection.note(f"Module.{name}", request)
        if isinstance(request, int) and name == "to":  # torch takes a number only where there is an accelerator
            args, kwargs = args[1:], {k: v for k, v in kwargs.items() if k != "device"}
            args = (torch.device("cuda", request), *args)
        with redirection.quiet():
            return old(self, *args, **kwargs)

    return method


def _module_elsewhere(
    redirection: Redirection, old: Any, module: Any, request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """``Module.to`` of the CPU, of a device that a tensor answered, or of a tensor: torch passes an equal device on."""
    memory = redirection.memory_asked(request) if redirection.in_use else None
    if memory is None:
        return old(module, *args, **kwargs)
    if memory is not DEVICE:
        with redirection.asking(memory):
            return old(module, *args, **kwargs)
    if isinstance(request, torch.Tensor):
        dtype = request.dtype if request.dtype.is_floating_point or request.dtype.is_complex else None
        args = (None, dtype, *args[1:])
    kwargs = {key: value for key, value in kwargs.items() if key not in ("device", "tensor")}
    with redirection.quiet():
        return old(module, redirection.ordinal(), *args[1:], **kwargs)
