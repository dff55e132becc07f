"""Runs a job in a child process inside a Budget: it cannot hang, crash or eat the process that asks for it."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torchspan.core.report import Attempt, Outcome
from torchspan.core.text import format_bytes
from torchspan.jobs import fork_server, server, warden
from torchspan.jobs.budget import Budget
from torchspan.jobs.folders import job_folder
from torchspan.jobs.servers import Connection, ServersEndedError, child_environ, run_on_server, servers

GRACE_S = 2.0
_FULL_BYTES = 1 << 16  # free on a disk: a verdict may be larger
EVENTS_VARIABLE = "TORCHSPAN_COMPILE_EVENTS"  # tells a worker which file to note into what the compiler does


@dataclass(frozen=True)
class Job:
    """What a worker runs: `function` (``module:name``, of bytes to bytes) with `payload`.

    `fresh` asks for an interpreter that has not imported torch: what a job on an accelerator needs, where a fork would not do.
    With `record`, what the compiler does is noted while it is done: the Ending's `events`. `tick` is called with the job's
    folder every now and then, while it runs.
    """

    function: str
    payload: bytes
    fresh: bool = False
    record: bool = False
    tick: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Ending:
    """How a job ended: `result` if it ended well, else `cause` and `where`.

    `stack` is faulthandler's whole dump of a worker that was ended or crashed, `commands` what the processes below it ran then;
    `memory` is (nanoseconds since the epoch, bytes of the process tree) each time that these changed. `is_cache_damaged`:
    the job failed on a damaged entry of a cache, which is removed now.
    """

    outcome: Outcome
    seconds: float
    peak_bytes: int | None = None
    cause: str | None = None
    where: str | None = None
    result: bytes | None = None
    traceback: str | None = None
    stack: str | None = None
    commands: tuple[str, ...] = ()
    events: str = ""
    memory: tuple[tuple[int, int], ...] = ()
    is_cache_damaged: bool = False

    def attempt(self, strategy: str, region: str, backend: str) -> Attempt:
        """The Attempt that a Report holds of it."""
        return Attempt(strategy, region, backend, self.outcome, self.seconds, self.peak_bytes, self.cause, self.where)


def run_bounded(job: Job, budget: Budget, cancel: threading.Event | None = None, *, share_s: float | None = None) -> Ending:
    """Run `job` in a child process inside `budget`; blocks until it ended, and leaves none of its processes running.

    `share_s` is what the job itself may take of the budget's seconds, once there is a server that has imported torch: by
    default all that the server's start leaves. Setting `cancel` ends it early. Nothing is raised for what goes wrong in the
    child: the Ending says it.
    """
    run = _Run(job, budget, cancel or threading.Event(), share_s)
    try:
        with job_folder() as folder:
            _write_job(folder, job)
            verdict = run_on_server(job.fresh, job.function.partition(":")[0], partial(run.ask, folder))
            ending = _judge(verdict, folder, run.limit(), run.seconds())
            return replace(ending, **_seen(verdict, folder))
    except ServersEndedError as why:
        return Ending("cancelled", run.seconds(), cause=str(why))
    except Exception as cause:  # noqa: BLE001 - no space for the payload, no process or thread to start, no interpreter
        return Ending("failed", run.seconds(), cause=f"{type(cause).__name__}: {cause}", where="starting the job")


def server_pids() -> list[int]:
    """The compile servers that this process keeps; each is idle unless a job runs, and ends with this process."""
    return servers.pids()


def end_servers() -> None:
    """End the compile servers now, with the jobs that they run and those that wait for a turn."""
    servers.end("the compile servers were ended")


def _write_job(folder: Path, job: Job) -> None:
    (folder / "payload").write_bytes(job.payload)
    described = {
        "function": job.function,
        "environ": child_environ(),
        "path": [os.path.abspath(entry) for entry in sys.path],
        "argv": [str(argument) for argument in sys.argv],
        "cwd": os.getcwd(),
    }
    if job.record:
        described["environ"] = {**child_environ(), EVENTS_VARIABLE: str(folder / "events")}
    (folder / "job.json").write_text(json.dumps(described))


class _Run:
    """One job while it runs: its clock, and its requests to the server."""

    def __init__(self, job: Job, budget: Budget, cancel: threading.Event, share_s: float | None) -> None:
        self._job = job
        self._budget = budget
        self._cancel = cancel
        self._share_s = budget.seconds if share_s is None else min(share_s, budget.seconds)
        self._started = time.monotonic()
        self._deadline = self._started + budget.seconds

    def seconds(self) -> float:
        """The seconds since it began."""
        return time.monotonic() - self._started

    def limit(self) -> _Limit:
        """Its limits, for the text of its Ending."""
        return _Limit(self._share_s, self._budget)

    def ask(self, folder: Path, server: Connection) -> dict[str, Any] | None:
        """Have `server` run it; gives the verdict of its warden, or one of ours where the warden gave none."""
        why_not = self._await_ready(folder, server)
        if why_not is not None:
            return why_not
        self._deadline = min(self._deadline, time.monotonic() + self._share_s)
        done = server.submit(folder, self._deadline, self._budget.limit_bytes)
        self._await_done(folder, server, done)
        if server.why_ended is not None:
            return _cancelled(server.why_ended)
        verdict = folder / "verdict.json"
        if verdict.exists():
            return dict(json.loads(verdict.read_text()))
        if self._cancel.is_set():  # before its warden was there to say so
            return _cancelled()
        if time.monotonic() > self._deadline:
            return {"outcome": "timeout", "where": None}
        return {"outcome": "untold"} if server.is_alive else None

    def _await_ready(self, folder: Path, server: Connection) -> dict[str, Any] | None:
        """Wait until the server has imported torch; gives a verdict if that takes too long."""
        while not server.ready.wait(0.05):
            self._tick(folder, server)
            if self._cancel.is_set():
                return _cancelled()
            if time.monotonic() > self._deadline:
                servers.end_if_alone(server)  # it hangs while it imports torch
                return {"outcome": "timeout", "where": None, "in_server": True}
        return _cancelled(server.why_ended) if server.why_ended is not None else None

    def _await_done(self, folder: Path, server: Connection, done: threading.Event) -> None:
        is_cancelled = is_late = False
        while not done.wait(0.05):
            self._tick(folder, server)
            if self._cancel.is_set() and not is_cancelled:
                server.cancel(folder)
                is_cancelled = True
            if time.monotonic() > self._deadline + GRACE_S and not is_late:
                server.end_job(folder)
                is_late = True

    def _tick(self, folder: Path, server: Connection) -> None:
        if self._job.tick is None:
            return
        try:
            self._job.tick(folder)
        except BaseException:  # then no caller waits for the job any longer
            server.cancel(folder)
            raise


def _cancelled(why: str = "cancelled") -> dict[str, Any]:
    return {"outcome": "cancelled", "why": why}


@dataclass(frozen=True)
class _Limit:
    """The seconds that a job had for itself, and the budget that they are of."""

    share_s: float
    budget: Budget

    def __str__(self) -> str:
        if self.share_s == self.budget.seconds:
            return f"{self.budget.seconds:.4g} s"
        return f"{self.share_s:.4g} s, its share of {self.budget.seconds:.4g} s"


def _seen(verdict: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """What an Ending says about a worker, however it ended."""
    fields = verdict or {}
    return {
        "stack": _text(folder / "stack.txt") or None,
        "commands": tuple(fields.get("commands", ())),
        "events": _text(folder / "events"),
        "memory": tuple((when, used_bytes) for when, used_bytes in fields.get("memory", ())),
    }


def _free_bytes(folder: Path) -> int:
    """What may yet be written there."""
    disk = os.statvfs(folder)
    return disk.f_bavail * disk.f_frsize


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _judge(verdict: dict[str, Any] | None, folder: Path, limit: _Limit, seconds: float) -> Ending:
    """The Ending for a warden's verdict and a worker's result."""
    if verdict is None:
        return Ending("crashed", seconds, cause="the compile server ended before the job did", where="compile server")
    peak = verdict.get("peak_bytes") or None
    outcome = verdict["outcome"]
    if outcome == "timeout":
        is_starting = verdict.get("in_server")
        took = f"{limit.budget.seconds:.4g} s" if is_starting else str(limit)
        where = "starting: importing torch" if is_starting else _where(verdict)
        return Ending("timeout", seconds, peak, f"not done after {took}; ended", where)
    if outcome == "memory":
        used, of_bytes = format_bytes(peak or 0), format_bytes(limit.budget.limit_bytes or 0)
        return Ending("memory", seconds, peak, f"used {used} of {of_bytes}; ended", _where(verdict))
    if outcome == "cancelled":
        return Ending("cancelled", seconds, peak, verdict.get("why", "cancelled"), None)
    result = folder / "result"
    if result.exists() and outcome in ("exit", "untold"):
        return _judge_result(result.read_bytes(), seconds, peak)
    if outcome == "untold":
        return _judge_untold(folder, seconds)
    return _judge_crash(verdict, folder, seconds, peak)


def _judge_untold(folder: Path, seconds: float) -> Ending:
    """What it means that a warden left no verdict, although its server is alive."""
    if _free_bytes(folder) < _FULL_BYTES:
        cause = f"the disk of {folder.parent} is full: how the job ended could not be written"
        return Ending("failed", seconds, cause=cause, where="ending the job")
    cause = "the process that watches the job ended before it did"
    return Ending("crashed", seconds, cause=cause, where="compile server")


def _judge_result(content: bytes, seconds: float, peak: int | None) -> Ending:
    if content[:1] == b"+":
        return Ending("compiled", seconds, peak, result=content[1:])
    failure = json.loads(content[1:])
    return Ending(
        "failed",
        seconds,
        peak,
        failure["cause"],
        failure["where"],
        traceback=failure["traceback"],
        is_cache_damaged=failure["is_cache_damaged"],
    )


def _judge_crash(verdict: dict[str, Any], folder: Path, seconds: float, peak: int | None) -> Ending:
    stack = folder / "stack.txt"
    where = summarise_stack(stack.read_text(errors="replace")) if stack.exists() else None
    if verdict["outcome"] == "signal":
        cause = f"the compile process was ended by {verdict['signal']}"
    else:
        cause = f"the compile process exited with code {verdict['code']} before it was done"
    last = verdict.get("log", "").strip().splitlines()[-1:]
    return Ending("crashed", seconds, peak, ": ".join([cause, *last])[:500], where)


def _where(verdict: dict[str, Any]) -> str | None:
    parts = [summarise_stack(verdict.get("where") or "")]
    parts += [f"while running {command}" for command in verdict.get("commands", ())]
    return "; ".join(part for part in parts if part) or None


def summarise_stack(dump: str) -> str | None:
    """The innermost frames of the main thread (faulthandler writes it last), innermost first.

    >>> summarise_stack('Current thread 0x1 (most recent call first):\\n  File "/a/b.py", line 3 in spin\\n')
    '/a/b.py:3 in spin'
    """
    thread = dump.rpartition("hread 0x")[2]
    frames = re.findall(r'File "([^"]+)", line (\d+) in (\S+)', thread)
    ours = [os.path.abspath(str(module.__file__)) for module in (server, fork_server, warden)]
    return "; ".join(f"{file}:{line} in {name}" for file, line, name in frames[:8] if file not in ours) or None
