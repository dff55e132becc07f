"""Shared by the tests of bounded compiles: a warm compile server, an own cache, and a look for what was left running."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch import nn

from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import Job, end_servers, run_bounded, server_pids
from torchspan.jobs.transport import dumps


@pytest.fixture(scope="session")
def server() -> Iterator[None]:
    """A compile server that has imported torch, so that budgets of seconds measure the work."""
    torch.set_num_threads(1)
    warm_up()
    yield
    end_servers()


def warm_up() -> None:
    """Have a compile server that has imported torch."""
    ending = run_bounded(Job("torchspan.regions.worker:call_function", dumps((abs, (-1,)))), Budget(seconds=600))
    assert ending.outcome == "compiled", ending


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: None) -> Path:
    """A cache folder of inductor's that starts empty; and a warm server, also after a test that killed it."""
    if not server_pids():
        warm_up()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def nothing_left() -> Callable[[], None]:
    """Fail unless every process that a compile started is gone; only idle compile servers may stay."""
    before = {child.pid for child in psutil.Process().children(recursive=True)}  # such as inductor's own workers

    def check() -> None:
        deadline = time.monotonic() + 1.0
        survivors = _others(before)
        while survivors and time.monotonic() < deadline:
            time.sleep(0.05)
            survivors = _others(before)
        assert survivors == []

    return check


def _others(before: set[int]) -> list[str]:
    known = before.union(server_pids())
    running = [child for child in [*psutil.Process().children(recursive=True), *_orphans()] if child.pid not in known]
    survivors = []
    for child in running:
        with suppress(psutil.NoSuchProcess):  # ended since it was listed
            if child.status() != psutil.STATUS_ZOMBIE:
                survivors.append(f"{child.pid} {child.name()}")
    return survivors


def _orphans() -> list[psutil.Process]:
    """Forks of a compile server of this process, whoever their parent is now."""
    mark = f'"parent": {os.getpid()}' + "}"
    return [child for child in psutil.process_iter(["cmdline"]) if any(mark in part for part in child.info["cmdline"] or ())]


class Block(nn.Module):
    """A residual block with a norm and dropout."""

    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.nn.functional.gelu(self.up(self.norm(x)))))


class Stack(nn.Module):
    """An embedding of sorts, equal blocks, a head."""

    def __init__(self, num_blocks: int = 3, width: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.parts = nn.ModuleList(Block(width, dropout) for _ in range(num_blocks))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for part in self.parts:
            x = part(x)
        return self.head(x)


@pytest.fixture
def stack() -> Callable[..., Stack]:
    """Makes models with repeated blocks; the same seed, the same weights."""

    def make(**sizes: float) -> Stack:
        torch.manual_seed(0)
        return Stack(**sizes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def until() -> Callable[..., None]:
    """Wait for a condition while calling something again and again, as a training loop would."""

    def wait(condition: Callable[[], bool], step: Callable[[], object] = lambda: None, timeout_s: float = 240.0) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "nothing happened in time"
            step()
            time.sleep(0.02)

    return wait


def sleeps_here(pid: int) -> Callable[..., Any]:
    """A backend that hangs in every process but `pid`."""

    def sleeps(graph: Any, inputs: Any) -> Any:
        if os.getpid() != pid:
            time.sleep(1000)
        return graph.forward

    return sleeps
