"""Custom operators that were registered for CUDA only: their kernel, being Python, serves the target too."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices._callers import asked_by_torch
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Replacement

_KEYS = {"cpu": "CPU", "mps": "MPS", "xpu": "XPU"}
"""Under which key of torch's dispatcher the kernels of a kind of device are."""


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The one method that every way to register a kernel ends in."""
    yield Replacement("libraries", "torch.library", "Library.impl", partial(_impl, redirection))


def _impl(redirection: Redirection, old: Any) -> Function:
    """``Library.impl(op, fn, "CUDA")`` serves the target too, until a kernel for that is registered."""
    target_key = _KEYS.get(redirection.target_kind, "PrivateUse1")
    stand_ins: dict[tuple[str, str], torch.library.Library] = {}

    @wraps(old)
    def impl(self: Any, op_name: Any, fn: Any, dispatch_key: str = "", *args: Any, **kwargs: Any) -> Any:
        name = (op_name if isinstance(op_name, str) else op_name._schema.name).rpartition("::")[2]
        is_own = self.ns != "aten"
        key = dispatch_key or self.dispatch_key
        if key == target_key and (self.ns, name) in stand_ins:
            stand_ins.pop((self.ns, name))._destroy()
        done = old(self, op_name, fn, dispatch_key, *args, **kwargs)
        if (
            key == "CUDA"
            and is_own
            and not asked_by_torch()
            and redirection.target != "cuda"
            and not _has_kernel(self.ns, name, target_key)
        ):
            redirection.note(f"the kernel of {self.ns}::{name}", "cuda")
            library = stand_ins[self.ns, name] = torch.library.Library(self.ns, "FRAGMENT")
            old(library, op_name, fn, target_key, *args, **kwargs)
        return done

    return impl


def _has_kernel(namespace: str, name: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", key)
