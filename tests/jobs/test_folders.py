"""Folders of jobs go when the job is done, with their maker, or when another program starts a compile server."""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchspan.jobs import folders

pytestmark = pytest.mark.once
LONG_AGO = time.time() - 2 * folders.SETTLED_S


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def left_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("torchspan-job-*"))


def age(folder: Path) -> None:
    os.utime(folder, (LONG_AGO, LONG_AGO))


def test_a_folder_is_gone_after_its_job(temporary: Path) -> None:
    with folders.job_folder() as folder:
        (folder / "payload").touch()
        assert left_in(temporary) == [folder]
    assert left_in(temporary) == []


def test_what_a_killed_maker_left_is_swept_and_what_a_living_one_has_is_not(temporary: Path) -> None:
    def make_and_die() -> None:
        held = folders.job_folder()
        held.__enter__()
        os.kill(os.getpid(), signal.SIGKILL)

    pid = os.fork()
    if pid == 0:
        make_and_die()
    os.waitpid(pid, 0)
    (folder_left,) = left_in(temporary)
    folders.sweep()
    assert left_in(temporary) == [folder_left]  # so new that its maker may not have locked it yet
    with folders.job_folder() as own:
        for folder in (folder_left, own):
            age(folder)
        asking = os.fork()
        if asking == 0:  # another process, to which the lock is another's
            folders.sweep()
            os._exit(len(left_in(temporary)))
        assert os.waitstatus_to_exitcode(os.waitpid(asking, 0)[1]) == 1
        folders.sweep()
        assert left_in(temporary) == [own]


def test_what_only_looks_like_a_folder_of_a_job_is_left_alone(temporary: Path) -> None:
    elsewhere = temporary / "elsewhere"
    elsewhere.mkdir()
    (temporary / "torchspan-job-link").symlink_to(elsewhere)
    (temporary / "torchspan-job-file").touch()
    age(elsewhere)
    age(temporary / "torchspan-job-file")
    folders.sweep()
    assert len(left_in(temporary)) == 2 and elsewhere.exists()


def test_a_fork_of_the_maker_removes_nothing(temporary: Path) -> None:
    with folders.job_folder() as folder:
        pid = os.fork()
        if pid == 0:
            folders._remove_all()
            os._exit(0)
        os.waitpid(pid, 0)
        assert folder.exists()


def test_no_folder_for_temporary_files_is_nothing_to_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/proc/none")
    folders.sweep()


ENDS = """
    import os, signal, sys, threading, time
    from pathlib import Path
    import psutil
    from torchspan.jobs import servers, turns
    from torchspan.jobs.budget import Budget
    from torchspan.jobs.supervisor import Job, run_bounded

    endings = []

    def go(name):
        job = Job("os:system", b"sleep 1000", fresh=True)  # which needs no torch
        with turns.turns.turn(turns.Wish(name)) as has_come:
            endings.append(run_bounded(job, Budget(seconds=500)).outcome if has_come else "sent home")

    turns.turns.machine = turns.Machine(1, lambda: 64 << 30)  # two places
    for name in range(4):
        threading.Thread(target=go, args=(name,), daemon=True).start()
    while len(list(Path(os.environ["TMPDIR"]).glob("torchspan-job-*/stack.txt"))) < 2:  # two work, two wait
        time.sleep(0.05)
    print(*[one.pid for one in psutil.Process().children(recursive=True)], flush=True)
    if sys.argv[1] == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    servers.servers.close()  # what the end of the program does
    while len(endings) < 4:
        time.sleep(0.01)
    print(*sorted(endings), psutil.Process().children(recursive=True), flush=True)
"""


@pytest.mark.parametrize("how", ["ended", "killed"])
def test_a_program_that_ends_with_jobs_queued_leaves_no_process_and_no_folder(
    how: str, tmp_path: Path, run_python: Callable[..., Any]
) -> None:
    (tmp_path / "jobs").mkdir()
    expect = -signal.SIGKILL if how == "killed" else 0
    process = run_python(ENDS, how, env={"TMPDIR": str(tmp_path / "jobs")}, expect=expect)
    pids, *lines = process.stdout.splitlines()
    assert lines == (["cancelled cancelled sent home sent home []"] if how == "ended" else [])
    deadline = time.monotonic() + 30
    while (leftovers := (left_in(tmp_path / "jobs"), alive(pids))) != ([], []) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert leftovers == ([], [])


def alive(pids: str) -> list[str]:
    return [pid for pid in pids.split() if Path(f"/proc/{pid}").exists()]
