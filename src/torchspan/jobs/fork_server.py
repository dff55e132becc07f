"""What the compile server does once torch is imported: it forks a guarded worker for each job. Imports nothing of torch."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import time
from typing import Any

from torchspan.jobs import processes
from torchspan.jobs.warden import Warden, run_and_leave

IDLE_S = 120.0


class ForkServer:
    """Takes requests for jobs from a socket, and forks a warden for each."""

    def __init__(self, connection: socket.socket, parent: int, environ: dict[str, str | None]) -> None:
        self._connection = connection
        self._parent = parent
        self._environ = environ
        self._wardens: dict[int, str] = {}
        self._buffer = b""

    def run(self) -> None:
        """Answer requests until the parent is gone or nothing was asked for a while."""
        processes.become_subreaper()
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        self._say({"ready": os.getpid(), "threads": processes.num_threads()})
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
            run_and_leave(lambda: self._become_warden(server, request))
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
                processes.kill_tree(os.getpid())  # whatever outlived a warden that was itself killed

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            self._end_all()
            os._exit(0)

    def _end_all(self) -> None:
        """End all jobs and remove their folders: the process that asked for them is gone."""
        folders = list(self._wardens.values())
        for pid in self._wardens:
            os.kill(pid, signal.SIGTERM)
        deadline = time.monotonic() + 2
        while self._wardens and time.monotonic() < deadline:
            for pid in list(self._wardens):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del self._wardens[pid]
            time.sleep(0.01)
        processes.kill_tree(os.getpid())
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
