"""The compile server: a process without threads that holds torch ready and forks one guarded worker a job.

Started by file name in a fresh interpreter (never forked from the user's process, which has threads), it reads one JSON line a
request. Three kinds of process::

    server   imports torch once, then forks a warden a job; ends when its parent ends, or after it was idle for a while
    warden   the parent (and, on Linux, the subreaper) of everything that a job starts: it watches the clock and the
             memory, asks a worker that is out of time where it is, and kills the whole tree
    worker   runs the job: a function of ours with a pickled payload

The warden stands alone: it keeps the limits even if the user's process holds the GIL for minutes, or is gone.
This file imports nothing of torchspan and nothing of torch before it is asked to.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

POLL_S = 0.02
ALARM_S = 0.5
IDLE_S = 120.0
DUMP_WAIT_S = 0.4
LOG_BYTES = 8192
MEMORY_STEP = 4 * 1024 * 1024  # how much more or less memory is noted, with the time
PR_SET_CHILD_SUBREAPER = 36
PR_SET_PDEATHSIG = 1
HAS_PROC_CHILDREN = os.path.exists(f"/proc/self/task/{os.getpid()}/children")
# what the user's environment holds, and the server changes for itself so that importing torch starts no thread and no process
QUIET = {"OPENBLAS_NUM_THREADS": "1", "TORCH_WARM_POOL": "0", "TORCHINDUCTOR_COMPILE_THREADS": "1"}


def main() -> None:
    """Serve jobs on the socket whose number is the first argument; the second is a JSON list of modules to import first."""
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    start = json.loads(sys.argv[2])
    sys.path[:] = start["path"]  # without this file's folder: its plug-ins are no top-level modules
    os.environ.update(start["quiet"])
    gc.disable()  # imports make objects that stay: to look through them again and again takes a tenth of the start
    with _ending_with(start["parent"]):
        for name in start["preload"]:
            importlib.import_module(name)
    gc.freeze()  # nor are they copied into each fork by a collection there
    gc.enable()
    _Server(connection, start["parent"], start["environ"]).run()
    os._exit(0)  # taking an interpreter with torch in it down takes seconds


@contextlib.contextmanager
def _ending_with(parent: int) -> Iterator[None]:
    """End soon after `parent`, also in the middle of an import, which takes seconds and may hang."""

    def look(number: int, frame: object) -> None:
        if os.getppid() != parent:
            os._exit(0)

    signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, ALARM_S, ALARM_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


class _Server:
    def __init__(self, connection: socket.socket, parent: int, environ: dict[str, str | None]) -> None:
        self._connection = connection
        self._parent = parent
        self._environ = environ
        self._wardens: dict[int, str] = {}
        self._buffer = b""

    def run(self) -> None:
        """Answer requests until the parent is gone or nothing was asked for a while."""
        become_subreaper()
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._say({"ready": os.getpid(), "threads": _num_threads()})
        last = time.monotonic()
        while os.getppid() == self._parent:
            ready, _, _ = select.select([self._connection, wake_read], [], [], 0.5)
            if wake_read in ready:
                os.read(wake_read, 4096)
            if self._connection in ready and not self._receive():
                break
            self._reap()
            if ready or self._wardens:
                last = time.monotonic()
            elif time.monotonic() - last > IDLE_S:
                break
        self._end_all()

    def _receive(self) -> bool:
        try:
            chunk = self._connection.recv(65536)
        except ConnectionError:
            return False
        self._buffer += chunk
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            self._obey(json.loads(line))
        return bool(chunk)

    def _obey(self, request: dict[str, Any]) -> None:
        if request["do"] == "cancel":
            for pid, job in self._wardens.items():
                if job == request["job"]:
                    os.kill(pid, signal.SIGTERM)
            return
        server = os.getpid()
        pid = os.fork()
        if pid == 0:
            _run_and_leave(lambda: self._become_warden(server, request))
        self._wardens[pid] = request["job"]
        self._say({"warden": pid, "job": request["job"]})

    def _become_warden(self, server: int, request: dict[str, Any]) -> None:
        signal.set_wakeup_fd(-1)
        self._connection.close()
        for name, value in self._environ.items():  # what was changed for the server only
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        Warden(server, request).run()

    def _reap(self) -> None:
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            job = self._wardens.pop(pid, None)
            if job is not None:
                self._say({"done": job})
            if not self._wardens:
                kill_tree(os.getpid())  # whatever outlived a warden that was itself killed

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._end_all()
            os._exit(0)

    def _end_all(self) -> None:
        """End all jobs, whose maker is gone: their folders go too."""
        folders = list(self._wardens.values())
        for pid in self._wardens:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 2
        while self._wardens and time.monotonic() < deadline:
            for pid in list(self._wardens):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del self._wardens[pid]
            time.sleep(0.01)
        kill_tree(os.getpid())
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)


class Warden:
    """Runs one job in a worker below it, inside its limits, and writes ``verdict.json`` into the job's folder."""

    def __init__(self, server: int, request: dict[str, Any]) -> None:
        self._server = server
        self._folder = Path(request["folder"])
        self._deadline = request["deadline"]
        self._limit = request["limit_bytes"]
        self._started = time.monotonic()
        self._peak = 0
        self._memory: list[tuple[int, int]] = []
        self._cancelled = False
        self._tail = b""

    def run(self) -> None:
        """Start the worker, watch it, end everything, and say how it went."""
        become_subreaper()
        signal.signal(signal.SIGTERM, self._cancel)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        log_read, log_write = os.pipe()
        warden = os.getpid()
        worker = os.fork()
        if worker == 0:
            os.close(log_read)
            _run_and_leave(lambda: work(self._folder, warden, log_write))
        os.close(log_write)
        os.set_blocking(log_read, False)
        verdict = self._watch(worker, log_read)
        kill_tree(warden)
        self._write({**verdict, "peak_bytes": self._peak, "memory": self._memory, "log": self._tail.decode(errors="replace")})

    def _cancel(self, number: int, frame: object) -> None:
        self._cancelled = True

    def _watch(self, worker: int, log: int) -> dict[str, Any]:
        wait_on = [log]
        if hasattr(os, "pidfd_open"):
            wait_on.append(os.pidfd_open(worker))
        while True:
            ready, _, _ = select.select(wait_on, [], [], POLL_S)
            if log in ready and not self._read_log(log):
                wait_on.remove(log)
            pid, status = os.waitpid(worker, os.WNOHANG)
            if pid:
                self._read_log(log)
                return _ended(status)
            over = self._over_limit(worker)
            if over:
                where = self._ask_where(worker) if over in ("timeout", "memory") else None
                return {"outcome": over, "where": where, "commands": _commands(worker)}

    def _read_log(self, log: int) -> bool:
        while True:
            try:
                chunk = os.read(log, 65536)
            except BlockingIOError:
                return True
            if not chunk:
                return False
            self._tail = (self._tail + chunk)[-LOG_BYTES:]

    def _over_limit(self, worker: int) -> str | None:
        if self._cancelled or os.getppid() != self._server:
            return "cancelled"
        used_bytes = tree_bytes(worker, self._limit)
        self._peak = max(self._peak, used_bytes)
        if not self._memory or abs(used_bytes - self._memory[-1][1]) > MEMORY_STEP:
            self._memory.append((time.time_ns(), used_bytes))
            self._show(used_bytes)
        if self._limit is not None and used_bytes > self._limit:
            return "memory"
        return "timeout" if time.monotonic() > self._deadline else None

    def _show(self, used_bytes: int) -> None:
        """Leave the figure for whoever shows it while it runs; where the disk is full, nobody sees it."""
        with contextlib.suppress(OSError):
            (self._folder / "used").write_text(str(used_bytes))

    def _ask_where(self, worker: int) -> str | None:
        """The worker's stack: faulthandler writes it from a signal handler, even while the GIL is held."""
        stack = self._folder / "stack.txt"
        try:
            os.kill(worker, signal.SIGUSR1)
        except ProcessLookupError:
            return None
        deadline, size = time.monotonic() + DUMP_WAIT_S, -1
        while time.monotonic() < deadline:
            time.sleep(0.01)
            before, size = size, stack.stat().st_size if stack.exists() else 0
            if size and size == before:
                break
        return stack.read_text(errors="replace") if stack.exists() else None

    def _write(self, verdict: dict[str, Any]) -> None:
        if not self._folder.exists():
            return
        part = self._folder / "verdict.part"
        part.write_text(json.dumps({"seconds": time.monotonic() - self._started, **verdict}))
        part.rename(self._folder / "verdict.json")


def _ended(status: int) -> dict[str, Any]:
    if os.WIFSIGNALED(status):
        return {"outcome": "signal", "signal": signal.Signals(os.WTERMSIG(status)).name}
    return {"outcome": "exit", "code": os.WEXITSTATUS(status)}


# the worker


def work(folder: Path, warden: int, log: int) -> None:
    """Run the job in `folder`: ``job.json`` names the function, ``payload`` is what it gets, ``result`` what it gave."""
    die_with_parent(warden)
    os.setsid()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDONLY)
    for descriptor, source in ((0, null), (1, log), (2, log)):
        os.dup2(source, descriptor)
    stack = (folder / "stack.txt").open("w")
    faulthandler.enable(stack)
    faulthandler.register(signal.SIGUSR1, stack)
    job = json.loads((folder / "job.json").read_text())
    os.environ.clear()
    os.environ.update(job["environ"])
    sys.path[:] = job["path"]
    sys.argv[:] = job["argv"]
    os.chdir(job["cwd"])
    module, _, name = job["function"].partition(":")
    part = folder / "result.part"
    try:
        result = getattr(importlib.import_module(module), name)((folder / "payload").read_bytes())
        part.write_bytes(b"+" + result)
    except Exception as cause:  # noqa: BLE001 - the user's code and a foreign compiler: recorded, and judged by the parent
        part.write_bytes(b"-" + json.dumps(_describe(cause)).encode())
    part.rename(folder / "result")


def _describe(cause: Exception) -> dict[str, Any]:
    deepest: BaseException = cause
    while deepest.__cause__ is not None:
        deepest = deepest.__cause__
    frames = traceback.extract_tb(deepest.__traceback__)
    where = "; ".join(f"{f.filename}:{f.lineno} in {f.name}" for f in reversed(frames[-4:]) if f.filename != __file__)
    return {
        "cause": f"{type(cause).__name__}: {cause}",
        "where": where,
        "traceback": traceback.format_exc(),
        "is_cache_damaged": getattr(cause, "is_cache_damaged", False),
    }


def _run_and_leave(function: Any) -> NoReturn:
    """Run `function` in a forked process and end without the clean-up of the process that it was forked from."""
    code = 1
    try:
        function()
        code = 0
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:  # noqa: BLE001 - shown in the log, which the verdict carries
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


# processes


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


def _num_threads() -> int:
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


def _commands(pid: int) -> list[str]:
    """What the processes below `pid` are running, shortened: a compiler that hangs shows here."""
    lines = [_read(f"/proc/{child}/cmdline").replace("\0", " ").strip() for child in descendants(pid)]
    return [line[:160] for line in lines if line][:4]


if __name__ == "__main__":
    main()
