"""The state of a process that an artifact is compiled for: modes, autocast, hooks, precision."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _device

from torchspan.artifacts.values import name_of


def ambient_state() -> dict[str, Any]:
    """What torch is set to here and now, as JSON; guards compare each entry.

    >>> ambient_state()["grad_mode"], ambient_state()["default_dtype"]
    (True, 'torch.float32')
    """
    return {
        "grad_mode": torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "autocast": _autocast_state(),
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()],
        "torch_function": torch._C._is_torch_function_enabled(),
        "torch_function_modes": _mode_stack(),
        "dispatch_modes": torch._C._len_torch_dispatch_stack(),
        "functorch": torch._C._functorch.peek_interpreter_stack() is not None,
        "global_module_hooks": sum(map(len, _global_hooks())),
    }


def ambient_key() -> tuple[Any, ...]:
    """The state as a key that is quick to take and to compare; keys are equal only where `ambient_state` is equal."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._is_torch_function_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.peek_interpreter_stack(),
        *[len(hooks) for hooks in _global_hooks()],
    )


def is_plain_state(key: tuple[Any, ...]) -> bool:
    """Whether a key tells the whole state: no autocast and no modes are on, of which `ambient_state` says more."""
    return not key[2] and key[7:10] == (0, 0, None)


def _global_hooks() -> list[Any]:
    module = torch.nn.modules.module
    return [getattr(module, name) for name in _GLOBAL_HOOKS if hasattr(module, name)]


_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_parameter_registration_hooks",
)


def _autocast_state() -> dict[str, str]:
    kinds = ("cpu", "cuda")
    return {kind: str(torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)}


def _mode_stack() -> list[str]:
    """The modes of torch_function that are on, by name; that of a default device with the device."""
    modes = [torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack())]
    return [name_of(type(mode)) + (f" {mode.device}" if isinstance(mode, _device.DeviceContext) else "") for mode in modes]
