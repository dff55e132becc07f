"""Labels of devices: the default device, ``with torch.device("cuda")``, and the tensor types of ``torch.cuda``.

``torch.device`` itself is left alone: a label names what was asked for, whatever is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices._memories import DEVICE, HOST, mark
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition, Replacement

_CUDA_TYPE = "torch.cuda."


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The default device and the legacy types."""
    build = partial(_device_context, redirection)
    yield Replacement("labels", "torch.utils._device", "DeviceContext.__init__", build)
    if "cuda" not in redirection.kinds:
        return
    yield Redefinition("labels", "torch", "set_default_tensor_type", partial(_default_type, redirection))
    for name in dir(torch.cuda.sparse):
        if name.endswith("Tensor") and hasattr(torch.sparse, name):
            kind = partial(_tensor_type, redirection, getattr(torch.sparse, name), is_cuda=True, prefix="torch.cuda.sparse")
            yield Replacement("labels", "torch.cuda.sparse", name, kind, follow=True)
    for name in dir(torch.cuda):
        if name.endswith("Storage") and hasattr(torch, name):
            yield Replacement("labels", "torch.cuda", name, partial(_given, getattr(torch, name)), follow=True)
        if name.endswith("Tensor") and hasattr(torch, name):
            kind = partial(_tensor_type, redirection, getattr(torch, name))
            yield Replacement("labels", "torch.cuda", name, partial(kind, is_cuda=True), follow=True)
            if redirection.masquerade:
                yield Replacement("labels", "torch", name, partial(kind, is_cuda=False), follow=True)


def _given(value: object, old: object) -> object:
    return value


def _tensor_type(redirection: Redirection, real: Any, old: Any, *, is_cuda: bool, prefix: str = "torch.cuda") -> type:
    """A legacy tensor type. `real`, the CPU's, makes its tensors; those that the program believes to be there are instances."""
    is_exact = redirection.masquerade and prefix == "torch.cuda"  # what is sparse carries no mark
    name = real.__name__.rpartition(".")[2]

    class Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            if not isinstance(instance, real):
                return False
            return redirection.may_be_placed(instance) == is_cuda if is_exact else is_cuda

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            if is_cuda:
                redirection.begin_use()
                redirection.note(f"{prefix}.{name}()")
            tensor = real(*args, **kwargs)
            if is_cuda and redirection.has_target_module:
                return tensor.to("cuda")
            return mark(tensor, DEVICE if is_cuda else HOST) if redirection.in_use else tensor

        def __getattr__(cls, name: str) -> Any:
            return getattr(old, name)

    kind = Meta(name, (), {"__module__": prefix if is_cuda else "torch", "__doc__": real.__doc__})
    redirection.originals[id(kind)] = real
    return kind


def _device_context(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, device: Any) -> None:
        target = redirection.lookup(device)
        if target is not None:
            redirection.note("the default device", device)
            self._torchspan_asked = torch.device(device)
        if device is not None:
            self._torchspan_memory = redirection.memory_asked(device, is_programs=True)
        old(self, device if target is None else target)

    return init


def _default_type(redirection: Redirection, old: Function) -> Function:
    def set_default_tensor_type(t: Any) -> None:
        name = t if isinstance(t, str) else f"{getattr(t, '__module__', '')}.{getattr(t, '__name__', '')}"
        was_cuda_default, redirection.is_cuda_default = redirection.is_cuda_default, name.startswith(_CUDA_TYPE)
        if redirection.is_cuda_default:
            redirection.begin_use()
            redirection.note(f"torch.set_default_tensor_type({name!r})")
            name = name.replace(_CUDA_TYPE, "torch.")
        tensor_type = getattr(torch, name.removeprefix("torch."), t)
        old(redirection.originals.get(id(tensor_type), tensor_type))
        if redirection.has_target_module and (redirection.is_cuda_default or was_cuda_default):
            torch.set_default_device(redirection.target if redirection.is_cuda_default else None)

    return set_default_tensor_type
