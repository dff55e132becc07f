"""``torchspan run --report`` and ``-v``, as a user calls them: in fresh processes, with children and ranks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

RUN = ("-m", "torchspan", "run", "--quiet", "--compile", "off")


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def lines_of(page: dict[str, Any], name: str) -> dict[int, dict[str, Any]]:
    """The statements of a file by their first line."""
    (file,) = [file for file in page["files"] if file["name"] == name]
    return {statement["first"]: statement for statement in file["statements"]}


def write(folder: Path, program: str) -> None:
    (folder / "program.py").write_text(textwrap.dedent(program))


def test_a_run_is_on_the_page_by_file_and_line(run_python, tmp_path: Path) -> None:
    (tmp_path / "layers").mkdir()
    (tmp_path / "layers" / "__init__.py").write_text("")
    (tmp_path / "layers" / "noise.py").write_text(
        "import torch\n\ndef noise(n):\n    return torch.randn(n, device='cuda')\n\n"
        "def unused():\n    torch.cuda.synchronize()\n"
    )
    program = """\
        import torch
        from layers.noise import noise
        device = "cuda"
        for step in range(3):
            x = noise(4).to(device)
        stream = torch.cuda.Stream()
        """
    write(tmp_path, program)
    run_python(None, *RUN, "--report", "out.json", "program.py")
    page = read(tmp_path / "out.json")
    assert page["schema"] == "torchspan.report/1"
    assert page["run"]["outcome"] == "ended" and page["run"]["command"] == ["program.py"]
    assert [file["name"] for file in page["files"]] == ["layers/noise.py", "program.py"]
    drawn = lines_of(page, "layers/noise.py")[4]
    assert drawn["portable"] == "    return torch.randn(n, device=device)"
    (entry,) = drawn["entries"]
    assert (entry["asked"], entry["given"], entry["count"]) == ("torch.randn(device='cuda')", "cpu", 3)
    assert "no CUDA device here" in entry["reason"] and entry["function"] == "noise" and entry["standing"] == "redirected"
    assert lines_of(page, "layers/noise.py")[7]["entries"] == []  # never called, to be ported all the same
    statements = lines_of(page, "program.py")
    assert statements[3]["portable"].startswith("device = str(torch.accelerator.current_accelerator(")
    assert statements[5]["portable"] is None and "Nothing to do in this line" in statements[5]["notes"][0]
    assert statements[6]["entries"][0]["standing"] == "simulated"
    assert page["summary"]["lines"] == 3 and page["summary"]["calls"] == 7 and page["summary"]["simulated"] == 1
    assert page["summary"]["named_only"] == 2


def test_a_program_that_fails_leaves_its_page_and_its_own_exit_code(run_python, tmp_path: Path) -> None:
    write(tmp_path, "import torch\ntorch.ones(1, device='cuda')\nraise ValueError('mine')\n")
    process = run_python(None, *RUN, "--report", "out.json", "program.py", expect=1)
    assert process.stderr.splitlines()[-1] == "ValueError: mine"
    page = read(tmp_path / "out.json")
    assert page["run"]["outcome"] == "failed: ValueError: mine" and page["summary"]["calls"] == 1
    write(tmp_path, "import sys, torch\ntorch.ones(1, device='cuda')\nsys.exit(3)\n")
    run_python(None, *RUN, "--report", "out.html", "program.py", expect=3)
    assert "exit code 3" in (tmp_path / "out.html").read_text("utf-8")


@pytest.mark.once
@pytest.mark.parametrize(("number", "code", "outcome"), [(2, 130, "interrupted"), (15, 143, "ended by SIGTERM")])
def test_a_program_that_is_interrupted_leaves_its_page(tmp_path: Path, number: int, code: int, outcome: str) -> None:
    write(tmp_path, "import time, torch\ntorch.ones(1, device='cuda')\nopen('ready', 'w').close()\ntime.sleep(60)\n")
    command = [sys.executable, *RUN, "--report", "out.json", "program.py"]
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background job ignores it, and its children too
    process = subprocess.Popen(command, cwd=tmp_path, preexec_fn=default)
    deadline = time.monotonic() + 240  # a busy machine takes long to import torch
    while not (tmp_path / "ready").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.Signals(number))
    assert process.wait(240) == code
    page = read(tmp_path / "out.json")
    assert page["run"]["outcome"] == outcome and page["summary"]["calls"] == 1


def test_a_module_and_what_it_imports_are_on_the_page(run_python, tmp_path: Path) -> None:
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("")
    (tmp_path / "trainer" / "settings.py").write_text("device: str = 'cuda'\n")
    (tmp_path / "trainer" / "__main__.py").write_text(
        "import torch\nfrom trainer.settings import device\nprint(torch.ones(1, device=device).sum().item())\n"
    )
    run_python(None, *RUN, "--report", "out.json", "-m", "trainer")
    page = read(tmp_path / "out.json")
    assert [file["name"] for file in page["files"]] == ["trainer/__main__.py", "trainer/settings.py"]
    assert lines_of(page, "trainer/settings.py")[1]["portable"].startswith("device: str = str(torch.accelerator")
    assert next(file for file in page["files"] if file["name"] == "trainer/settings.py")["header"] == "import torch"


CHILDREN = """\
    import multiprocessing, os, signal, subprocess, sys, torch

    def work(times, is_killed=False):
        for _ in range(times):
            torch.ones(1, device="cuda")
        if is_killed:
            os.kill(os.getpid(), signal.SIGKILL)

    if __name__ == "__main__":
        work(2)
        for method, arguments in (("spawn", (3,)), ("fork", (5,)), ("spawn", (7, True))):
            child = multiprocessing.get_context(method).Process(target=work, args=arguments)
            child.start(); child.join()
        subprocess.run([sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')"], check=True)
    """


@pytest.mark.once
def test_what_children_do_is_on_the_page_of_their_parent(run_python, tmp_path: Path) -> None:
    write(tmp_path, CHILDREN)
    run_python(None, *RUN, "--report", "out.json", "program.py")
    page = read(tmp_path / "out.json")
    (entry,) = lines_of(page, "program.py")[5]["entries"]
    assert entry["count"] == 2 + 3 + 5 + 1  # of the one that was killed, that it was there
    assert page["run"]["num_processes"] == 5
    assert any(entry["asked"] == "torch.zeros(device='cuda')" for file in page["files"] for entry in _entries(file))
    assert not list(Path(os.environ.get("TMPDIR", "/tmp")).glob(f"torchspan-report-{os.getpid()}-*"))


def _entries(file: dict[str, Any]) -> list[dict[str, Any]]:
    return [entry for statement in file["statements"] for entry in statement["entries"]]


def test_a_process_that_the_program_forks_off_writes_no_page(run_python, tmp_path: Path) -> None:
    write(
        tmp_path,
        """\
        import os, sys, torch
        child = os.fork()
        if child == 0:
            sys.exit(7)
        assert os.waitpid(child, 0)[1] == 7 * 256 and not os.path.exists("out.json")
        torch.ones(1, device="cuda")
        """,
    )
    run_python(None, *RUN, "--report", "out.json", "program.py")
    assert read(tmp_path / "out.json")["summary"]["calls"] == 1


RANKS = """\
    import os, torch
    import torch.distributed as dist
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    x = torch.full((2,), 1.0 + rank).cuda(rank)
    dist.all_reduce(x)
    assert x[0] == 3
    if rank == 1:
        torch.cuda.synchronize()
    dist.destroy_process_group()
    """
TORCHRUN = ("torch.distributed.run", "--nproc-per-node", "2", "--master-port")


def test_each_rank_of_a_job_has_its_page(run_python, tmp_path: Path, free_port: str) -> None:
    write(tmp_path, RANKS)
    run_python(None, "-m", *TORCHRUN, free_port, *RUN, "--report", "out.json", "program.py")
    pages = [read(tmp_path / name) for name in ("out.json", "out.rank1.json")]
    assert [(page["run"]["rank"], page["run"]["world_size"]) for page in pages] == [(0, 2), (1, 2)]
    assert [bool(lines_of(page, "program.py")[9]["entries"]) for page in pages] == [False, True]
    assert "get_default_backend_for_device(device)" in lines_of(pages[0], "program.py")[3]["portable"]


@pytest.mark.once
def test_a_launcher_that_is_run_has_its_workers_on_its_page(run_python, tmp_path: Path, free_port: str) -> None:
    write(tmp_path, RANKS)
    run_python(None, *RUN, "--report", "out.json", "-m", *TORCHRUN, free_port, "program.py")
    page = read(tmp_path / "out.json")
    statements = lines_of(page, "program.py")
    assert statements[5]["entries"][0]["count"] + statements[5]["entries"][-1]["count"] in (2, 4)
    assert statements[9]["entries"] and page["run"]["num_processes"] >= 3


@pytest.mark.once
def test_the_table_shows_each_line_as_it_is(run_python, tmp_path: Path) -> None:
    write(tmp_path, "import torch\nx = {'[bold]a[/bold]': torch.ones(2, device='cuda')}\n")
    process = run_python(None, "-m", "torchspan", "run", "-v", "program.py")
    assert "{'[bold]a[/bold]': torch.ones(2, device='cuda')}" in process.stderr
    assert "→ x = {'[bold]a[/bold]': torch.ones(2, device=device)}" in process.stderr
    assert "1 file to port, 1 line that asked for a device, 1 request redirected" in process.stderr


@pytest.mark.once
def test_nothing_to_port_is_said(run_python, tmp_path: Path) -> None:
    write(tmp_path, "print('cuda')\n")
    process = run_python(None, "-m", "torchspan", "run", "-v", "--report", "out.html", "program.py")
    assert "No line of the program asked for a device" in (tmp_path / "out.html").read_text()
    assert "no line asks for a device" in process.stderr


@pytest.mark.once
def test_a_program_that_is_ported_by_its_page_runs_without_torchspan(run_python, tmp_path: Path) -> None:
    """Only what the page says it has no line for is done by hand: the events, and the assertion that there is a GPU."""
    text = (Path(__file__).parents[1] / "devices" / "programs" / "train_cuda.py").read_text()
    text = text.replace("copies, begin, end = torch.cuda.Stream(), ", "copies = torch.cuda.Stream()\nbegin, end = ")
    program = tmp_path / "train.py"
    program.write_text(text)
    before = run_python(None, *RUN, "--report", "out.json", "train.py").stdout
    (file,) = read(tmp_path / "out.json")["files"]
    lines = text.split("\n")
    for statement in reversed(file["statements"]):
        if statement["portable"] is not None:
            assert not statement["is_partial"], statement
            lines[statement["first"] - 1 : statement["last"]] = statement["portable"].split("\n")
    by_hand = ("assert torch.accelerator.is_available", "begin, end =", "begin.", "end.", "assert begin.elapsed_time")
    lines_kept = [line for line in lines if not line.strip().startswith(by_hand)]
    assert len(lines) - len(lines_kept) <= 5
    program.write_text("\n".join([file["header"] or "", *lines_kept]))
    assert "torch.cuda." not in "\n".join(lines_kept)
    assert run_python(None, "train.py").stdout == before and "losses" in before
