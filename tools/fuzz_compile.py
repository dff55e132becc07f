"""Random programs by torchspan.compile, judged step by step against the same programs run eagerly.

    python tools/fuzz_compile.py --programs 2000 --out benchmarks/results/fuzz_compile_2.13.0.json
    python tools/fuzz_compile.py --seed 17     # one program: its text, what differs, what plain torch.compile does

Each program comes from its seed (:mod:`_random_programs`) and is run in two worlds that share nothing: its text with
``start=torchspan.compile``, and with a ``start`` that does nothing. After each step these are equal: what was returned, and of
which memory; the arguments; gradients, buffers and attributes; hooks fired and what the forward noted elsewhere; the state of
each random generator; the exception. Numbers are equal within the tolerance of torchspan.core.numerics, and programs in which
every bit is equal are counted. Between steps the compile is waited for, so that the second call takes over.

Where something differs, the program is run once more with torch.compile in the place of torchspan's, and the text says whether
that differs too.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from _random_programs import Program, program
from _two_worlds import Comparison, World

import torchspan
from torchspan.jobs.budget import Budget
from torchspan.regions.watch import finish_compiles
from torchspan.strategies import report_of

BUDGET = Budget(seconds=200, memory="6GiB")
HANGS_S = 300.0  # a step that takes longer is a failure
PER_PROCESS = 100


# running


@dataclass
class Verdict:
    """What came of one program: what differed and in which step, and how much of it ran compiled."""

    seed: int
    difference: str = ""
    step: int = -1
    num_steps: int = 0
    num_models: int = 0
    num_swapped: int = 0
    num_compiled_steps: int = 0
    backend: str = ""
    is_bitwise: bool = True
    seconds: float = 0.0
    outcomes: Counter[str] = field(default_factory=Counter)


class Started:
    """Starts models by torchspan.compile, and knows afterwards what became of them."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._plans: list[Any] = []
        self.reports: list[Any] = []

    def __call__(self, model: Any) -> Any:
        bounded = torchspan.compile(model, backend=self._program.backend, budget=BUDGET, **self._program.options)
        self._plans.append(bounded._torchspan_plan)
        self.reports.append(report_of(bounded))
        return bounded

    @property
    def num_compiled_calls(self) -> int:
        """Calls of compiled graphs so far."""
        generations = [verdict for plan in self._plans for region in plan._regions for verdict in region._generations.all()]
        return sum(verdict.code.num_calls for verdict in generations if verdict.code is not None)

    @property
    def num_swapped(self) -> int:
        """How many models were taken over."""
        return sum("swap_stall_s" in report.figures for report in self.reports)

    def outcomes(self) -> Counter[str]:
        """What became of each compile."""
        attempts = [verdict for report in self.reports for verdict in report.attempts]
        return Counter(
            verdict.outcome if verdict.cause is None else f"{verdict.outcome}: {_kind(verdict.cause)}" for verdict in attempts
        )


def _kind(cause: str) -> str:
    return re.sub(r"\d[\d.e+-]*", "#", cause.splitlines()[0])[:110]


def by_torch(program: Program) -> Callable[[Any], Any]:
    """Starts models by plain torch.compile."""

    def start(model: Any) -> Any:
        dynamic = program.options.get("dynamic")
        model.compile(backend=program.backend, dynamic=dynamic)
        return model

    return start


def judge(program: Program) -> Verdict:
    """Run a program in both worlds, to its end or to the first difference."""
    began = time.monotonic()
    starter = Started(program)
    verdict = Verdict(program.seed, num_steps=len(program.steps), backend=program.backend)
    comparison = comparison_for(program)
    for number, gap, is_compiled in _compared(program, comparison, starter, lambda: starter.num_compiled_calls):
        verdict.num_compiled_steps += is_compiled
        if gap:
            verdict.difference, verdict.step = gap, number
            break
    verdict.num_models, verdict.num_swapped = len(starter.reports), starter.num_swapped
    verdict.outcomes, verdict.is_bitwise = starter.outcomes(), comparison.is_bitwise
    verdict.seconds = time.monotonic() - began
    return verdict


def judge_torch(program: Program) -> str:
    """What differs where plain torch.compile stands in torchspan's place; "" if nothing does."""
    steps = _compared(program, comparison_for(program), by_torch(program), lambda: 0)
    return next((f"step {number}: {gap}" for number, gap, _ in steps if gap), "")


def _compared(
    program: Program, comparison: Comparison, start: Callable[[Any], Any], count: Callable[[], int]
) -> Iterator[tuple[int, str, bool]]:
    """Of each step: its number, what differs after it, and whether compiled code ran in it."""
    eager = World(program, lambda model: model)
    other = World(program, start)
    try:
        for number in range(len(program.steps)):
            faulthandler.dump_traceback_later(HANGS_S, exit=True, file=sys.__stderr__)
            expected, before = eager.step(number), count()
            actual = other.step(number)
            if number not in program.busy:
                finish_compiles()
            yield number, comparison.of(actual, expected), count() > before
    finally:
        faulthandler.cancel_dump_traceback_later()
        eager.close()
        other.close()
        finish_compiles()
        torch.compiler.reset()
        gc.collect()


def comparison_for(program: Program) -> Comparison:
    """With the tolerance of the types that its text names; one compiled backward gives all gradients in an order of its own."""
    lower = [dtype for dtype in (torch.bfloat16, torch.float32) if str(dtype).removeprefix("torch.") in str(program)]
    return Comparison(program.backend == "eager", tuple(lower))


# many


def judged(drawn: Program) -> Verdict:
    """Judge a program in this process; what differs is printed at once."""
    verdict = judge(drawn)
    if verdict.difference:
        print(explained(drawn, verdict), flush=True)
    return verdict


def explained(drawn: Program, verdict: Verdict) -> str:
    """A program and what differs in it."""
    own = judge_torch(drawn)
    lines = [f"{drawn}", f"# seed {verdict.seed}, step {verdict.step}: {verdict.difference}"]
    return "\n".join([*lines, f"# torch.compile: {own or 'no difference'}", "#" * 40])


def run_in_processes(first: int, count: int) -> list[Verdict]:
    """The same in fresh processes of some programs each, so that one that dies, or grows, ends no others."""
    verdicts = []
    last = first + count
    while first < last:
        part = _run_process(first, min(PER_PROCESS, last - first))
        verdicts += part
        first = part[-1].seed + 1
        print(f"{first}: {summary(verdicts)['differ']}", file=sys.stderr, flush=True)
    return verdicts


def _run_process(first: int, count: int) -> list[Verdict]:
    """What one process judged; the last one differs if the process died in it."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "verdicts"
        command = [sys.executable, __file__, "--first", str(first), "--programs", str(count), "--verdicts", str(file)]
        process = subprocess.run(command, check=False)
        verdicts = [_verdict(line) for line in file.read_text().splitlines()] if file.exists() else []
    if process.returncode not in (0, 1) or len(verdicts) < count:
        seed = first + len(verdicts)
        verdicts.append(Verdict(seed, f"the process ended with {process.returncode}"))
    return verdicts


def _verdict(line: str) -> Verdict:
    values = json.loads(line)
    return Verdict(**{**values, "outcomes": Counter(values["outcomes"])})


def summary(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The figures of a run."""
    outcomes: Counter[str] = Counter()
    for verdict in verdicts:
        outcomes += verdict.outcomes
    return {
        "programs": len(verdicts),
        "differ": [
            {"seed": verdict.seed, "step": verdict.step, "what": verdict.difference}
            for verdict in verdicts
            if verdict.difference
        ],
        "programs in which compiled code took over": sum(verdict.num_swapped > 0 for verdict in verdicts),
        "programs by backend": dict(Counter(verdict.backend for verdict in verdicts)),
        "programs that are bitwise eager's, by backend": dict(
            Counter(verdict.backend for verdict in verdicts if verdict.is_bitwise)
        ),
        "models": sum(verdict.num_models for verdict in verdicts),
        "models that were taken over": sum(verdict.num_swapped for verdict in verdicts),
        "steps": sum(verdict.num_steps for verdict in verdicts),
        "steps in which compiled code ran": sum(verdict.num_compiled_steps for verdict in verdicts),
        "seconds": round(sum(verdict.seconds for verdict in verdicts), 1),
        "compiles by outcome": dict(outcomes.most_common(40)),
    }


def _of_this_machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "date": time.strftime("%F"),
    }


def main() -> None:
    """Run them and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="this one program only")
    parser.add_argument("--out", help="where the result is written as JSON")
    parser.add_argument("--verdicts", help=argparse.SUPPRESS)
    options = parser.parse_args()
    prepare()
    if options.seed is not None:
        drawn = program(options.seed)
        verdict = judge(drawn)
        print(explained(drawn, verdict), verdict)
        sys.exit(bool(verdict.difference))
    if options.verdicts:
        sys.exit(_write_verdicts(options.first, options.programs, Path(options.verdicts)))
    result = _of_this_machine() | {"first seed": options.first} | summary(run_in_processes(options.first, options.programs))
    print(json.dumps(result, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(bool(result["differ"]))


def prepare() -> None:
    """Settings of a process that judges: one thread an operator, no warnings, a trace where it dies."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    faulthandler.enable()


def _write_verdicts(first: int, count: int, file: Path) -> bool:
    """Judge, and write each verdict at once; whether any program differs."""
    differs = False
    for seed in range(first, first + count):
        verdict = judged(program(seed))
        differs |= bool(verdict.difference)
        with file.open("a") as lines:
            lines.write(json.dumps(vars(verdict)) + "\n")
    return differs


if __name__ == "__main__":
    main()
