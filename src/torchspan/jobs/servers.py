"""The compile servers of this process: started when a job needs one, asked for jobs, ended with the program."""

from __future__ import annotations

import atexit
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchspan.environment.scope import active_environment
from torchspan.jobs import processes, server
from torchspan.jobs.folders import sweep
from torchspan.jobs.turns import turns

# importing torch, dynamo and inductor takes seconds of CPU (7 to 9 s where this was measured); a fork of a process that has
# done so takes a hundredth of one
PRELOAD = ("torch", "torch._dynamo", "torch._inductor.compile_fx")
UNWIND_S = 2.0  # how long the end of the program waits for the threads that wait for a job
# what torch reads from the environment at import: a server that read another value is of no use
_AT_IMPORT = re.compile(r"(TORCH|PYTORCH|TRITON|CUDA|INDUCTOR|AOT|CXX|CC$|OMP_|MKL_|KMP_|LD_|PYTHON|NCCL|GLOO)")
_AT_USE = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", *server.QUIET)  # of the last, a server has values of its own


class ServersEndedError(Exception):
    """No server is started any more: its text says why."""


def child_environ() -> dict[str, str]:
    """The environment variables of a child: the caller's, and those that put the active Environment in force there too."""
    environment = active_environment()
    settings: Mapping[str, str] = getattr(environment, "settings", {}) if environment else {}
    return {**os.environ, **settings, "TORCHSPAN_COMPILE": "off", "TORCHSPAN_REPORT_PARTS": ""}


@dataclass
class Connection:
    """A compile server and the jobs that it has."""

    process: subprocess.Popen[bytes]
    channel: socket.socket
    import_environ: Mapping[str, str]  # what it read when it imported torch
    why_ended: str | None = None  # where it was ended on purpose
    num_users: int = 0  # jobs that wait for it to be ready, or that it has
    ready: threading.Event = field(default_factory=threading.Event)  # it is, or it ended
    waiting: dict[str, threading.Event] = field(default_factory=dict)
    wardens: dict[str, int] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def is_alive(self) -> bool:
        return self.process.poll() is None

    def submit(self, folder: Path, deadline: float, limit_bytes: int | None) -> threading.Event:
        """Have it run the job in `folder`; gives an event that is set when the job has ended, in whatever way."""
        done = threading.Event()
        with self.lock:
            self.waiting[str(folder)] = done
        request = {"do": "run", "job": str(folder), "folder": str(folder), "deadline": deadline, "limit_bytes": limit_bytes}
        self._say(request)
        if not self.is_alive:
            done.set()
        return done

    def cancel(self, folder: Path) -> None:
        """Have it end the job in `folder`."""
        self._say({"do": "cancel", "job": str(folder)})

    def end_job(self, folder: Path) -> None:
        """End a job whose warden does not end it; or the server, if it has not even started one."""
        with self.lock:
            warden = self.wardens.get(str(folder))
        if warden is None:
            self.end(None)
            return
        processes.kill_tree(warden)
        with suppress(ProcessLookupError):
            os.kill(warden, signal.SIGKILL)

    def end(self, why: str | None) -> None:
        """Kill the server and everything below it."""
        self.why_ended = why
        processes.kill_tree(self.process.pid)
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self.channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return  # it is gone: listen() releases those who wait

    def listen(self) -> None:
        """Handle the server's messages until it is gone; then release those who wait for it."""
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
        self.ready.set()
        with self.lock:
            for done in self.waiting.values():
                done.set()

    def _hear(self, message: dict[str, Any]) -> None:
        if "ready" in message:
            self.ready.set()
        with self.lock:
            if "warden" in message:
                self.wardens[message["job"]] = message["warden"]
            job = message.get("done", "")
            self.wardens.pop(job, None)
            done = self.waiting.pop(job, None)
        if done is not None:
            done.set()


class _Servers:
    """The servers of a process: at most one with torch imported, and one without, get jobs."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_kind: dict[bool, Connection] = {}
        self._replaced: list[Connection] = []  # by one that has read other environment variables
        self._why_closed: str | None = None
        atexit.register(self.close)
        os.register_at_fork(after_in_child=self._forget)

    def get(self, is_fresh: bool, module: str) -> Connection:
        """The server of this kind, which has one more user now; a new one imports `module` besides torch.

        Raises ServersEndedError when the program is about to end.
        """
        import_environ = {name: value for name, value in child_environ().items() if _matters_at_import(name)}
        with self._lock:
            if self._why_closed is not None:
                raise ServersEndedError(self._why_closed)
            connection = self._by_kind.get(is_fresh)
            if connection is None or not connection.is_alive or connection.import_environ != import_environ:
                self._retire(connection)
                connection = self._by_kind[is_fresh] = _start_server(import_environ, is_fresh, module)
            connection.num_users += 1
            return connection

    def _retire(self, replaced: Connection | None) -> None:
        if replaced is not None:
            self._replaced.append(replaced)
        for connection in tuple(self._replaced):
            if not connection.num_users:
                self._replaced.remove(connection)
                connection.end(None)

    def give_back(self, connection: Connection) -> None:
        """Note that it has one user less."""
        with self._lock:
            connection.num_users -= 1

    def end_if_alone(self, connection: Connection) -> None:
        """End a server that hangs, unless other jobs wait for it too."""
        with self._lock:
            if connection.num_users == 1:
                connection.end(None)

    def pids(self) -> list[int]:
        """The servers that are running."""
        with self._lock:
            return [connection.process.pid for connection in (*self._by_kind.values(), *self._replaced) if connection.is_alive]

    def end(self, why: str) -> tuple[Connection, ...]:
        """End the servers with what they run, and cancel jobs that wait for a turn; later jobs may start new servers."""
        turns.end()
        with self._lock:
            ended = (*self._by_kind.values(), *self._replaced)
            for connection in ended:
                connection.end(why)
            self._by_kind.clear()
            self._replaced.clear()
        return ended

    def close(self) -> None:
        """At the end of the program: end the servers, start no more, and let the threads that wait for them finish."""
        self._why_closed = "the program ended first"
        ended = self.end(self._why_closed)
        deadline = time.monotonic() + UNWIND_S
        while any(connection.num_users for connection in ended) and time.monotonic() < deadline:
            time.sleep(0.01)

    def _forget(self) -> None:
        """In a fork (a data loader's worker): the servers belong to the process that forked."""
        for connection in (*self._by_kind.values(), *self._replaced):
            connection.channel.close()
        self._by_kind, self._replaced = {}, []
        self._lock = threading.Lock()


def _matters_at_import(name: str) -> bool:
    return bool(_AT_IMPORT.match(name)) and name not in _AT_USE


def _start_server(import_environ: Mapping[str, str], is_fresh: bool, module: str) -> Connection:
    sweep()
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
    connection = Connection(process, ours, dict(import_environ))
    try:
        threading.Thread(target=connection.listen, name="torchspan-compile-server", daemon=True).start()
    except RuntimeError:  # no thread to be had
        connection.end(None)
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


servers = _Servers()


def run_on_server(is_fresh: bool, module: str, use: Callable[[Connection], dict[str, Any] | None]) -> dict[str, Any] | None:
    """Call `use` with a server of this kind; gives its result."""
    connection = servers.get(is_fresh, module)
    try:
        return use(connection)
    finally:
        servers.give_back(connection)
