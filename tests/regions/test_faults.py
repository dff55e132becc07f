"""Faults of backends and programs: no step is lost, nothing hangs, nothing is left running, and the Report has the cause."""

from __future__ import annotations

import ctypes
import importlib.util
import inspect
import itertools
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.report import Report
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import Job, run_bounded
from torchspan.jobs.transport import dumps
from torchspan.strategies import report_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo, after a break
    pytest.mark.filterwarnings("ignore:Pickle, copy, and deepcopy support will be removed from itertools"),  # Python 3.13
]
OVERSHOOT_S = 1.0
SOON = Budget(seconds=30, memory="4GiB")
SHORT = Budget(seconds=5, memory="4GiB")


# backends, which travel to the child by value


def as_it_is(graph: Any, inputs: Any) -> Any:
    return graph.forward


def that_calls(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    def backend(graph: Any, inputs: Any) -> Any:
        function(*args)
        return graph.forward

    return backend


def allocates(graph: Any, inputs: Any) -> Any:
    pages = []
    while True:
        pages.append(b"1" * (1 << 24))


def raises_in(pid: int | None) -> Callable[..., Any]:
    def raises(graph: Any, inputs: Any) -> Any:
        if pid in (None, os.getpid()):
            raise RuntimeError("lowering failed")
        return graph.forward

    return raises


def raises_when_it_runs(graph: Any, inputs: Any) -> Any:
    calls = itertools.count()

    def call(*args: Any) -> Any:
        if next(calls) == 2:  # the child's and the check's calls went well
            raise RuntimeError("kernel fault")
        return graph.forward(*args)

    return call


def leaves_an_orphan_unless_in(pid: int) -> Callable[..., Any]:
    def leaves_an_orphan(graph: Any, inputs: Any) -> Any:
        if os.getpid() != pid and os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                time.sleep(1000)
            os._exit(0)
        return graph.forward

    return leaves_an_orphan


def changed_by(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    def is_wrong(graph: Any, inputs: Any) -> Any:
        return lambda *args: tuple(change(output) for output in graph.forward(*args))

    return is_wrong


# programs


class Holds(nn.Module):
    """A model that holds something which no other process can have."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.held = make()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)

    def __del__(self) -> None:
        if hasattr(self.held, "close"):
            self.held.close()


class RefusesToBePickled(nn.Linear):
    def __getstate__(self) -> Any:
        raise KeyError("nobody takes me along")


class Mutates(nn.Module):
    """A model that changes itself in every call, in the way that `change` does."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8), requires_grad=False)
        self.num_calls = 0
        self.seen: list[int] = []
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change(self)
        return self.linear(x) * self.scale + self.num_calls + len(self.seen)


def counts(model: Mutates) -> None:
    model.num_calls += 1


def appends(model: Mutates) -> None:
    model.seen.append(len(model.seen))


def replaces_a_parameter(model: Mutates) -> None:
    model.scale = nn.Parameter(model.scale * 0.5, requires_grad=False)


def registers_a_buffer(model: Mutates) -> None:
    model.register_buffer(f"buffer_{len(model._buffers)}", torch.ones(1))
    model.num_calls = len(model._buffers)


_noise = 0.0


class ReadsAGlobal(nn.Module):
    """A model whose result depends on a global that each call changes."""

    def __init__(self) -> None:
        super().__init__()
        self.noises = itertools.cycle([0.25, 0.5, 0.125])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global _noise
        _noise = next(self.noises)
        return read_the_global(x)


def read_the_global(x: torch.Tensor) -> torch.Tensor:
    return x * _noise


class Branches(nn.Linear):
    """A model whose way depends on its data."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y.relu() if y.sum() > 0 else y * 2


def with_a_hook_that_raises() -> nn.Module:
    def hook(*_: Any) -> None:
        raise ValueError("the hook says no")

    model = nn.Linear(8, 8)
    model.register_forward_hook(hook)
    return model


def a_closure() -> Callable[..., torch.Tensor]:
    linear, factor = nn.Linear(8, 8), 3

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return linear(x) * factor

    return scaled


def a_lambda() -> Callable[..., torch.Tensor]:
    return lambda x: x.sin() + 1


def of_a_local_class() -> nn.Module:
    class Local(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).cos()

    return Local(8, 8)


def of_a_deleted_module(*, is_forgotten: bool) -> nn.Module:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "deleted_module.py"
        path.write_text(inspect.cleandoc(DELETED))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    if is_forgotten:
        del sys.modules[path.stem]
    return module.Model(8, 8)


DELETED = """
    from torch import nn

    class Model(nn.Linear):
        def forward(self, x):
            return helper(super().forward(x))

    def helper(x):
        return x.sin()
"""


# what is to happen


@dataclass(frozen=True)
class Fault:
    """A program and a backend, the outcomes of its Attempts in order, and what the last of them says: cause and place.

    With `decides`, it is the last Decision with this choice that gives the cause.
    """

    name: str
    outcomes: tuple[str, ...]
    says: str = ""
    where: str = ""
    backend: Any = as_it_is
    program: Callable[[], Any] = lambda: nn.Linear(8, 8)
    budget: Budget = SOON
    decides: str | None = None


def hangs(name: str, where: str, backend: Any) -> Fault:
    return Fault(name, ("timeout",), f"not done after {SHORT.seconds:g} s; ended", where, backend, budget=SHORT)


def dies(name: str, says: str, where: str, backend: Any) -> Fault:
    return Fault(name, ("crashed",), f"the compile process {says}", where, backend)


def fails_later(name: str, says: str, where: str, backend: Any) -> Fault:
    return Fault(name, ("compiled", "failed"), says, where, backend)


def is_wrong(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    return fails_later(name, "compiled code gives other results than eager: output", "taking over", changed_by(change))


def cannot_be_sent(name: str, says: str, program: Callable[[], Any]) -> Fault:
    says = f"the program cannot be sent to the compile process: {says}"
    return Fault(name, ("failed",), says, "sending the program", program=program)


def compiles(name: str, program: Callable[[], Any]) -> Fault:
    return Fault(name, ("compiled",), program=program)


def changes(name: str, program: Callable[[], Any]) -> Fault:
    says = "4 input signatures and states of the program were compiled; calls with others run eagerly (recompile_limit=4)"
    return Fault(name, ("compiled",) * 4, says, program=program, decides="eager")


FAULTS = (
    hangs("a backend that sleeps", "in backend", that_calls(time.sleep, 1000)),
    hangs("a backend that spins", "in match", that_calls(re.match, "(a+)+$", "a" * 64 + "b")),  # in C, with the GIL
    hangs("a command that hangs", "while running sleep 1000", that_calls(subprocess.run, ["sleep", "1000"])),
    Fault("endless memory", ("memory",), "of 2.0 GiB; ended", "in allocates", allocates, budget=Budget(30, "2GiB")),
    dies("SIGSEGV", "was ended by SIGSEGV", "in string_at", that_calls(ctypes.string_at, 0)),
    dies("abort", "was ended by SIGABRT", "in backend", that_calls(os.abort)),
    dies("an exit", "exited with code 4 before it was done", "", that_calls(sys.exit, 4)),
    dies("an exit at once", "exited with code 5 before it was done", "", that_calls(os._exit, 5)),
    Fault("an exception", ("failed",), "RuntimeError: lowering failed", "in raises", raises_in(None)),
    Fault("an orphan", ("compiled",), backend=leaves_an_orphan_unless_in(os.getpid())),
    fails_later(
        "it fails here only", "does not compile here: RuntimeError: lowering failed", "taking over", raises_in(os.getpid())
    ),
    fails_later("it fails when it runs", "compiled code raised RuntimeError: kernel fault", "running", raises_when_it_runs),
    is_wrong("wrong numbers", lambda output: output * 1.01),
    is_wrong("wrong shapes", lambda output: output[:1]),
    is_wrong("NaN", lambda output: output * torch.nan),
    cannot_be_sent("a lock", "cannot pickle '_thread.lock' object", lambda: Holds(threading.Lock)),
    cannot_be_sent("a socket", "cannot pickle 'socket' object", lambda: Holds(socket.socket)),
    cannot_be_sent("an open file", "", lambda: Holds(partial(open, os.devnull, "w"))),
    cannot_be_sent("no pickling", "'nobody takes me along'", lambda: RefusesToBePickled(8, 8)),
    compiles("a closure", a_closure),
    compiles("a lambda", a_lambda),
    compiles("a local class", of_a_local_class),
    compiles("a deleted module", partial(of_a_deleted_module, is_forgotten=False)),
    compiles("a forgotten module", partial(of_a_deleted_module, is_forgotten=True)),
    compiles("it branches by its data", lambda: Branches(8, 8)),
    compiles("it replaces a parameter", lambda: Mutates(replaces_a_parameter)),
    changes("it counts", lambda: Mutates(counts)),
    changes("it appends", lambda: Mutates(appends)),
    changes("it registers buffers", lambda: Mutates(registers_a_buffer)),
    Fault(
        "a changing global",
        ("compiled", "compiled"),
        "8 calls changed the state of the program that it was compiled for while they ran",
        program=ReadsAGlobal,
        decides="eager",
    ),
    Fault("a hook that raises", ("failed",), "ValueError: the hook says no", "in hook", program=with_a_hook_that_raises),
)


def result_of(program: Callable[..., Any], x: torch.Tensor) -> Any:
    """What a call gives, or raises."""
    try:
        return program(x).detach()
    except ValueError as error:
        return f"{type(error).__name__}: {error}"


class Run:
    """A compiled program beside an eager one of the same kind; every step of both must give the same."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        self.reference, program = (self._make() for _ in range(2))
        self.compiled = torchspan.compile(
            program, backend=fault.backend, budget=fault.budget, strategy="whole", recompile_limit=4
        )
        self.inputs = itertools.cycle([torch.ones(4, 8), -torch.ones(4, 8)])
        self.num_steps = 0

    def _make(self) -> Any:
        torch.manual_seed(0)
        return self.fault.program()

    @property
    def report(self) -> Report:
        return report_of(self.compiled)

    def step(self) -> None:
        x = next(self.inputs)
        expected, actual = result_of(self.reference, x), result_of(self.compiled, x)
        is_same = expected == actual if isinstance(expected, str) else torch.equal(expected, actual)
        assert is_same, (self.num_steps, expected, actual)
        self.num_steps += 1

    def go(self, limit_s: float) -> None:
        """Step until all is reported, and a few steps more."""
        started = time.monotonic()
        while not self.is_reported():
            self.step()
            assert time.monotonic() - started < limit_s, self.told()
            time.sleep(0.01)
        for _ in range(4):
            self.step()

    def is_reported(self) -> bool:
        outcomes = tuple(attempt.outcome for attempt in self.report.attempts)
        if outcomes != self.fault.outcomes:
            return outcomes != self.fault.outcomes[: len(outcomes)]  # wrong already
        return self.fault.decides is None or any(
            decision.choice == self.fault.decides for decision in self.report.decisions[2:]
        )

    def told(self) -> Any:
        return self.report.attempts, self.report.decisions

    def check(self) -> None:
        """The Report has the right outcomes and the right cause, and no attempt overran its budget."""
        fault, attempts = self.fault, self.report.attempts
        assert tuple(attempt.outcome for attempt in attempts) == fault.outcomes, self.told()
        reasons = [decision.reason for decision in self.report.decisions if decision.choice == fault.decides]
        texts = reasons[-1:] if fault.decides else [str(attempts[-1].cause)]
        assert fault.says in texts[0] and fault.where in (attempts[-1].where or ""), self.told()
        limit = fault.budget.limit_bytes or 0
        for attempt in attempts:
            assert attempt.seconds <= fault.budget.seconds + OVERSHOOT_S and (attempt.peak_bytes or 0) <= 1.05 * limit, attempt


@pytest.fixture(autouse=True)
def warm() -> None:
    """A compile server that is ready: one that was idle has ended, and starting another is not what the limits here are for."""
    assert run_bounded(Job("torchspan.regions.worker:call_function", dumps((abs, (-1,)))), Budget(600)).outcome == "compiled"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_costs_no_step_and_is_reported_with_its_cause(fault: Fault, nothing_left: Callable[[], None]) -> None:
    run = Run(fault)
    started = time.monotonic()
    run.go(limit_s=60)
    if fault.budget is SHORT:
        assert time.monotonic() - started <= SHORT.seconds + OVERSHOOT_S
    run.check()
    nothing_left()


@pytest.mark.parametrize(
    "names",
    [
        ("a backend that sleeps", "abort", "an exception", "it fails when it runs"),
        ("a lock", "wrong numbers", "an exit at once", "it counts"),
    ],
    ids=lambda names: ", ".join(names),
)
def test_faults_of_several_threads_at_once_are_told_apart(names: tuple[str, ...], nothing_left: Callable[[], None]) -> None:
    runs = [Run(fault) for fault in FAULTS if fault.name in names]
    with ThreadPoolExecutor(4) as threads:
        futures = [threads.submit(run.go, limit_s=100) for run in runs]
        for run, future in zip(runs, futures, strict=True):
            future.result()
            run.check()
    assert len(runs) == 4
    nothing_left()
