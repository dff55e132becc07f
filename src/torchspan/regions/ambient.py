"""The state of a process that a compile depends on besides its program: threads, precision, autocast, grad mode, settings.

Each enters a cache key, so a child needs the caller's values. Each is set only where it differs: setting some of them (the
precision of matrix products) changes the key even where the value stays the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from torchspan.private import config

CONFIGS = ("torch._dynamo.config", "torch._functorch.config", "torch._inductor.config")
# what a process decides for itself
_OWN = {"compile_threads", "worker_start_method", "quiesce_async_compile_pool"}
_PLAIN = (bool, int, float, str, type(None))


def _default_device() -> str:
    try:
        return str(torch.get_default_device())
    except AttributeError:  # torch 2.8, after set_default_device(None): its own function reads a device that is not there
        return "cpu"


_Switch = tuple[Callable[[], Any], Callable[[Any], Any]]
_cudnn, _cuda_matmul, _mkldnn = torch.backends.cudnn, torch.backends.cuda.matmul, torch.backends.mkldnn
SWITCHES: Mapping[str, _Switch] = {
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "default_dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "default_device": (_default_device, torch.set_default_device),
    "matmul_precision": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "deterministic": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda both: torch.use_deterministic_algorithms(both[0], warn_only=both[1]),
    ),
    "cudnn_benchmark": (lambda: _cudnn.benchmark, lambda value: setattr(_cudnn, "benchmark", value)),
    "cudnn_deterministic": (lambda: _cudnn.deterministic, lambda value: setattr(_cudnn, "deterministic", value)),
    "flash_sdp": (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    "math_sdp": (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    "efficient_sdp": (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    "cudnn_sdp": (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
}


@dataclass(frozen=True)
class Ambient:
    """A process's state, as plain values; `autocast` holds (device type, dtype, whether weights are cached).

    `changed` are the names in `configs` whose values the program has set.
    """

    switches: Mapping[str, Any]
    is_grad: bool
    is_inference: bool
    autocast: tuple[tuple[str, torch.dtype, bool], ...]
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    changed: tuple[tuple[str, str], ...] = ()

    def text(self) -> str:
        """This state as text that is the same in every process, without what torch or the environment has set."""
        changed = [(name, key, self.configs[name][key]) for name, key in self.changed]
        return repr((dict(self.switches), self.is_grad, self.is_inference, self.autocast, changed))


def capture() -> Ambient:
    """The state of the caller's process and thread."""
    configs = {name: _config_values(name) for name in CONFIGS if name in sys.modules}
    return Ambient(
        {name: read() for name, (read, _) in SWITCHES.items()},
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        autocast_state(),
        configs,
        tuple(
            (name, key)
            for name, values in configs.items()
            for key, value in values.items()
            if config.is_set_by_program(sys.modules[name], key, value)
        ),
    )


def autocast_state() -> tuple[tuple[str, torch.dtype, bool], ...]:
    """Which devices autocast now, and to what."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    cached = torch.is_autocast_cache_enabled()
    return tuple(
        (device, torch.get_autocast_dtype(device), cached) for device in ("cpu", "cuda") if torch.is_autocast_enabled(device)
    )


def restore(ambient: Ambient) -> None:
    """Put this process into that state, except for what :func:`modes` sets for a block."""
    for name, value in ambient.switches.items():
        read, write = SWITCHES[name]
        if read() != value:
            write(value)
    for name, values in ambient.configs.items():
        _set_config(name, values)


@contextmanager
def modes(ambient: Ambient) -> Iterator[None]:
    """Grad mode, inference mode and autocast of that state, for a block."""
    with ExitStack() as stack:
        if ambient.is_inference != torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(ambient.is_inference))
        if ambient.is_grad != torch.is_grad_enabled():
            stack.enter_context(torch.set_grad_enabled(ambient.is_grad))
        for device, dtype, cached in ambient.autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=cached))
        yield


def _config_values(name: str) -> dict[str, Any]:
    values = sys.modules[name].get_config_copy()
    return {key: value for key, value in values.items() if key not in _OWN and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return isinstance(value, _PLAIN)


def _set_config(name: str, values: Mapping[str, Any]) -> None:
    __import__(name)
    module = sys.modules[name]
    current = module.get_config_copy()
    changed = {key: value for key, value in values.items() if key in current and current[key] != value}
    for key, value in changed.items():
        parts = key.split(".")
        holder: Any = module
        for part in parts[:-1]:
            holder = getattr(holder, part)
        setattr(holder, parts[-1], value)
