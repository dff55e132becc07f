"""The device "second": built once for each torch, then named, with ``torch.second`` in the place that ``torch.cuda`` has.

``SECOND_DEVICE_COUNT`` says how many there are, ``SECOND_DEVICE_FLOAT64=0`` that they have no double precision.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
SOURCES = ("runtime.cpp", "kernels.cpp")
NAME = "second"
_VALUES = ("current", "peak", "allocated", "freed")


def library() -> Path:
    """The device's library for this torch, built where it is not there yet."""
    texts = b"".join((HERE / name).read_bytes() for name in ("device.h", *SOURCES))
    digest = hashlib.sha256(texts + torch.__version__.encode()).hexdigest()[:16]
    folder = Path(os.environ.get("SECOND_DEVICE_FOLDER", HERE.parents[2] / ".envs" / "second_device"))
    built = folder / f"{torch.__version__}-{digest}.so"
    if not built.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = built.with_suffix(f".{os.getpid()}")
        _compile(part)
        part.replace(built)
    return built


def _compile(target: Path) -> None:
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-o", str(target)]
    includes = [f"-I{folder}" for folder in cpp_extension.include_paths()]
    links = [f"-L{folder}" for folder in cpp_extension.library_paths()]
    sources = [str(HERE / name) for name in SOURCES]
    command = [os.environ.get("CXX", "g++"), *flags, *includes, *sources, *links, "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(command, check=True, timeout=900)


def load() -> ModuleType:
    """Make the device known to torch; returns ``torch.second``."""
    if hasattr(torch, NAME):
        return getattr(torch, NAME)
    torch.ops.load_library(str(library()))
    torch.utils.rename_privateuse1_backend(NAME)
    module = _module()
    torch._register_device_module(NAME, module)
    sys.modules[module.__name__] = module
    torch.utils.generate_methods_for_privateuse1_backend(unsupported_dtype=[torch.quint8])
    return module


def _index(device: Any = None) -> int:
    if device is None:
        return int(torch.ops.second_device.current_device())
    if isinstance(device, int):
        return device
    index = torch.device(device).index
    return int(torch.ops.second_device.current_device()) if index is None else index


def _module() -> ModuleType:
    module = ModuleType(f"torch.{NAME}")
    for part in (_devices(), _streams(), _random(), _memory()):
        vars(module).update(part)
    return module


def _devices() -> dict[str, Any]:
    own = torch.ops.second_device

    class device:
        def __init__(self, wanted: Any) -> None:
            self.wanted = _index(wanted)

        def __enter__(self) -> None:
            self.before = own.current_device()
            own.set_device(self.wanted)

        def __exit__(self, *exc_info: object) -> None:
            own.set_device(self.before)

    return {
        "device": device,
        "is_available": lambda: own.num_devices() > 0,
        "is_initialized": lambda: True,
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "init": lambda: None,
        "device_count": lambda: int(own.num_devices()),
        "current_device": lambda: int(own.current_device()),
        "set_device": lambda wanted: own.set_device(_index(wanted)),
        "get_device_name": lambda wanted=None: "a second device",
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "is_bf16_supported": lambda: os.environ.get("SECOND_DEVICE_BFLOAT16", "1") != "0",
        "sleep": own.sleep,
    }


def _streams() -> dict[str, Any]:
    class Stream(torch.Stream):
        """``torch.Stream`` of this device."""

        def __new__(cls, device: Any = None, priority: int = 0, **kwargs: Any) -> Any:
            kwargs = kwargs or {"device": f"{NAME}:{_index(device)}", "priority": priority}
            return super().__new__(cls, **kwargs)

    def Event(enable_timing: bool = False, **kwargs: Any) -> torch.Event:
        """``torch.Event``, of which torch takes no subclass."""
        return torch.Event(device=NAME, enable_timing=enable_timing, **kwargs)

    return {
        "Stream": Stream,
        "Event": Event,
        "synchronize": lambda device=None: torch.ops.second_device.synchronize(_index(device)),
        "current_stream": lambda device=None: torch.accelerator.current_stream(_index(device)),
        "set_stream": torch.accelerator.set_stream,
    }


def _random() -> dict[str, Any]:
    def generator(device: Any = None) -> torch.Generator:
        result: torch.Generator = torch.ops.second_device.default_generator(_index(device))
        return result

    def all_generators() -> list[torch.Generator]:
        return [generator(index) for index in range(torch.ops.second_device.num_devices())]

    def manual_seed_all(seed: int) -> None:
        for generator in all_generators():
            generator.manual_seed(int(seed))

    def set_rng_state(new_state: torch.Tensor, device: Any = NAME) -> None:
        generator(device).set_state(new_state)

    return {
        "manual_seed": lambda seed: generator().manual_seed(int(seed)) and None,
        "manual_seed_all": manual_seed_all,
        "seed": lambda: generator().seed() and None,
        "seed_all": lambda: manual_seed_all(generator().seed()),
        "initial_seed": lambda: generator().initial_seed(),
        "get_rng_state": lambda device=NAME: generator(device).get_state(),
        "default_generators": tuple(all_generators()),
        "get_rng_state_all": lambda: [generator.get_state() for generator in all_generators()],
        "set_rng_state": set_rng_state,
        "set_rng_state_all": lambda states: [set_rng_state(state, index) for index, state in enumerate(states)] and None,
    }


def _memory() -> dict[str, Any]:
    own = torch.ops.second_device
    names = [f"{kind}.all.{value}" for kind in ("allocated_bytes", "reserved_bytes", "allocation") for value in _VALUES]

    def memory_stats(device: Any = None) -> dict[str, int]:
        return dict(zip(names, own.memory(_index(device))))

    def figure(name: str) -> Any:
        return lambda device=None: memory_stats(device)[name]

    return {
        "empty_cache": own.empty_cache,
        "memory_stats": memory_stats,
        "memory_allocated": figure("allocated_bytes.all.current"),
        "max_memory_allocated": figure("allocated_bytes.all.peak"),
        "memory_reserved": figure("reserved_bytes.all.current"),
        "max_memory_reserved": figure("reserved_bytes.all.peak"),
        "reset_peak_memory_stats": lambda device=None: own.reset_peak(_index(device)),
        "mem_get_info": lambda device=None: tuple(own.memory(_index(device))[-2:]),
    }
