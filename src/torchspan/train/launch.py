"""Launch: the ranks of a job on this machine, ended together, with one line about the first that fails.

    python -m torchspan.train.launch 4 llama3 debugmodel --parallelism.tensor_parallel_degree 2

checks the configuration, then starts four processes of ``torchspan train``. Rank 0 writes to the terminal, the others to files
that are shown only where a rank ends without a word. Several machines are torchrun's: ``torchrun -m torchspan train``.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil

from torchspan.core.errors import InputError, TorchspanError
from torchspan.train._rank import FAILURE_FILE, Failure
from torchspan.train.config import from_environment, parse_config, spelled_out

POLL_S = 0.05
SETTLE_S = 0.7  # after a failure: a rank that was killed may be seen to end after those that lost the connection to it
END_S = 3.0  # what a rank that is asked to end may take
NUM_LAST_LINES = 20


@dataclass(frozen=True)
class Rank:
    """One rank: its process, the file that it writes a failure to, and the file of its output (None: the terminal)."""

    number: int
    process: subprocess.Popen[bytes]
    failure_file: Path
    output: Path | None

    def has_failed(self) -> bool:
        """Whether it wrote a failure, or ended with another exit code than 0."""
        return self.failure_file.exists() or bool(self.process.poll())


def main(argv: Sequence[str], environ: Mapping[str, str]) -> int:
    """Check the job that ``argv[1:]`` and `environ` (``MODULE``, ``CONFIG``) write, then run it on ``argv[0]`` ranks.

    Returns the exit code; a mistake is one line on standard error and exit code 2, before any rank is started.
    """
    try:
        num_ranks, *rest = argv or [""]
        if not num_ranks.isdecimal() or int(num_ranks) < 1:
            raise InputError(f"the number of ranks is {num_ranks!r}; expected 1 or more, such as NGPU=4 ./run_train.sh")
        flags = [*from_environment(environ), *spelled_out(rest)]
        config = parse_config(flags)
        if config is None:
            return 0  # help was asked for, and is printed
        from torchspan.train.check import check  # imports torch

        plan = check(config, config.check_for or int(num_ranks))
    except TorchspanError as error:
        sys.stderr.write(f"torchspan: {error}\n")
        return error.exit_code
    if config.check_for is not None:
        sys.stdout.write(f"{plan}\n")
        return 0
    return launch([sys.executable, "-m", "torchspan", "train", *flags], int(num_ranks), environ)


def launch(command: Sequence[str], num_ranks: int, environ: Mapping[str, str]) -> int:
    """Run `command` once for each rank, with what torchrun would tell it in the environment; its exit code.

    When a rank fails, the others are ended within seconds. Of several that fail the first is shown: an error of ours as one
    line, another exception with its traceback, an end by a signal or without a word with what is known of it.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="torchspan-ranks-")))
        received = stack.enter_context(_signals())
        port = stack.enter_context(_store())
        ranks: list[Rank] = []
        stack.callback(_end, ranks)
        for number in range(num_ranks):
            ranks.append(_start(command, number, num_ranks, folder, {**environ, "MASTER_PORT": str(port)}))
        return _wait(ranks, received)


def _wait(ranks: Sequence[Rank], received: Sequence[int]) -> int:
    """Until every rank is done, one has failed, or a signal came; the exit code that this is."""
    ended_at: dict[int, float] = {}
    failed_at: float | None = None
    while not received and (failed_at is None or time.time() < failed_at + SETTLE_S):
        for rank in ranks:
            if rank.process.poll() is not None:
                ended_at.setdefault(rank.number, time.time())
        if failed_at is None and any(rank.has_failed() for rank in ranks):
            failed_at = time.time()
        if all(rank.process.poll() == 0 for rank in ranks):
            return 0
        time.sleep(POLL_S)
    if received:
        _say(f"interrupted by {signal.Signals(received[0]).name}; the ranks are ended")
        return 128 + received[0]
    return _show(_culprit(ranks, ended_at), len(ranks))


def _start(command: Sequence[str], number: int, num_ranks: int, folder: Path, environ: Mapping[str, str]) -> Rank:
    """Start a rank in a session of its own: an interrupt of the terminal reaches the launcher alone, which ends the ranks."""
    failure_file = folder / f"{number}.json"
    variables = {
        "RANK": number,
        "LOCAL_RANK": number,
        "WORLD_SIZE": num_ranks,
        "LOCAL_WORLD_SIZE": num_ranks,
        "MASTER_ADDR": "127.0.0.1",
        # torchrun's two: the store is the launcher's, rank 0 starts none
        "TORCHELASTIC_USE_AGENT_STORE": True,
        "TORCHELASTIC_RESTART_COUNT": 0,
        FAILURE_FILE: failure_file,
    }
    output = None if number == 0 else folder / f"{number}.txt"
    with ExitStack() as stack:
        stream = None if output is None else stack.enter_context(output.open("wb"))
        process = subprocess.Popen(
            list(command),
            env={**environ, **{name: str(value) for name, value in variables.items()}},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
        )
    return Rank(number, process, failure_file, output)


@contextmanager
def _store() -> Iterator[int]:
    """The port of a store at which the ranks meet; it is this process's, so that no other can take the port meanwhile."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port


@contextmanager
def _signals() -> Iterator[list[int]]:
    """The signals to end that were received, in order."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# failures


def _culprit(ranks: Sequence[Rank], ended_at: Mapping[int, float]) -> Rank:
    """The rank that failed first.

    One that ended without a word comes before those that told of an error: theirs may be the connection to it that was lost.
    But an abort may be how NCCL ends a rank that lost its connection, and comes in the order of time.
    """

    def when(rank: Rank) -> float:
        failure = Failure.read(rank.failure_file)
        if failure is not None:
            return failure.at_s
        is_abort = rank.process.returncode == -signal.SIGABRT
        return ended_at.get(rank.number, time.time()) - 2 * POLL_S if is_abort else 0.0

    return min((rank for rank in ranks if rank.has_failed()), key=when)


def _show(rank: Rank, num_ranks: int) -> int:
    """Say how a rank failed; the exit code of the job."""
    name = f"rank {rank.number}" if num_ranks > 1 else "the only rank"
    failure = Failure.read(rank.failure_file)
    if failure is not None:
        if failure.trace is not None:
            sys.stderr.write(failure.trace)
        _say(f"{name}: {failure.line}" if num_ranks > 1 else failure.line)
        return failure.exit_code
    if rank.output is not None:
        lines = rank.output.read_text(errors="replace").splitlines()[-NUM_LAST_LINES:]
        sys.stderr.writelines(f"{line}\n" for line in lines)
    code = rank.process.returncode
    if code >= 0:
        _say(f"{name} ended with exit code {code}, without a message of its own; see the output above")
        return code
    _say(f"{name} was ended by signal {-code} ({_signal_name(-code)}){_why(-code)}")
    return 128 - code


def _signal_name(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else "unnamed"


def _why(number: int) -> str:
    if number == signal.SIGKILL:
        return ": somebody killed it, or the system did because memory ran out"
    return ": a crash in compiled code" if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE) else ""


def _say(text: str) -> None:
    sys.stderr.write(f"torchspan: {text}\n")


def _end(ranks: Sequence[Rank]) -> None:
    """End every rank and all that it started: asked first, then killed."""
    left = [process for rank in ranks for process in _processes_of(rank)]
    for process in left:
        _send(process, signal.SIGTERM)
    _, left = psutil.wait_procs(left, timeout=END_S)
    for process in left:
        _send(process, signal.SIGKILL)
    for rank in ranks:
        rank.process.wait()


def _processes_of(rank: Rank) -> list[psutil.Process]:
    """A rank that still runs, and everything below it."""
    if rank.process.poll() is not None:
        return []
    try:
        process = psutil.Process(rank.process.pid)
        return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _send(process: psutil.Process, number: int) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return  # ended meanwhile


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], os.environ))
