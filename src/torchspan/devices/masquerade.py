"""``masquerade=True``: the program's own code is told that its tensors are on the device that it asked for; torch's never is.

What a tensor was computed from is not followed: a tensor is taken to be on the device unless it is known to lie in the host's
memory. So a result of such tensors alone answers for the device as well; a move of it copies all the same, so its values are
right.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices import _redirect
from torchspan.devices._callers import asked_by_torch, is_torchs
from torchspan.devices._memories import HOST, mark
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, named_like
from torchspan.environment.patch import Patch, Redefinition, Replacement

RNN = "torch.nn.utils.rnn"
C10D = "torch.distributed.distributed_c10d"
TENSOR_VARIABLE = "torch._dynamo.variables.tensor"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """What answers for a device; nothing unless it was asked for."""
    if not redirection.masquerade:
        return
    yield Replacement("masquerade", RNN, "PackedSequence.__new__", partial(_packed, redirection))
    yield Replacement("masquerade", RNN, "PackedSequence.is_cuda", partial(_packed_is_cuda, redirection))
    yield Redefinition("masquerade", RNN, "pad_packed_sequence", partial(_lengths, redirection))
    properties: dict[str, Callable[[torch.device], object]] = {
        "device": lambda device: device,
        "is_cuda": lambda device: device.type == "cuda",
        "is_cpu": lambda device: False,
    }
    for name, answer in properties.items():
        yield Replacement("masquerade", "torch", f"Tensor.{name}", partial(_property, redirection, answer))
        if name != "is_cpu":
            for kind in ("UntypedStorage", "TypedStorage"):
                yield Replacement("masquerade", "torch.storage", f"{kind}.{name}", partial(_property, redirection, answer))
            yield Replacement(
                "masquerade", TENSOR_VARIABLE, f"TensorVariable.method_attr_{name}", partial(_traced, redirection)
            )
    for target, holder in (("torch", "Tensor"), ("torch.storage", "UntypedStorage"), ("torch.storage", "TypedStorage")):
        yield Replacement("masquerade", target, f"{holder}.get_device", partial(_get_device, redirection))
    yield Replacement("masquerade", "torch", "get_device", partial(_get_device, redirection), follow=True)
    yield Replacement("masquerade", "torch", "Tensor.type", partial(_type, redirection))
    yield Redefinition("masquerade", "torch", "get_default_device", partial(_get_default_device, redirection))
    groups: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
    for name in ("init_process_group", "new_group"):
        yield Redefinition("masquerade", C10D, name, partial(_group, groups, name))
    yield Redefinition("masquerade", C10D, "get_backend", partial(_get_backend, groups))
    yield Redefinition("masquerade", C10D, "is_nccl_available", partial(_yes))


# what is always on the CPU


def _packed(redirection: Redirection, old: Any) -> staticmethod[..., Any]:
    @wraps(old)
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        sequence = old(cls, *args, **kwargs)
        if redirection.in_use:
            mark(sequence.batch_sizes, HOST)  # always
        return sequence

    return staticmethod(new)


def _packed_is_cuda(redirection: Redirection, old: Any) -> property:
    def get(self: Any) -> bool:
        return bool(old.__get__(self)) if asked_by_torch() else bool(redirection.believed(self.data))

    return property(get, doc=old.__doc__)


def _lengths(redirection: Redirection, old: Function) -> Function:
    def pad_packed_sequence(*args: Any, **kwargs: Any) -> Any:
        padded, lengths = old(*args, **kwargs)
        return padded, mark(lengths, HOST) if redirection.in_use else lengths

    return pad_packed_sequence


# what a tensor answers


def _property(redirection: Redirection, answer: Callable[[torch.device], object], old: Any) -> property:
    read = old.__get__

    def get(self: Any) -> object:
        if _redirect.in_force is not redirection:
            return read(self)
        if asked_by_torch():
            truth = read(self)
            return redirection.answer(self, truth) if redirection.in_use and type(truth) is torch.device else truth
        device = redirection.believed(self)
        return read(self) if device is None else answer(device)

    return property(get, doc=old.__doc__)


def _get_device(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def get_device(input: Any) -> int:
        device = None if asked_by_torch() else redirection.believed(input)
        index: int = old(input) if device is None else device.index or 0
        return index

    redirection.originals[id(get_device)] = old
    return get_device


def _type(redirection: Redirection, old: Function) -> Function:
    def type_(self: Any, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        name = old(self, dtype, *args, **kwargs)
        if dtype is not None or asked_by_torch() or redirection.believed(self) is None:
            return name
        prefix = f"torch.{redirection.target.partition(':')[0]}." if redirection.has_target_module else "torch."
        return name.replace(prefix, "torch.cuda.", 1)

    redirection.originals[id(type_)] = redirection.originals.get(id(old), old)
    return named_like(type_, old, "torch._tensor")


def _traced(redirection: Redirection, old: Any) -> Function:
    """dynamo's answer for the program that it reads."""

    @wraps(old)
    def method(self: Any, tx: Any) -> Any:
        real = self.device
        if real is None or real.type != redirection.target or is_torchs(tx.f_globals, tx.f_code):
            return old(self, tx)
        self.device = redirection.ordinal()
        try:
            return old(self, tx)
        finally:
            self.device = real

    return method


# what else answers


def _get_default_device(redirection: Redirection, old: Function) -> Function:
    def get_default_device() -> torch.device:
        device: torch.device = old()
        believed = redirection.asked_default()
        return device if believed is None or asked_by_torch() else believed

    return get_default_device


def _group(groups: weakref.WeakKeyDictionary[Any, str], name: str, old: Function) -> Function:
    """Remember which groups the program believes to be NCCL's."""

    def function(*args: Any, **kwargs: Any) -> Any:
        result = old(*args, **kwargs)
        backend = kwargs.get("backend", args[0] if args and name == "init_process_group" else None)
        if backend is None and name == "new_group":
            backend = groups.get(torch.distributed.group.WORLD)  # a new group is of the kind of the default one
        group = torch.distributed.group.WORLD if name == "init_process_group" else result
        if isinstance(backend, str) and backend.lower() == "nccl" and isinstance(group, torch.distributed.ProcessGroup):
            groups[group] = "nccl"
        return result

    return function


def _get_backend(groups: weakref.WeakKeyDictionary[Any, str], old: Function) -> Function:
    def get_backend(group: Any = None) -> str:
        backend: str = old(group)
        believed = groups.get(torch.distributed.group.WORLD if group is None else group)
        return backend if believed is None or asked_by_torch() else believed

    return get_backend


def _yes(old: Function) -> Function:
    def answer() -> bool:
        return True if not asked_by_torch() else bool(old())

    return answer
