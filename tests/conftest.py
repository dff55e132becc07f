"""Shared by all tests: fresh processes, and which tests run on which torch."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

# Before torch is imported. The threads of one operator wait for each other by spinning: beside another job on two cores, two of
# them take over twice the time of one. A compile in this process or in a fresh one spends most of its seconds on trying out
# vector instructions with the C++ compiler and on processes that compile beside it; the first answers what /proc/cpuinfo says
# already, the second find no core that is free. `as_found` of `run_python` runs a program as a user's machine does, with both.
QUICK_COMPILES = {"TORCHINDUCTOR_VEC_ISA_OK": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
for _name, _value in ({"OMP_NUM_THREADS": "1"} | QUICK_COMPILES).items():
    os.environ.setdefault(_name, _value)

import torch  # noqa: E402

REPOSITORY = Path(__file__).resolve().parents[1]
DEFAULT_TORCH, OLDEST_TORCH = "2.13.0", "2.8.0"


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_python(tmp_path: Path) -> Run:
    """Run code (or ``argv``) in a fresh Python process; fails with its output unless it exits with `expect`."""
    return _runner(tmp_path)


@pytest.fixture(scope="module")
def run_python_once(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The same for a fixture of a file: one process that answers the questions of several tests."""
    return _runner(tmp_path_factory.mktemp("once"))


def _runner(folder: Path) -> Run:
    def run(
        code: str | None = None,
        *argv: str,
        env: dict[str, str] | None = None,
        expect: int | None = 0,
        timeout: float = 300,
        as_found: bool = False,
    ) -> subprocess.CompletedProcess[str]:
        arguments = list(argv)
        if code is not None:
            script = folder / "program.py"
            script.write_text(textwrap.dedent(code))
            arguments = [str(script), *arguments]
        left_out = ("TORCHSPAN", *QUICK_COMPILES) if as_found else ("TORCHSPAN",)
        environ = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
        environ |= env or {}
        process = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=environ,
            cwd=folder,
            check=False,
        )
        assert expect is None or process.returncode == expect, f"exit {process.returncode}\n{process.stdout}\n{process.stderr}"
        return process

    return run


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--exhaustive`, which `make test-all` gives."""
    parser.addoption("--exhaustive", action="store_true", help="also run what tests/moved.txt leaves to 'make test-all'")


def moved_tests() -> list[tuple[str, str]]:
    """The kind and the test of each line of moved.txt."""
    lines = (REPOSITORY / "tests" / "moved.txt").read_text().splitlines()
    entries = [line.partition(" | ")[0].partition(" ") for line in lines if line and not line.startswith("#")]
    return [(kind, test.strip()) for kind, _, test in entries]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine, this torch or this run is not for."""
    is_default, is_oldest = map(torch.__version__.startswith, (DEFAULT_TORCH, OLDEST_TORCH))
    kinds: dict[str, list[str]] = {item.nodeid: [marker.name for marker in item.iter_markers()] for item in items}
    by_file = _ids_by_file(items)
    for kind, test in moved_tests():
        results = [
            name
            for name in by_file.get(test.partition("::")[0], ())
            if name == test or name.startswith((f"{test}[", f"{test}::"))
        ]
        for name in results:
            kinds[name].append(kind)
        is_whole = not config.getoption("lf", False) and not any("::" in argument for argument in config.args)
        if not results and is_whole and test.partition("::")[0] in by_file:
            raise pytest.UsageError(f"tests/moved.txt has {test!r}, which is no test; expected its name as pytest prints it")
    skips = {
        "once": (not is_default, f"runs once, on torch {DEFAULT_TORCH}"),
        "gpu": (not torch.cuda.is_available(), "needs a GPU"),
    }
    if not config.getoption("--exhaustive"):
        skips["default-torch"] = (not is_default, f"runs on torch {DEFAULT_TORCH}; here in 'make test-all' only")
        skips["ends"] = (is_default, f"runs on torches other than {DEFAULT_TORCH}; here in 'make test-all' only")
        skips["oldest"] = (not is_oldest, f"runs on torch {OLDEST_TORCH}; here in 'make test-all' only")
        skips["exhaustive"] = (True, "runs in 'make test-all' only")
    for item in items:
        for kind, (is_skipped, reason) in skips.items():
            if is_skipped and kind in kinds[item.nodeid]:
                item.add_marker(pytest.mark.skip(reason=reason))


def _ids_by_file(items: list[pytest.Item]) -> dict[str, list[str]]:
    files: dict[str, list[str]] = {}
    for item in items:
        files.setdefault(item.nodeid.partition("::")[0], []).append(item.nodeid)
    return files
