"""What this machine has for compiles: cores and free memory, of the container where that has less."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torchspan.environment.facts import machine_memory

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """Cores, and functions that give the bytes that are free now, and how many ranks of a job share the machine."""

    cores: int
    free_bytes: Callable[[], int]
    num_ranks: Callable[[], int] = lambda: 1

    @property
    def num_children(self) -> int:
        """How many compiles may work at once: half of the cores, which leaves the program its own, and two at least.

        Ranks divide them, and each has one at least.
        """
        ranks = self.num_ranks()
        return max(2, self.cores // 2) if ranks == 1 else max(1, self.cores // 2 // ranks)


def this_machine() -> Machine:
    """The machine that this process runs on."""
    return Machine(num_cores(), free_bytes, num_ranks)


def num_ranks() -> int:
    """How many ranks of a distributed job run on this machine, as their launcher says; 1 without one."""
    value = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(1, int(value)) if value.isdigit() else 1


def num_cores(cgroup: Path = CGROUP) -> int:
    """The cores that this process may use."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _line(cgroup / "cpu.max").partition(" ")
    return min(cores, max(1, int(quota) // int(period))) if quota.isdigit() and period.isdigit() else cores


def free_bytes(cgroup: Path = CGROUP) -> int:
    """The bytes that new processes may take before the machine, or the container, is short of memory."""
    available = int(machine_memory().available)
    limit, used = _line(cgroup / "memory.max"), _line(cgroup / "memory.current")
    if not (limit.isdigit() and used.isdigit()):
        return available
    return min(available, int(limit) - int(used) + _cached_files(cgroup))


def _cached_files(cgroup: Path) -> int:
    """Bytes of files that the container keeps in memory, and gives up when it is short of it."""
    fields = dict(line.split(" ", 1) for line in _text(cgroup / "memory.stat").splitlines() if " " in line)
    return int(fields.get("inactive_file", 0))


def _line(path: Path) -> str:
    return _text(path).strip()


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # no such limit here
        return ""
