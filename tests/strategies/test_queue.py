"""Many compiles at once: none waits for one that hangs, each ends with its model, and none is started after the end."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchspan
from compile_server import sleeps_here
from torchspan.core.report import Report
from torchspan.jobs.budget import Budget
from torchspan.jobs.machine import Machine
from torchspan.jobs.supervisor import end_servers, server_pids
from torchspan.jobs.turns import turns
from torchspan.regions.compiling import end_compiles

Wait = Callable[..., None]
GONE = ("cancelled", "the compiled program was deleted")
LONG = Budget(seconds=300, memory="1GiB")


@pytest.fixture(autouse=True)
def two_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the machine bears, whatever it is: two compiles at once, and four more beside those that are slow."""
    monkeypatch.setattr(turns, "machine", Machine(2, lambda: 64 << 30))


def linear(backend: Any = "eager", program: Any = None, **arguments: Any) -> Any:
    return torchspan.compile(program or nn.Linear(4, 4), strategy="whole", backend=backend, budget=LONG, **arguments)


def hanging(number: int = 1) -> list[Any]:
    return [linear(sleeps_here(os.getpid())) for _ in range(number)]


def is_swapped(program: Any) -> bool:
    return "swap_stall_s" in program.report.figures


def outcomes(report: Report) -> list[tuple[str, str | None]]:
    return [(attempt.outcome, attempt.cause) for attempt in report.attempts]


def test_twenty_models_called_at_once_do_not_wait_for_two_that_hang(until: Wait, nothing_left: Callable[[], None]) -> None:
    x = torch.ones(2, 4)
    stuck, others = hanging(2), [linear() for _ in range(20)]
    for program in (*stuck, *others):
        program(x)
    until(lambda: all(program.report.attempts for program in others))
    assert [outcomes(program.report) for program in others] == [[("compiled", None)]] * 20
    until(lambda: is_swapped(others[-1]), lambda: others[-1](x))
    reports = [program.report for program in stuck]
    assert [outcomes(report) for report in reports] == [[], []]  # they still hang
    stuck.clear()
    until(lambda: all(report.attempts for report in reports))
    assert [outcomes(report) for report in reports] == [[GONE], [GONE]]
    nothing_left()


@pytest.mark.parametrize("is_function", [False, True])
def test_a_compile_is_cancelled_with_its_model_also_in_the_queue(
    is_function: bool, until: Wait, nothing_left: Callable[[], None]
) -> None:
    x, reports = torch.ones(2, 4), []
    for _ in range(12):  # more than may run
        program = linear(sleeps_here(os.getpid()), (lambda x: x + 1) if is_function else None)
        program(x)
        reports.append(program.report)
        if len(reports) == 1:
            first = program  # whose compile goes on
    del program
    until(lambda: all(report.attempts for report in reports[1:]))
    assert [outcomes(report) for report in reports] == [[], *[[GONE]] * 11]
    assert turns.num_waiting == 0
    del first
    until(lambda: bool(reports[0].attempts))
    nothing_left()


def test_a_model_with_compiled_code_is_not_kept_by_the_compile_of_another_size(
    until: Wait, nothing_left: Callable[[], None]
) -> None:
    pid = os.getpid()

    def hangs_at_three_rows(graph: Any, inputs: Any) -> Any:
        if os.getpid() != pid and any(input_.shape[0] == 3 for input_ in inputs if isinstance(input_, torch.Tensor)):
            time.sleep(1000)
        return graph.forward

    programs = [linear(hangs_at_three_rows, dynamic=False)]
    until(lambda: is_swapped(programs[0]), lambda: programs[0](torch.ones(2, 4)))
    programs[0](torch.ones(3, 4))
    report = programs[0].report
    programs.clear()
    gc.collect()
    until(lambda: len(report.attempts) == 2)
    assert outcomes(report)[1] == GONE
    nothing_left()


def test_ending_the_servers_or_the_compiles_ends_the_queue_too_and_starts_none(
    until: Wait, nothing_left: Callable[[], None]
) -> None:
    for end, why in ((end_servers, "the compile servers were ended"), (end_compiles, "the program ended first")):
        programs = hanging(12)
        for program in programs:
            program(torch.ones(2, 4))
        until(lambda: turns.num_waiting > 0)
        end()
        until(lambda programs=programs: all(program.report.attempts for program in programs))
        assert [outcomes(program.report) for program in programs] == [[("cancelled", why)]] * 12
        if end is end_servers:
            assert server_pids() == []
    nothing_left()
