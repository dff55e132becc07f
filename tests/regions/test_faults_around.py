"""Faults around a compile: disks, compilers, processes, signals and forks; the program goes on, and the Report says why."""

from __future__ import annotations

import copy
import os
import resource
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

import torchspan
from compile_server import sleeps_here
from torchspan.core.report import Attempt
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import server_pids
from torchspan.strategies import report_of

Wait = Callable[..., None]
OVERSHOOT_S = 1.0
SOON = Budget(seconds=120, memory="6GiB")
LONG = Budget(seconds=100)


def first_attempt(program: Any, x: torch.Tensor, until: Wait) -> Attempt:
    """The first Attempt, after steps that all gave eager's result; and a few steps more."""
    expected = program._orig_mod(x)

    def step() -> None:
        assert torch.equal(program(x), expected)

    until(lambda: bool(report_of(program).attempts), step)
    for _ in range(3):
        step()
    return report_of(program).attempts[0]


def wait_for_worker(step: Callable[[], object] = lambda: None) -> psutil.Process:
    """The compile process that works now, once there is one."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        step()
        for warden in (process for process in psutil.Process().children(recursive=True) if process.ppid() in server_pids()):
            for worker in warden.children():
                return worker
        time.sleep(0.01)
    raise AssertionError("no compile process was started")


# disks and compilers


@contextmanager
def full_disk(folder: Path) -> Iterator[tuple[str, str]]:
    with mounted(folder, "size=16k"):
        yield str(folder), "OSError: [Errno 28] No space left on device"


@contextmanager
def read_only_disk(folder: Path) -> Iterator[tuple[str, str]]:
    with mounted(folder, "ro"):
        yield str(folder), "OSError: [Errno 30] Read-only file system"


@contextmanager
def beneath_a_file(folder: Path) -> Iterator[tuple[str, str]]:
    (folder / "file").touch()
    yield str(folder / "file" / "cache"), "NotADirectoryError: [Errno 20] Not a directory"


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, check=False)
    if mount.returncode:
        pytest.skip(f"no disk can be mounted here: {mount.stderr.decode()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("disk", [full_disk, read_only_disk, beneath_a_file])
def test_a_cache_that_cannot_be_written_fails_the_compile_only(
    disk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Wait, nothing_left: Callable[[], None]
) -> None:
    with disk(tmp_path) as (folder, cause):
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", folder)
        compiled = torchspan.compile(nn.Linear(8, 8), strategy="whole", budget=SOON, handback="caches")
        attempt = first_attempt(compiled, torch.ones(4, 8), until)
    assert attempt.outcome == "failed" and cause in (attempt.cause or ""), attempt
    nothing_left()


def test_a_cpp_compiler_that_hangs_ends_with_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Wait, nothing_left: Callable[[], None]
) -> None:
    fake = tmp_path / "bin" / "g++"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\ncase "$*" in *--version*|*-dumpversion*) exec {shutil.which("g++")} "$@";; esac\nexec sleep 1000\n'
    )
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", str(fake.parent), prepend=os.pathsep)
    compiled = torchspan.compile(nn.Linear(8, 8), strategy="whole", budget=Budget(seconds=8))
    attempt = first_attempt(compiled, torch.ones(4, 8), until)
    assert (
        attempt.outcome == "timeout" and "while running" in (attempt.where or "") and "sleep 1000" in (attempt.where or "")
    ), attempt
    assert attempt.seconds < 8 + OVERSHOOT_S
    nothing_left()


class EndsInTheMiddleOfAWrite(nn.Linear):
    """In a process with ``FILE_LIMIT`` set, the kernel kills whoever writes more bytes than that into a file."""

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)
        if "FILE_LIMIT" in os.environ:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["FILE_LIMIT"]),) * 2)


def test_a_compile_that_is_killed_in_the_middle_of_a_write_spoils_nothing_for_the_next(
    cache: Path, monkeypatch: pytest.MonkeyPatch, until: Wait, nothing_left: Callable[[], None]
) -> None:
    model, x = EndsInTheMiddleOfAWrite(8, 8), torch.ones(4, 8)
    monkeypatch.setenv("FILE_LIMIT", "1024")
    attempt = first_attempt(torchspan.compile(model, strategy="whole", budget=SOON, handback="caches"), x, until)
    assert attempt.outcome == "crashed" and "was ended by SIGXFSZ" in (attempt.cause or ""), attempt
    assert [path.stat().st_size for path in cache.rglob("*") if path.is_file() and path.stat().st_size == 1024] == [1024]
    monkeypatch.delenv("FILE_LIMIT")
    compiled = torchspan.compile(model, strategy="whole", budget=SOON, handback="caches")
    assert first_attempt(compiled, x, until).outcome == "compiled"
    until(lambda: "swap_stall_s" in compiled.report.figures, lambda: compiled(x))
    nothing_left()


def test_a_folder_that_is_gone_fails_the_compile_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Wait, nothing_left: Callable[[], None]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    compiled = torchspan.compile(nn.Linear(8, 8), strategy="whole", backend="eager")
    attempt = first_attempt(compiled, torch.ones(4, 8), until)
    assert attempt.outcome == "failed" and "FileNotFoundError" in (attempt.cause or ""), attempt
    nothing_left()


# processes and signals


@pytest.mark.parametrize("victim", ["worker", "server"])
def test_a_compile_whose_process_is_killed_is_a_crash(victim: str, until: Wait, nothing_left: Callable[[], None]) -> None:
    compiled, x = (
        torchspan.compile(nn.Linear(8, 8), strategy="whole", backend=sleeps_here(os.getpid()), budget=LONG),
        torch.ones(4, 8),
    )
    worker = wait_for_worker(lambda: compiled(x))
    started = time.monotonic()
    (worker if victim == "worker" else psutil.Process(server_pids()[0])).kill()
    attempt = first_attempt(compiled, x, until)
    cause = "was ended by SIGKILL" if victim == "worker" else "the compile server ended before the job did"
    assert attempt.outcome == "crashed" and cause in (attempt.cause or ""), attempt
    assert time.monotonic() - started < 2
    worker.wait(timeout=2)
    nothing_left()


def test_an_interrupt_reaches_the_program_which_may_go_on(until: Wait, nothing_left: Callable[[], None]) -> None:
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    compiled = torchspan.compile(model, strategy="whole", backend=sleeps_here(os.getpid()), budget=LONG, wait=True)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    try:
        interrupt.start()
        with pytest.raises(KeyboardInterrupt):
            compiled(x)
    finally:
        interrupt.join()
        signal.signal(signal.SIGINT, before)
    attempt = first_attempt(compiled, x, until)
    assert (attempt.outcome, attempt.cause) == ("cancelled", "the user interrupted the call that waited for it")
    assert attempt.seconds < 1.0 + OVERSHOOT_S
    nothing_left()


PARENT = """
    import os, signal, sys, threading, time
    import psutil, torch, torchspan
    from torchspan.jobs.budget import Budget
    from torchspan.jobs.supervisor import server_pids

    os.unlink(__file__)
    BIAS = 3.0

    class Model(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + BIAS

    def sleeps(graph, inputs):
        time.sleep(1000)

    torch.set_num_threads(1)
    x = torch.ones(4, 8)
    first = torchspan.compile(Model(8, 8), strategy="whole", backend="eager")
    while not first.report.attempts:
        first(x)
    print(*[one.outcome for one in first.report.attempts])
    second = torchspan.compile(Model(8, 8), strategy="whole", backend=sleeps, budget=Budget(100))
    second(x)
    below = psutil.Process().children
    while len(below(recursive=True)) < 3:  # server, warden, worker
        second(x)
        time.sleep(0.05)
    print(*[one.pid for one in below(recursive=True)], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.once
def test_no_process_outlives_a_program_that_is_killed_and_a_deleted_script_compiles(run_python: Callable[..., Any]) -> None:
    process = run_python(PARENT, expect=-signal.SIGKILL)
    outcomes, pids = process.stdout.splitlines()
    assert outcomes == "compiled" and len(pids.split()) >= 3
    deadline = time.monotonic() + 5
    while (running := [pid for pid in map(int, pids.split()) if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running == []


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


# forks and copies


class Transformed(torch.utils.data.Dataset[torch.Tensor]):
    """Samples that pass through a compiled module, in the loader's workers."""

    def __init__(self, transform: Any) -> None:
        self.transform = transform

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        with torch.no_grad():
            return self.transform(torch.full((8,), float(index)))


@pytest.mark.parametrize("is_waiting", [False, True])
def test_forks_of_the_program_run_eagerly_and_wait_for_nothing(
    is_waiting: bool, until: Wait, nothing_left: Callable[[], None]
) -> None:
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    expected = model(x)
    budget = Budget(seconds=4)
    compiled = torchspan.compile(model, strategy="whole", backend=sleeps_here(os.getpid()), budget=budget, wait=is_waiting)
    thread = threading.Thread(target=compiled, args=(x,))  # with `is_waiting` it waits for the child, which sleeps
    thread.start()
    wait_for_worker()
    pid = os.fork()
    if pid == 0:
        is_same = torch.equal(compiled(x), expected) and torch.equal(compiled(x[:2]), expected[:2])
        os._exit(0 if is_same and report_of(compiled).decisions[-1].reason.startswith("forked from") else 1)
    assert os.waitpid(pid, 0) == (pid, 0)
    loader = torch.utils.data.DataLoader(Transformed(compiled), num_workers=2, multiprocessing_context="fork", timeout=20)
    torch.testing.assert_close(torch.cat(list(loader)), model(torch.arange(4.0)[:, None].expand(4, 8)).detach())
    thread.join()
    assert first_attempt(compiled, x, until).outcome == "timeout"
    nothing_left()


def test_a_copy_that_is_made_in_the_middle_of_a_compile_has_a_compile_of_its_own(
    until: Wait, nothing_left: Callable[[], None]
) -> None:
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    compiled = torchspan.compile(model, strategy="whole", backend=sleeps_here(os.getpid()), budget=Budget(seconds=2))
    compiled(x)
    wait_for_worker()
    copied = copy.deepcopy(compiled)
    assert copied.weight is not model.weight and report_of(copied).attempts == ()
    for either in (compiled, copied):
        assert first_attempt(either, x, until).outcome == "timeout"
        assert len(report_of(either).attempts) == 1
    nothing_left()
