"""Starts the compile server: a process without threads that holds torch ready and forks one guarded worker a job.

It is started by file name in a fresh interpreter (never forked from the user's process, which has threads). Then it reads one
JSON line a request, see :mod:`.fork_server`. There are three kinds of process::

    server   imports torch once, then forks a warden a job; ends when its parent ends, or after it was idle for a while
    warden   the parent (and, on Linux, the subreaper) of everything that a job starts: it watches the clock and the
             memory, asks a worker that is out of time where it is, and kills the whole tree
    worker   runs the job: a function of ours with a pickled payload

The warden depends on no other process: it keeps the limits even if the user's process holds the GIL for minutes, or is gone.
This file imports torch and torchspan only after it has set the path and the variables that its parent sent, see :func:`main`.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import signal
import socket
import sys
from collections.abc import Iterator

ALARM_S = 0.5
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
        from torchspan.jobs.fork_server import ForkServer  # by the path that was set above
    gc.freeze()  # or a collection in a fork would copy the pages of all these objects
    gc.enable()
    ForkServer(connection, start["parent"], start["environ"]).run()
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


if __name__ == "__main__":
    main()
