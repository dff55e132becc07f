"""Runs a job in a child process inside a Budget: it cannot hang, crash or eat the process that asks for it."""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torchspan.core.report import Attempt, Outcome
from torchspan.core.text import format_bytes
from torchspan.environment.scope import active_environment
from torchspan.jobs import server
from torchspan.jobs.budget import Budget

# importing torch, dynamo and inductor takes seconds of CPU (7 to 9 s where this was measured); a fork of a process that has
# done so takes a hundredth of one
PRELOAD = ("torch", "torch._dynamo", "torch._inductor.compile_fx")
GRACE_S = 2.0
EVENTS_VARIABLE = "TORCHSPAN_COMPILE_EVENTS"  # tells a worker which file to note into what the compiler does
# what torch reads from the environment at import: a server that read another value is of no use
_AT_IMPORT = re.compile(r"(TORCH|PYTORCH|TRITON|CUDA|INDUCTOR|AOT|CXX|CC$|OMP_|MKL_|KMP_|LD_|PYTHON|NCCL|GLOO)")
_AT_USE = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


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


def run_bounded(job: Job, budget: Budget, cancel: threading.Event | None = None) -> Ending:
    """Run `job` in a child process inside `budget`; blocks until it ended, and leaves none of its processes running.

    Setting `cancel` ends it early. Nothing is raised for what goes wrong in the child: the Ending says it.
    """
    started = time.monotonic()
    deadline = started + budget.seconds
    folder: Path | None = None
    try:
        folder = Path(tempfile.mkdtemp(prefix="torchspan-job-"))
        _write_job(folder, job)
        verdict = _ask_server(job, folder, deadline, budget, cancel)
        ending = _judge(verdict, folder, budget, time.monotonic() - started)
        return replace(ending, **_seen(verdict, folder))
    except Exception as cause:  # noqa: BLE001 - no space for the payload, no process or thread to start, no interpreter
        return Ending("failed", time.monotonic() - started, cause=f"{type(cause).__name__}: {cause}", where="starting the job")
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_job(folder: Path, job: Job) -> None:
    (folder / "payload").write_bytes(job.payload)
    described = {
        "function": job.function,
        "environ": child_environ(),
        "path": [os.path.abspath(entry) for entry in sys.path],
        "argv": [str(one) for one in sys.argv],
        "cwd": os.getcwd(),
    }
    if job.record:
        described["environ"] = {**child_environ(), EVENTS_VARIABLE: str(folder / "events")}
    (folder / "job.json").write_text(json.dumps(described))


def child_environ() -> dict[str, str]:
    """The environment variables of a child: the caller's, and those that put the active Environment in force there too."""
    environment = active_environment()
    settings: Mapping[str, str] = getattr(environment, "settings", {}) if environment else {}
    return {**os.environ, **settings, "TORCHSPAN_COMPILE": "off", "TORCHSPAN_REPORT_PARTS": ""}


def _ask_server(
    job: Job, folder: Path, deadline: float, budget: Budget, cancel: threading.Event | None
) -> dict[str, Any] | None:
    server = _servers.get(job.fresh, job.function.partition(":")[0])
    done = server.submit(folder, deadline, budget.limit_bytes)
    is_cancelled = False
    while not done.wait(0.05):
        if job.tick is not None:
            _tick(job.tick, folder, server)
        if cancel is not None and cancel.is_set() and not is_cancelled:
            server.cancel(folder)
            is_cancelled = True
            if not server.is_ready:  # it still imports torch: it will read this when it is done, before it starts anything
                return {"outcome": "cancelled"}
        if time.monotonic() > deadline + GRACE_S or (not server.is_ready and time.monotonic() > deadline):
            server.end()  # the server itself hangs: importing torch, most likely
            break
    verdict = folder / "verdict.json"
    if verdict.exists():
        return dict(json.loads(verdict.read_text()))
    return {"outcome": "timeout", "where": None, "in_server": True} if time.monotonic() > deadline else None


def _tick(tick: Callable[[Path], None], folder: Path, server: _Connection) -> None:
    try:
        tick(folder)
    except BaseException:  # nobody will wait for the job any longer
        server.cancel(folder)
        raise


def _seen(verdict: dict[str, Any] | None, folder: Path) -> dict[str, Any]:
    """What was seen of a worker, however it ended."""
    known = verdict or {}
    return {
        "stack": _text(folder / "stack.txt") or None,
        "commands": tuple(known.get("commands", ())),
        "events": _text(folder / "events"),
        "memory": tuple((when, used) for when, used in known.get("memory", ())),
    }


def _text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _judge(verdict: dict[str, Any] | None, folder: Path, budget: Budget, seconds: float) -> Ending:
    """What a warden's verdict and a worker's result mean."""
    if verdict is None:
        return Ending("crashed", seconds, cause="the compile server ended before the job did", where="compile server")
    peak = verdict.get("peak_bytes") or None
    outcome = verdict["outcome"]
    if outcome == "timeout":
        where = "starting: importing torch" if verdict.get("in_server") else _where(verdict)
        return Ending("timeout", seconds, peak, f"not done after {budget.seconds:.4g} s; ended", where)
    if outcome == "memory":
        limit = format_bytes(budget.limit_bytes or 0)
        return Ending("memory", seconds, peak, f"used {format_bytes(peak or 0)} of {limit}; ended", _where(verdict))
    if outcome == "cancelled":
        return Ending("cancelled", seconds, peak, "cancelled", None)
    result = folder / "result"
    if result.exists() and outcome == "exit":
        return _judge_result(result.read_bytes(), seconds, peak)
    return _judge_crash(verdict, folder, seconds, peak)


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
    ours = os.path.abspath(server.__file__)
    return "; ".join(f"{file}:{line} in {name}" for file, line, name in frames[:8] if file != ours) or None


# the servers


@dataclass
class _Connection:
    """A compile server and the jobs that it has."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    wanted: Mapping[str, str]
    is_ready: bool = False
    waiting: dict[str, threading.Event] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def submit(self, folder: Path, deadline: float, limit_bytes: int | None) -> threading.Event:
        done = threading.Event()
        with self.lock:
            self.waiting[str(folder)] = done
        request = {"do": "run", "job": str(folder), "folder": str(folder), "deadline": deadline, "limit_bytes": limit_bytes}
        self._say(request)
        if not self.is_alive:
            done.set()
        return done

    def cancel(self, folder: Path) -> None:
        self._say({"do": "cancel", "job": str(folder)})

    def end(self) -> None:
        """Kill the server and everything below it."""
        server.kill_tree(self.process.pid)
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self.channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # it is gone: whoever waits is told by listen()

    def listen(self) -> None:
        """Pass on what the server says, until it is gone; then nobody waits for it any longer."""
        buffer = b""
        try:
            while chunk := self.channel.recv(65536):
                *lines, buffer = (buffer + chunk).split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
        except (OSError, ValueError):
            pass  # the channel was closed by end(), or carried what no server says: the same as its end
        self.channel.close()
        self.process.wait()
        with self.lock:
            for done in self.waiting.values():
                done.set()

    def _hear(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.is_ready = True
        with self.lock:
            done = self.waiting.pop(message.get("done", ""), None)
        if done is not None:
            done.set()


class _Servers:
    """At most two servers a process: one with torch imported, one without."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_kind: dict[bool, _Connection] = {}
        atexit.register(self.end)
        os.register_at_fork(after_in_child=self._forget)

    def get(self, is_fresh: bool, module: str) -> _Connection:
        """The server of this kind; a new one imports `module` besides torch."""
        wanted = {name: value for name, value in child_environ().items() if _matters_at_import(name)}
        with self._lock:
            known = self._by_kind.get(is_fresh)
            if known is not None and known.is_alive and known.wanted == wanted:
                return known
            if known is not None and known.is_alive and not known.waiting:
                known.end()
            self._by_kind[is_fresh] = _start_server(wanted, is_fresh, module)
            return self._by_kind[is_fresh]

    def pids(self) -> list[int]:
        """The servers that are running."""
        with self._lock:
            return [one.process.pid for one in self._by_kind.values() if one.is_alive]

    def end(self) -> None:
        with self._lock:
            for connection in self._by_kind.values():
                connection.end()
            self._by_kind.clear()

    def _forget(self) -> None:
        """In a fork of the user's process (a data loader's worker): the servers are not its own."""
        for connection in self._by_kind.values():
            connection.channel.close()
        self._by_kind = {}
        self._lock = threading.Lock()


def _matters_at_import(name: str) -> bool:
    return bool(_AT_IMPORT.match(name)) and name not in _AT_USE


def _start_server(wanted: Mapping[str, str], is_fresh: bool, module: str) -> _Connection:
    ours, theirs = socket.socketpair()
    environ = child_environ()
    start = {
        "path": [os.path.abspath(entry) for entry in sys.path],
        "preload": () if is_fresh else (*PRELOAD, module),
        "quiet": server.QUIET,
        "environ": {name: environ.get(name) for name in server.QUIET},
        "parent": os.getpid(),
    }
    try:
        process = _server_process(theirs, environ, start)
    except BaseException:
        ours.close()
        raise
    finally:
        theirs.close()
    connection = _Connection(process, ours, dict(wanted))
    try:
        threading.Thread(target=connection.listen, name="torchspan-compile-server", daemon=True).start()
    except RuntimeError:  # no thread to be had
        connection.end()
        raise
    return connection


def _server_process(channel: socket.socket, environ: Mapping[str, str], start: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, server.__file__, str(channel.fileno()), json.dumps(start)],
        pass_fds=[channel.fileno()],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


_servers = _Servers()


def server_pids() -> list[int]:
    """The compile servers that this process keeps; each is idle unless a job runs, and ends with this process."""
    return _servers.pids()


def end_servers() -> None:
    """End the compile servers now, with whatever they run."""
    _servers.end()
