"""``torchspan compile``: run a program with its torch.compile calls bounded, and say how they went."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchspan.cli.drawing import new_console
from torchspan.cli.parser import add_budget, add_program
from torchspan.cli.run import Afterwards, run_program
from torchspan.core.activation import Activation
from torchspan.core.errors import InputError
from torchspan.core.text import check_folder
from torchspan.core.topics import Topic


def add(commands: Any) -> None:
    """Declare the command."""
    compile = commands.add_parser(
        "compile",
        help="run an unmodified program with its torch.compile calls bounded, and say how they went",
        usage="torchspan compile [options] (script.py | -m module) ...",
    )
    add_budget(compile)
    compile.add_argument("--profile", type=Path, help="write where time and memory went to this file, .html or .json (a trace)")
    compile.add_argument("--repro", type=Path, help="write a reproduction of each compile that fails into this folder")
    compile.add_argument("--device", default="auto", help="as for 'torchspan run' (default: auto)")
    add_program(compile)
    compile.set_defaults(command=_compile)


def _compile(options: argparse.Namespace) -> int:
    from torchspan.diagnosis.profiling import write_profiles
    from torchspan.regions.watch import Finished, watching

    if options.profile and options.profile.suffix not in (".html", ".json"):
        raise InputError(f"profile {str(options.profile)!r} is of no known kind; expected a name that ends in .html or .json")
    folder = options.repro.absolute() if options.repro else None
    profile_to = check_folder(options.profile).absolute() if options.profile else None
    finished: list[Finished] = []
    with watching(finished.append):
        activation = Activation(
            options.device, compile="bounded", budget_seconds=options.budget_seconds, budget_memory=options.budget_memory
        )
        afterwards = Afterwards(topics=(Topic.COMPILE,), waits=True)
        code = run_program(options.program, options.module, activation, afterwards)
    if profile_to:
        write_profiles(finished, profile_to)
    if folder:
        _write_repros(finished, folder)
    return code


def _write_repros(finished: Sequence[Any], folder: Path) -> None:
    from torchspan.diagnosis.repro import write_repro

    console = new_console(stderr=True)
    failed = [job for job in finished if job.ending.outcome in ("failed", "timeout", "memory", "crashed")]
    for number, job in enumerate(failed, 1):
        repro = write_repro(job.payload, job.settings, job.ending, folder / f"{number}-{job.region}" if failed[1:] else folder)
        size = f", {repro.num_operations} of {repro.num_operations_before} operations" if repro.kind == "graph" else ""
        console.print(f"{job.region}: {job.ending.outcome}; reproduction: {repro.program} ({repro.kind}{size})", markup=False)
    if not failed:
        console.print("no compile failed: there is nothing to reproduce", style="dim")
