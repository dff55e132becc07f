"""What torchspan uses of torch's dispatcher and its modes, and of what is written in C++: `torch._C`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchspan.private.names import PrivateName, find, names_in

NAMES = (
    *names_in("torch", "_check", "_check_is_size"),
    *names_in(
        "torch._C",
        "DispatchKey.Autograd",
        "DispatchKey.CompositeImplicitAutograd",
        "ScriptObject",
        "_AutoDispatchBelowAutograd",
        "_DisableAutocast",
    ),
    *names_in(
        "torch._C",
        "_current_graph_task_id",
        "_dispatch_get_all_op_names",
        "_dispatch_has_kernel",
        "_dispatch_has_kernel_for_dispatch_key",
        "_get_function_stack_at",
        "_get_privateuse1_backend_name",
        "_get_tracing_state",
        "_is_any_autocast_enabled",
        "_is_torch_function_enabled",
        "_len_torch_dispatch_stack",
        "_len_torch_function_stack",
        "_set_grad_enabled",
        "_vmapmode_decrement_nesting",
        "_vmapmode_increment_nesting",
    ),
    *names_in("torch._C._aoti", "AOTIModelContainerRunnerCpu"),
    *names_in(
        "torch._C._autograd",
        "_get_current_graph_task_keep_graph",
        "_pop_saved_tensors_default_hooks",
        "_push_saved_tensors_default_hooks",
        "_top_saved_tensors_default_hooks",
    ),
    *names_in("torch._C._dynamo", "guards"),
    *names_in("torch._C._functorch", "peek_interpreter_stack"),
    *names_in("torch._ops", "HigherOrderOperator", "OpOverload"),
    *names_in("torch.autograd", "_get_sequence_nr"),
    *names_in("torch.utils._device", "_device_constructors"),
    PrivateName("torch.utils._python_dispatch"),
    *names_in(
        "torch.utils._python_dispatch",
        "TorchDispatchMode",
        "_get_current_dispatch_mode_stack",
        "_is_in_non_infra_torch_dispatch_mode",
        "is_traceable_wrapper_subclass",
    ),
    *names_in("torch.utils._python_dispatch", "_is_in_any_mode_without_ignore_compile_internals", since="2.9"),
    *names_in("torch.utils.checkpoint", "_CachedTorchDispatchMode", "_CachingTorchDispatchMode"),
)


def __getattr__(name: str) -> Any:
    """A listed name, imported when it is asked for."""
    return find(NAMES, name)


def is_transformed() -> bool:
    """Whether a call stands inside a transform of ``torch.func``, or is recorded by ``torch.jit.trace``."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None


def is_only_checkpointing() -> bool:
    """Whether the only dispatch modes in force are torch's own and, at least one, of selective checkpointing."""
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
    from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

    modes = [mode for mode in _get_current_dispatch_mode_stack() if not mode.is_infra_mode()]
    return bool(modes) and all(isinstance(mode, (_CachedTorchDispatchMode, _CachingTorchDispatchMode)) for mode in modes)


@contextmanager
def as_if_without_modes() -> Iterator[None]:
    """Inside, dynamo does not hold dispatch modes for a reason to leave code uncompiled."""
    import torch.utils._python_dispatch as state

    flags = ("_is_in_non_infra_torch_dispatch_mode", "_is_in_any_mode_without_ignore_compile_internals")  # 2.9 asks the second
    before = {flag: getattr(state, flag) for flag in flags if hasattr(state, flag)}
    assert before, f"torch has neither {' nor '.join(flags)} any more"
    vars(state).update(dict.fromkeys(before, False))
    try:
        yield
    finally:
        vars(state).update(before)
