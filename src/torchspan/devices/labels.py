"""Labels of devices: the default device, ``with torch.device("cuda")``, and the tensor types of ``torch.cuda``.

``torch.device`` itself is left alone: a label names what was asked for, whatever is here.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch

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
    for name in dir(torch.cuda):
        if name.endswith(("Tensor", "Storage")) and hasattr(torch, name):
            yield Replacement("labels", "torch.cuda", name, partial(_typed, name), follow=True)


def _typed(name: str, old: object) -> object:
    return getattr(torch, name)


def _device_context(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, device: Any) -> None:
        target = redirection.lookup(device)
        if target is not None:
            redirection.note("the default device", device)
            self._torchspan_asked = torch.device(device)
        old(self, device if target is None else target)

    return init


def _default_type(redirection: Redirection, old: Function) -> Function:
    def set_default_tensor_type(t: Any) -> None:
        name = t if isinstance(t, str) else f"{getattr(t, '__module__', '')}.{getattr(t, '__name__', '')}"
        redirection.is_cuda_default = name.startswith(_CUDA_TYPE)
        if redirection.is_cuda_default:
            redirection.note(f"torch.set_default_tensor_type({name!r})")
            t = name.replace(_CUDA_TYPE, "torch.")
        old(t)

    return set_default_tensor_type
