"""``torch.numa.binding``: a process and its threads bound to the CPUs that are near its accelerator."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch

from torchspan.backports._base import Backport, Change
from torchspan.core.errors import UnsupportedError
from torchspan.core.report import current_report, user_site

_NODES = Path("/sys/devices/system/node")
_DEVICES = Path("/sys/bus/pci/devices")


class AffinityMode(str, Enum):
    """To which CPUs: those of the accelerator's NUMA node (NODE), of its socket, a share of them, or a core complex."""

    NODE = "node"
    SOCKET = "socket"
    EXCLUSIVE = "exclusive"
    CORE_COMPLEX = "core-complex"


@dataclass(frozen=True)
class NumaOptions:
    """How to bind, and whether to go on unbound where that fails."""

    affinity_mode: AffinityMode
    should_fall_back_if_binding_fails: bool = False


def _maybe_apply_numa_binding_to_current_process(*, device_index: int, numa_options: NumaOptions) -> None:
    """Bind this process and all its threads; raises what went wrong, unless `numa_options` says to go on unbound.

    Args:
        device_index: of the accelerator.
        numa_options: how.
    """
    with _going_on_unbound(numa_options):
        _bind(_cpus_near(device_index, numa_options.affinity_mode))


def _maybe_wrap_with_numa_binding(
    func: Callable[..., Any], *, device_index: int, numa_options: NumaOptions | None
) -> Callable[..., Any]:
    """`func`, which binds its process first; `func` itself where there are no options."""
    if numa_options is None:
        return func

    @functools.wraps(func)
    def bound(*args: Any, **kwargs: Any) -> Any:
        _maybe_apply_numa_binding_to_current_process(device_index=device_index, numa_options=numa_options)
        return func(*args, **kwargs)

    return bound


def _maybe_wrap_command_args_with_numa_binding(
    command_args: tuple[str, ...], *, device_index: int, numa_options: NumaOptions | None
) -> tuple[str, ...]:
    """A command that runs bound, by numactl; the command itself where there are no options or it fails and may."""
    if numa_options is None:
        return command_args
    with _going_on_unbound(numa_options):
        cpus = _cpus_near(device_index, numa_options.affinity_mode)
        return ("numactl", f"--physcpubind={_as_ranges(cpus)}", *command_args)
    return command_args


class _going_on_unbound:
    """Inside, what fails is reported and passed over, if the options say so."""

    def __init__(self, options: NumaOptions) -> None:
        self.options = options

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: object) -> bool:
        if not isinstance(value, Exception) or not self.options.should_fall_back_if_binding_fails:
            return False
        report = current_report()
        if report is not None:
            report.decide("backport", "torch.numa.binding", "the process runs unbound", str(value), user_site())
        return True


def _taking_options(init: Callable[..., None]) -> Callable[..., None]:
    """LaunchConfig's constructor, with `numa_options`: this torch's launcher starts processes unbound."""

    @functools.wraps(init)
    def construct(self: Any, *args: Any, numa_options: NumaOptions | None = None, **options: Any) -> None:
        init(self, *args, **options)
        self.numa_options = numa_options
        if numa_options is not None:
            with _going_on_unbound(numa_options):
                raise UnsupportedError(
                    f"LaunchConfig(numa_options={numa_options}): this torch's launcher cannot bind what it starts; "
                    f"{BACKPORT.reason}; call _maybe_apply_numa_binding_to_current_process in each process"
                )

    return construct


def _if_lacking_options(init: Callable[..., None]) -> Callable[..., None]:
    return init if "numa_options" in inspect.signature(init).parameters else _taking_options(init)


def _cpus_near(device_index: int, mode: AffinityMode) -> set[int]:
    """The CPUs of the device's NUMA node that this process may use."""
    if mode is not AffinityMode.NODE:
        raise UnsupportedError(
            f"torch.numa.binding of {mode}: torchspan binds to a NUMA node only; {BACKPORT.reason}; use AffinityMode.NODE"
        )
    node = _node_of(device_index)
    path = _NODES / f"node{node}" / "cpulist"
    if not path.is_file():
        raise RuntimeError(f"Could not determine CPUs corresponding to numa_node_index={node}: there is no {path}")
    cpus = _from_ranges(path.read_text()) & os.sched_getaffinity(0)
    if not cpus:
        raise RuntimeError("Must bind to a non-empty set of CPU indices")
    return cpus


def _node_of(device_index: int) -> int:
    if not torch.accelerator.is_available():
        raise RuntimeError("No accelerator available for NUMA binding")
    properties: Any = torch.get_device_module(torch.accelerator.current_accelerator()).get_device_properties(device_index)
    place = [getattr(properties, f"pci_{part}_id", -1) for part in ("domain", "bus", "device")]
    if -1 in place:
        raise RuntimeError(f"Could not determine the NUMA node of device {device_index}: this torch does not say where it is")
    path = _DEVICES / "{:04x}:{:02x}:{:02x}.0".format(*place) / "numa_node"
    return max(int(path.read_text().strip()), 0)  # -1 where there is one node only


def _bind(cpus: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cpus)


def _from_ranges(text: str) -> set[int]:
    """The numbers of ``0-2,4`` and the like.

    >>> sorted(_from_ranges("0-2,4"))
    [0, 1, 2, 4]
    """
    pairs = (part.strip().partition("-") for part in text.split(",") if part.strip())
    return {number for first, _, last in pairs for number in range(int(first), int(last or first) + 1)}


def _as_ranges(numbers: set[int]) -> str:
    """The other way round.

    >>> _as_ranges({0, 1, 2, 4})
    '0-2,4'
    """

    def runs() -> Iterator[str]:
        starts = sorted(number for number in numbers if number - 1 not in numbers)
        for start in starts:
            end = start
            while end + 1 in numbers:
                end += 1
            yield str(start) if start == end else f"{start}-{end}"

    return ",".join(runs())


BACKPORT = Backport(
    name="numa_binding",
    summary="processes bound to the CPUs near their accelerator: torch.numa.binding",
    target="torch.numa.binding",
    since="2.9.0",
    came={
        "2.10.0": ("_maybe_apply_numa_binding_to_current_process",),
        "2.11.0": (
            "_maybe_wrap_with_numa_binding",
            "_maybe_wrap_command_args_with_numa_binding",
        ),
    },
    upstream="https://github.com/pytorch/pytorch/blob/v2.9.0/torch/numa/binding.py",
    differs=(
        "AffinityMode.NODE only; the others are refused; numactl is needed for commands only; LaunchConfig(numa_options=…) "
        "starts processes unbound where the options allow that, and is refused where they do not"
    ),
    is_module=True,
    names={
        "AffinityMode": lambda: AffinityMode,
        "NumaOptions": lambda: NumaOptions,
        "_maybe_apply_numa_binding_to_current_process": lambda: _maybe_apply_numa_binding_to_current_process,
        "_maybe_wrap_with_numa_binding": lambda: _maybe_wrap_with_numa_binding,
        "_maybe_wrap_command_args_with_numa_binding": lambda: _maybe_wrap_command_args_with_numa_binding,
    },
    also=(Change("torch.distributed.launcher.api", "LaunchConfig.__init__", _if_lacking_options),),
)
