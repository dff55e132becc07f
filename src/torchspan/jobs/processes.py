"""Trees of processes: who is below whom, what memory they take, and their end.

The compile server and its forks use this too, so it imports nothing of torch.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG = 1
HAS_PROC_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")


def become_subreaper() -> None:
    """Make orphans below this process its children, so that none is lost from its tree (Linux)."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent: int) -> None:
    """Have this process killed when its `parent` ends (Linux), also if that happened just before."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def num_threads() -> int:
    """How many threads this process has; 1 where the system does not say."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        return 1


def descendants(pid: int) -> list[int]:
    """Every process below `pid`, parents first."""
    pids: list[int] = []
    queue = [pid]
    while queue:
        children = _children(queue.pop())
        pids += children
        queue += children
    return pids


def _children(pid: int) -> list[int]:
    if not HAS_PROC_CHILDREN:
        return _children_by_psutil(pid)
    try:
        tasks = os.listdir(f"/proc/{pid}/task")
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [int(child) for task in tasks for child in _read(f"/proc/{pid}/task/{task}/children").split()]


def _children_by_psutil(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def tree_bytes(pid: int, limit: int | None = None) -> int:
    """Resident bytes of `pid` and everything below it.

    The sum of resident sizes counts a page that two processes share twice; when that sum passes the `limit`, the
    proportional sizes (exact, and slower to ask for) decide.
    """
    tree = [pid, *descendants(pid)]
    resident = sum(_resident(member) for member in tree)
    if len(tree) == 1 or limit is None or resident <= limit:
        return resident
    return sum(_proportional(member) for member in tree)


def _resident(pid: int) -> int:
    fields = _read(f"/proc/{pid}/statm").split()
    if fields:
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "linux":
        return 0
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return 0


def _proportional(pid: int) -> int:
    for line in _read(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return _resident(pid)


def kill_tree(pid: int) -> None:
    """Kill everything below `pid`, again and again until nothing is left (not `pid` itself); reaps what is its own."""
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        alive = [child for child in descendants(pid) if _is_alive(child)]
        for child in alive:
            try:
                os.kill(child, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                continue  # gone meanwhile, or not ours to end
        if pid == os.getpid():
            _reap_all()
        if not alive:
            return
        time.sleep(0.005)


def _reap_all() -> None:
    try:
        while os.waitpid(-1, os.WNOHANG)[0]:
            continue
    except ChildProcessError:
        return


def _is_alive(pid: int) -> bool:
    stat = _read(f"/proc/{pid}/stat")
    if stat:
        return stat.rpartition(")")[2].split()[0] != "Z"
    return sys.platform != "linux"


def commands(pid: int) -> list[str]:
    """What the processes below `pid` are running, shortened: a compiler that hangs shows here."""
    lines = [_read(f"/proc/{child}/cmdline").replace("\0", " ").strip() for child in descendants(pid)]
    return [line[:160] for line in lines if line][:4]
