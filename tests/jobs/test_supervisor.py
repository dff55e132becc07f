"""A job in a child process: whatever it does, it ends within its budget and leaves nothing running."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from torchspan.core.errors import InputError
from torchspan.environment.scope import Environment
from torchspan.jobs import supervisor
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import Ending, Job, run_bounded, server_pids
from torchspan.jobs.transport import dumps
from torchspan.private.inductor import import_compiler

OVERSHOOT_S = 1.0


def run(function: Callable[..., Any], *args: Any, budget: Budget = Budget(seconds=60), **options: Any) -> Ending:  # noqa: B008
    return run_bounded(Job("torchspan.regions.worker:call_function", dumps((function, args))), budget, **options)


def sleep_for_ever() -> None:
    time.sleep(1000)


def hold_the_gil() -> None:
    ctypes.PyDLL(None).sleep(1000)


def eat_memory() -> None:
    pages = []
    while True:
        pages.append(b"1" * (1 << 24))


def eat_memory_in_a_child() -> None:
    subprocess.run([sys.executable, "-c", "pages = []\nwhile True: pages.append(b'1' * (1 << 24))"], check=True)


def run_a_command_that_hangs() -> None:
    subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"], check=True)


def leave_an_orphan() -> int:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    return 7


def ignore_signals_and_hang() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    time.sleep(1000)


def leave_no_room_for_the_verdict() -> int:
    folder = Path(os.readlink("/proc/self/fd/" + next(fd for fd in os.listdir("/proc/self/fd") if _is_stack(fd)))).parent
    (folder / "verdict.part").mkdir()
    return 7


def end_without_a_verdict() -> None:
    leave_no_room_for_the_verdict()
    os._exit(1)


def _is_stack(descriptor: str) -> bool:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}").endswith("/stack.txt")
    except OSError:  # of the listing itself
        return False


def print_without_end() -> None:
    while True:
        print("x" * 1000)


@pytest.mark.parametrize(
    ("function", "where"),
    [
        (sleep_for_ever, "in sleep_for_ever"),
        (hold_the_gil, "in hold_the_gil"),
        (run_a_command_that_hangs, "while running"),
        (ignore_signals_and_hang, None),
        (print_without_end, None),
    ],
)
def test_a_job_that_hangs_ends_at_its_limit_and_says_where(
    function: Callable[..., Any], where: str | None, nothing_left: Callable[[], None]
) -> None:
    ending = run(function, budget=Budget(seconds=3))
    assert ending.outcome == "timeout" and ending.cause == "not done after 3 s; ended"
    assert 3 <= ending.seconds <= 3 + OVERSHOOT_S
    assert where is None or where in (ending.where or "")
    nothing_left()


@pytest.mark.once
def test_a_share_of_the_budget_is_the_limit_of_the_job_itself(nothing_left: Callable[[], None]) -> None:
    ending = run(sleep_for_ever, budget=Budget(seconds=60), share_s=1.5)
    assert ending.outcome == "timeout" and ending.cause == "not done after 1.5 s, its share of 60 s; ended"
    nothing_left()


@pytest.mark.parametrize("function", [eat_memory, eat_memory_in_a_child])
def test_a_job_that_eats_memory_ends_at_its_limit(function: Callable[..., Any], nothing_left: Callable[[], None]) -> None:
    limit = 2 << 30
    ending = run(function, budget=Budget(seconds=60, memory=limit))
    assert ending.outcome == "memory", ending
    assert limit < (ending.peak_bytes or 0) < 1.05 * limit
    nothing_left()


@pytest.mark.parametrize(
    ("function", "args", "cause"),
    [
        (os.kill, (0, signal.SIGSEGV), "ended by SIGSEGV"),
        (os.abort, (), "ended by SIGABRT"),
        (os._exit, (3,), "exited with code 3"),
        (sys.exit, (4,), "exited with code 4"),
    ],
)
def test_a_job_that_dies_is_a_crash_with_its_cause(
    function: Callable[..., Any], args: tuple[Any, ...], cause: str, nothing_left: Callable[[], None]
) -> None:
    ending = run(function, *args)
    assert ending.outcome == "crashed" and cause in (ending.cause or "")
    nothing_left()


def test_an_exception_is_a_failure_with_its_place() -> None:
    def fail() -> None:
        raise ValueError("no such luck")

    ending = run(fail)
    assert ending.outcome == "failed" and ending.cause == "ValueError: no such luck"
    assert "test_supervisor.py" in (ending.where or "") and "in fail" in (ending.where or "")


def test_an_orphaned_grandchild_ends_with_its_job(nothing_left: Callable[[], None]) -> None:
    assert run(leave_an_orphan).outcome == "compiled"
    nothing_left()


def test_a_cancelled_job_ends_at_once(nothing_left: Callable[[], None]) -> None:
    cancel = threading.Event()
    threading.Timer(0.5, cancel.set).start()
    ending = run(sleep_for_ever, cancel=cancel)
    assert ending.outcome == "cancelled" and ending.seconds < 2
    nothing_left()


def test_several_jobs_at_once_are_judged_each_by_itself(nothing_left: Callable[[], None]) -> None:
    endings: dict[str, Ending] = {}

    def go(name: str, function: Callable[..., Any], *args: Any) -> None:
        endings[name] = run(function, *args, budget=Budget(seconds=6))

    threads = [
        threading.Thread(target=go, args=call)
        for call in (("hangs", sleep_for_ever), ("dies", os.abort), ("works", abs, -1), ("orphan", leave_an_orphan))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: ending.outcome for name, ending in endings.items()} == {
        "hangs": "timeout",
        "dies": "crashed",
        "works": "compiled",
        "orphan": "compiled",
    }
    nothing_left()


def test_a_job_sees_the_environment_variables_of_its_caller_and_of_the_active_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import_compiler()  # which sets a variable meanwhile: what other tests began in threads is over
    monkeypatch.setenv("SOME_SETTING", "here")

    def look() -> list[str | None]:
        return [os.environ.get(name) for name in ("SOME_SETTING", "MADE_UP", "TORCHSPAN_COMPILE", "TORCH_WARM_POOL")]

    import pickle

    with Environment([], settings={"MADE_UP": "too"}):
        ending = run(look)
    assert pickle.loads(ending.result or b"") == ["here", "too", "off", None]


def test_what_importing_the_compiler_sets_meanwhile_asks_for_no_other_server(monkeypatch: pytest.MonkeyPatch) -> None:
    before = server_pids()
    monkeypatch.setenv("TORCH_WARM_POOL", "0")  # as our own import does, for as long as it takes
    assert run(abs, -1).outcome == "compiled" and server_pids() == before


@pytest.mark.once
def test_no_process_lives_on_when_the_caller_is_killed(run_python: Callable[..., Any]) -> None:
    process = run_python(
        """
        import os, signal, threading, time, psutil
        from torchspan.jobs.budget import Budget
        from torchspan.jobs.supervisor import Job, run_bounded
        from torchspan.jobs.transport import dumps
        job = Job("torchspan.regions.worker:call_function", dumps((time.sleep, (1000,))))
        threading.Thread(target=run_bounded, args=(job, Budget(seconds=100)), daemon=True).start()
        while len(psutil.Process().children(recursive=True)) < 3:  # server, warden, worker
            time.sleep(0.05)
        print(*(child.pid for child in psutil.Process().children(recursive=True)), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
        """,
        expect=-signal.SIGKILL,
    )
    pids = [int(pid) for pid in process.stdout.split()]
    assert len(pids) >= 3
    deadline = time.monotonic() + 10
    while any(map(psutil.pid_exists, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [pid for pid in pids if psutil.pid_exists(pid)] == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seconds": 0}, "budget of 0 seconds; expected more than 0"),
        ({"seconds": -3}, "budget of -3 seconds"),
        ({"seconds": float("nan")}, "budget of nan seconds"),
        ({"seconds": "1"}, "budget of '1' seconds"),
        ({"memory": "0GiB"}, "budget of '0GiB' memory; expected more than 0 bytes"),
        ({"memory": -1}, "budget of -1 memory"),
        ({"memory": "much"}, "'much' is no size in bytes"),
    ],
)
def test_a_budget_of_nothing_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Budget(**arguments)


def test_what_a_job_gave_counts_where_its_verdict_cannot_be_written() -> None:
    assert run(leave_no_room_for_the_verdict).outcome == "compiled"


@pytest.mark.parametrize(("free", "says"), [(0, "disk of .* is full"), (1 << 30, "watches the job ended before it did")])
def test_a_job_without_a_verdict_says_why(free: int, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_free_bytes", lambda folder: free)
    ending = run(end_without_a_verdict)
    assert ending.result is None and re.search(says, ending.cause or ""), ending
