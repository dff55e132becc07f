"""``torchspan run``: run an unmodified program; ``compile`` and ``explain`` run one by the same function."""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import os
import runpy
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.machinery import PathFinder
from pathlib import Path
from types import TracebackType
from typing import Any

from torchspan.cli.drawing import draw_report, new_console
from torchspan.cli.parser import add_budget, add_program
from torchspan.core.activation import Activation
from torchspan.core.errors import InputError
from torchspan.core.report import Report
from torchspan.core.topics import Topic


def add(commands: Any) -> None:
    """Declare the command."""
    run = commands.add_parser(
        "run", help="run an unmodified program", usage="torchspan run [options] (script.py | -m module) ..."
    )
    modes = "auto, strict, torchdevice, cuda-semantics, off, or the device that every request is given"
    run.add_argument("--device", default="auto", help=f"{modes} (default: auto)")
    run.add_argument(
        "--masquerade", action="store_true", help="tensors answer the program as if they were on the device that it asked for"
    )
    run.add_argument(
        "--compile", choices=("bounded", "off"), default="bounded", help="what torch.compile does (default: bounded)"
    )
    add_budget(run)
    run.add_argument("--disable", default="", help="backports and device rules to leave out, separated by commas")
    run.add_argument("--report", type=Path, help="write the migration report to this file, .html or .json")
    run.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="end with the migration report as a table"
    )
    run.add_argument("--quiet", action="store_true", help="print no report at the end")
    add_program(run)
    run.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    activation = Activation(
        options.device,
        masquerade=options.masquerade,
        compile=options.compile,
        budget_seconds=options.budget_seconds,
        budget_memory=options.budget_memory,
        disable=options.disable,
    )
    ending = Afterwards(options.report, table=options.verbose, quiet=options.quiet)
    return run_program(options.program, options.module, activation, ending)


@dataclass(frozen=True)
class Afterwards:
    """What happens when the program has ended: a page at `report`, a `table` of lines, the Report's screen unless `quiet`.

    The screen has these `topics`, all where None. Where a command `waits`, compiles that are under way come to their end first.
    """

    report: Path | None = None
    table: bool = False
    quiet: bool = False
    topics: Sequence[Topic] | None = None
    waits: bool = False


def run_program(program: Sequence[str], is_module: bool, activation: Activation, afterwards: Afterwards) -> int:
    """Run `program`, a file or a module and its arguments, with torchspan in force; its exit code."""
    from torchspan.environment.mps import fall_back_on_mps

    fall_back_on_mps()  # before torch is imported, which the following does
    from torchspan.api import autoload, deactivate
    from torchspan.regions.compiling import end_compiles
    from torchspan.regions.watch import finish_compiles
    from torchspan.report import Recording, report_path, write_page

    if not program:
        raise InputError("no program to run; expected 'torchspan run script.py' or 'torchspan run -m module'")
    target, *arguments = program
    check_program(target, is_module)
    report_to = report_path(afterwards.report) if afterwards.report else None
    has_backports = os.environ.get("TORCHSPAN_BACKPORTS", "1") != "0"  # no option is for it
    settings = replace(activation, backports=has_backports)
    os.environ |= settings.to_environ()  # children that the program starts are activated by these, as this process is
    is_wanted = bool(report_to or afterwards.table)
    with Recording([target, *arguments], None if is_module else target, is_wanted=is_wanted) as recording:
        autoload()
        try:
            code, recording.outcome = _run_target(target, is_module, arguments)
        finally:
            if activation.compile == "bounded":
                (finish_compiles if afterwards.waits else end_compiles)()
            deactivate()
        if not recording.is_here:
            return code
        page = recording.page() if is_wanted else None
        if page is not None and report_to:
            write_page(page, report_to)
        _draw(recording.report, page, afterwards)
    return code


def _draw(report: Report, page: Any, afterwards: Afterwards) -> None:
    from torchspan.report import draw_table, rank_of_world

    if afterwards.quiet or rank_of_world()[0]:
        return
    console = new_console(stderr=True)
    draw_report(report, console, afterwards.topics)
    is_all = not (afterwards.report or afterwards.topics)
    if afterwards.table:
        draw_table(page, console)
    elif is_all and any(decision.topic is Topic.DEVICE for decision in report.decisions):
        console.print("'torchspan run --report out.html' shows what to write instead of each line", style="dim")


def check_program(target: str, is_module: bool) -> None:
    """Raise InputError where there is no such file or module."""
    if is_module:
        sys.path.insert(0, os.getcwd())
        if not _has_module(target):
            raise InputError(f"no module {target!r} to run; expected the dotted name of one that 'python -m' would find")
        return
    if not Path(target).is_file():
        folder = Path(target).parent
        near = difflib.get_close_matches(
            Path(target).name, [p.name for p in folder.glob("*.py")] if folder.is_dir() else [], n=1
        )
        hint = f"; did you mean {str(folder / near[0])!r}?" if near else ""
        raise InputError(f"no file {target!r} to run{hint}")


def _has_module(name: str) -> bool:
    """Whether there is a module of that dotted name; imports none of the packages that it is in."""
    first, *rest = name.split(".")
    spec = importlib.util.find_spec(first)
    for end in range(2, len(rest) + 2):
        if spec is None or spec.submodule_search_locations is None:
            return False
        spec = PathFinder.find_spec(".".join([first, *rest][:end]), spec.submodule_search_locations)
    return spec is not None


def _run_target(target: str, is_module: bool, arguments: list[str]) -> tuple[int, str]:
    """Run the program as ``python target`` would, with its own traceback when it fails; its exit code, and how it ended."""
    from torchspan.devices.absent_packages import advice
    from torchspan.scan import show_advice

    sys.argv = [target, *arguments]
    try:
        if is_module:
            runpy.run_module(target, run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(target).resolve().parent))
            runpy.run_path(target, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0, f"exit code {stop.code}" if stop.code else "ended"
        print(stop.code, file=sys.stderr)
        return 1, f"exit: {stop.code}"
    except KeyboardInterrupt:
        return 130, "interrupted"
    except BaseException as error:  # noqa: BLE001 (whatever the program raises is shown as Python would show it)
        traceback.print_exception(type(error), error, _without_ours(error.__traceback__))
        show_advice(error)
        if isinstance(error, ModuleNotFoundError) and (hint := advice(error.name or "")):
            print(f"torchspan: {hint}", file=sys.stderr)
        return 1, "failed: " + "".join(traceback.format_exception_only(type(error), error)).strip()
    return 0, "ended"


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins in the user's program."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace
