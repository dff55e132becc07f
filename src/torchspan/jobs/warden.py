"""The two processes of a job: the warden, which keeps its limits, and the worker, which runs it. Imports nothing of torch."""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from torchspan.jobs import processes

POLL_S = 0.02
DUMP_WAIT_S = 0.4
LOG_BYTES = 8192
MEMORY_STEP = 4 * 1024 * 1024  # how much more or less memory is noted, with the time


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
        processes.become_subreaper()
        signal.signal(signal.SIGTERM, self._cancel)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        log_read, log_write = os.pipe()
        warden = os.getpid()
        worker = os.fork()
        if worker == 0:
            os.close(log_read)
            run_and_leave(lambda: work(self._folder, warden, log_write))
        os.close(log_write)
        os.set_blocking(log_read, False)
        verdict = self._watch(worker, log_read)
        processes.kill_tree(warden)
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
                return {"outcome": over, "where": where, "commands": processes.commands(worker)}

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
        used_bytes = processes.tree_bytes(worker, self._limit)
        self._peak = max(self._peak, used_bytes)
        if not self._memory or abs(used_bytes - self._memory[-1][1]) > MEMORY_STEP:
            self._memory.append((time.time_ns(), used_bytes))
            self._show(used_bytes)
        if self._limit is not None and used_bytes > self._limit:
            return "memory"
        return "timeout" if time.monotonic() > self._deadline else None

    def _show(self, used_bytes: int) -> None:
        """Write the figure to where progress is shown from; on a full disk it is not shown."""
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
    processes.die_with_parent(warden)
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


def run_and_leave(function: Any) -> NoReturn:
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
