"""How a failed rank reports its error to the launcher, which shows one error, whichever rank it was."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from torchspan.core.errors import TorchspanError

FAILURE_FILE = "TORCHSPAN_FAILURE_FILE"
"""The environment variable by which the launcher names the file that a rank writes its failure to."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Failure:
    """How a rank failed: one `line`, the `trace` if the error is not torchspan's, the exit code, and the time in seconds."""

    line: str
    trace: str | None
    exit_code: int
    at_s: float

    @staticmethod
    def of(error: BaseException) -> Failure:
        """What to show of `error`: the message, and the traceback too if the error is not torchspan's."""
        if isinstance(error, TorchspanError):
            return Failure(_one_line(str(error)), None, error.exit_code, time.time())
        trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        exit_code = 128 + signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
        return Failure(_one_line(f"{type(error).__name__}: {error}"), trace, exit_code, time.time())

    @staticmethod
    def read(path: Path) -> Failure | None:
        """The failure in a file, or None where none was written."""
        return Failure(**json.loads(path.read_text())) if path.exists() else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def note_failure(error: BaseException) -> None:
    """Write `error` for the launcher, if there is one, and if none was written before: the first is the cause.

    To be called before a rank leaves its process group: the other ranks fail, too, as soon as it has.
    """
    if FAILURE_FILE not in os.environ:
        return
    path = Path(os.environ[FAILURE_FILE])
    if not path.exists():
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(asdict(Failure.of(error))))
        whole.replace(path)  # at once: the launcher never reads a part


@contextmanager
def telling_launcher() -> Iterator[None]:
    """Leave what is raised inside to the launcher, where there is one, and end with its exit code.

    Under torchrun an error of ours is a line that names the rank; in a process alone nothing changes.
    """
    if FAILURE_FILE in os.environ:
        _die_with_parent()
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        if FAILURE_FILE in os.environ:
            note_failure(error)
            sys.exit(Failure.of(error).exit_code)
        if isinstance(error, TorchspanError) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            sys.stderr.write(f"torchspan: rank {os.environ.get('RANK', '?')}: {error}\n")
            sys.exit(error.exit_code)
        raise


def _die_with_parent() -> None:
    """Have this process killed when the launcher is gone, which can then not end it (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
