"""What ``nvidia-smi`` and NVML would say of the devices that the CPU stands in for; run as a program, it is ``nvidia-smi``.

It imports no torch: a child that asks it answers at once.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence

from torchspan.environment.facts import machine_memory

DRIVER = "570.86.15"
CUDA = "12.8"
_UNKNOWN = "[N/A]"
_MIB = 2**20


def num_devices() -> int:
    """How many devices there are said to be: one, or one for each rank that a launcher started on this machine."""
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))


def name() -> str:
    """What the device is called."""
    return f"{platform.processor() or platform.machine()} CPU (torchspan)"


def uuid(index: int) -> str:
    """A name for the device with this index, in the form of NVIDIA's."""
    return f"GPU-00000000-0000-0000-0000-{index:012d}"


def _load() -> int:
    import psutil

    return int(psutil.cpu_percent(0.05))


_FIELDS: dict[str, tuple[str, Callable[[int], object]]] = {
    "index": ("", lambda index: index),
    "count": ("", lambda index: num_devices()),
    "name": ("", lambda index: name()),
    "gpu_name": ("", lambda index: name()),
    "uuid": ("", uuid),
    "gpu_uuid": ("", uuid),
    "timestamp": ("", lambda index: time.strftime("%Y/%m/%d %H:%M:%S.000")),
    "driver_version": ("", lambda index: DRIVER),
    "compute_cap": ("", lambda index: "8.0"),
    "pci.bus_id": ("", lambda index: f"00000000:{index:02X}:00.0"),
    "gpu_bus_id": ("", lambda index: f"00000000:{index:02X}:00.0"),
    "pstate": ("", lambda index: "P0"),
    "memory.total": ("MiB", lambda index: machine_memory().total // _MIB),
    "memory.free": ("MiB", lambda index: machine_memory().available // _MIB),
    "memory.used": ("MiB", lambda index: (machine_memory().total - machine_memory().available) // _MIB),
    "utilization.gpu": ("%", lambda index: _load()),
    "utilization.memory": ("%", lambda index: int(machine_memory().percent)),
    **dict.fromkeys(
        ("temperature.gpu", "power.draw", "power.limit", "fan.speed", "clocks.sm", "clocks.mem", "ecc.mode.current"),
        ("", lambda index: _UNKNOWN),
    ),
}
"""The fields that ``--query-gpu`` knows: each with its unit and its value for a device."""
_PROCESSES = ("pid", "process_name", "used_memory", "used_gpu_memory", "gpu_uuid", "gpu_name", "gpu_serial", "gpu_bus_id")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what ``nvidia-smi`` would; its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    indices = list(range(num_devices()))
    if "-L" in words or "--list-gpus" in words:
        print("\n".join(f"GPU {index}: {name()} (UUID: {uuid(index)})" for index in indices))
        return 0
    options = _options(words)
    chosen = options.get("-i", options.get("--id"))
    if chosen is not None:
        choices = chosen.split(",")
        indices = [index for index in indices if str(index) in choices or uuid(index) in choices]
        if not indices:
            print("No devices were found")
            return 6
    if "--query-gpu" in options:
        return _query(options["--query-gpu"].split(","), options.get("--format", ""), indices)
    if "--query-compute-apps" in options:
        fields = [field.strip() for field in options["--query-compute-apps"].split(",")]
        if "noheader" not in options.get("--format", ""):
            print(", ".join(fields))
        return 0
    if set(options) - {"-i", "--id"}:
        print(f"Invalid combination of input arguments. torchspan's nvidia-smi knows -L, -i, --query-gpu=… and no {words}")
        return 1
    _draw(indices)
    return 0


def _options(words: Sequence[str]) -> dict[str, str]:
    """Options with their values, which follow ``=`` or come next."""
    options: dict[str, str] = {}
    last = ""
    for argument in words:
        if argument.startswith("-"):
            last, _, value = argument.partition("=")
            options[last] = value
        elif last:
            options[last] = argument
    return options


def _query(fields: Sequence[str], form: str, indices: Sequence[int]) -> int:
    fields = [field.strip() for field in fields]
    for field in fields:
        if field not in _FIELDS:
            print(f'Field "{field}" is not a valid field to query.\n')
            return 2
    units = ["" if "nounits" in form else _FIELDS[field][0] for field in fields]
    if "noheader" not in form:
        print(", ".join(f"{field} [{_FIELDS[field][0]}]" if _FIELDS[field][0] else field for field in fields))
    for index in indices:
        values = [f"{_FIELDS[field][1](index)} {unit}".strip() for field, unit in zip(fields, units)]
        print(", ".join(values))
    return 0


def _draw(indices: Sequence[int]) -> None:
    line = "+" + "-" * 77 + "+"
    print(f"{time.strftime('%a %b %d %H:%M:%S %Y')}\n{line}")
    print(f"| {f'NVIDIA-SMI {DRIVER}    Driver Version: {DRIVER}    CUDA Version: {CUDA}':<75} |\n{line}")
    for index in indices:
        memory = machine_memory()
        used = f"{(memory.total - memory.available) // _MIB}MiB / {memory.total // _MIB}MiB"
        print(f"| {f'{index}  {name()}':<47}{used:>28} |")
    print(f"{line}\n| {'answered by torchspan: the CPU stands in for each device':<75} |\n{line}")


if __name__ == "__main__":
    sys.exit(main())
