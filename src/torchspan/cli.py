"""The command line: doctor, scan, run, port, compile, explain, precompile, train, passes. It draws a Report, or prints JSON."""

from __future__ import annotations

import argparse
import atexit
import difflib
import importlib
import importlib.util
import inspect
import itertools
import json
import os
import runpy
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

import torchspan
from torchspan.core.errors import InputError, TorchspanError, unknown_name
from torchspan.core.logs import show_logs
from torchspan.core.registry import Registry
from torchspan.core.report import Attempt, Decision, Report
from torchspan.core.text import check_folder, format_bytes
from torchspan.core.topics import Topic

if TYPE_CHECKING:
    from torchspan.report import Ported, Proof
    from torchspan.scan import Scan


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        show_logs(os.environ.get("TORCHSPAN_LOG", ""))
        if arguments[:1] == ["train"]:
            code = _train(arguments[1:])
            if argv is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                _leave(code)
            return code
        end = arguments.index("--") if "port" in arguments[:2] and "--" in arguments else len(arguments)
        options = _parser().parse_args(arguments[:end])
        options.arguments = arguments[end + 1 :]
        if options.verbose and options.command is not _run:
            show_logs(os.environ.get("TORCHSPAN_LOG") or "info")
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except TorchspanError as error:
        print(f"torchspan: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing more can be said
        return 141


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that says what was meant."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; '{self.prog} --help' shows what can be given", file=sys.stderr)
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.option_strings[0] if action.option_strings else action.dest.removesuffix("_name")
            raise unknown_name(kind, str(value), action.choices, f"'{self.prog} --help' lists what there is")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="torchspan", description="One PyTorch program, on any PyTorch, any device, any scale.")
    parser.add_argument("--version", action="version", version=f"torchspan {torchspan.__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is decided (run: a table at the end)")
    commands = parser.add_subparsers(dest="command_name", metavar="command", required=True, parser_class=_Parser)

    doctor = commands.add_parser("doctor", help="what is here, and what torchspan provides for it")
    doctor.add_argument("name", nargs="?", help="explain one backport")
    doctor.add_argument("--json", action="store_true", help="print JSON")
    doctor.set_defaults(command=_doctor)

    scan = commands.add_parser("scan", help="which torch a code base needs, and what of it the backports cover")
    scan.add_argument(
        "paths", nargs="+", metavar="path", help="Python files, folders that are searched for them, installed packages"
    )
    scan.add_argument("--torch", help="a release such as 2.8: only what that one lacks (default: each that torchspan runs on)")
    scan.add_argument("--fix-requires", action="store_true", help="write the oldest torch that it runs on into pyproject.toml")
    scan.add_argument("--json", action="store_true", help="print JSON")
    scan.set_defaults(command=_scan)

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
    run.add_argument("--budget-seconds", help="seconds that one compile may take")
    run.add_argument("--budget-memory", help="memory that one compile may take, such as 4GiB")
    run.add_argument("--disable", default="", help="backports and device rules to leave out, separated by commas")
    run.add_argument("--report", type=Path, help="write the migration report to this file, .html or .json")
    run.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="end with the migration report as a table"
    )
    run.add_argument("--quiet", action="store_true", help="print no report at the end")
    run.add_argument("-m", dest="module", action="store_true", help="what follows is the name of a module")
    run.add_argument("program", nargs=argparse.REMAINDER, metavar="program", help="the program and its arguments")
    run.set_defaults(command=_run, topics=None, finish=False)

    _add_port_command(commands)
    _add_compile_commands(commands)

    precompile = commands.add_parser("precompile", help="compile a model into an artifact that loads without compiling")
    precompile.add_argument("model", help="module:factory, a function without arguments that gives the model")
    precompile.add_argument(
        "--inputs",
        required=True,
        action="append",
        help="examples, such as 'float32[4,10],int64[4]', or 'float32[batch=4,10]' for a dynamic size; more: more entries",
    )
    precompile.add_argument("--compiler", choices=("inductor", "regional_inductor", "eager"), default="inductor")
    precompile.add_argument("--passes", default="", help="a pipeline over the operator graphs; 'torchspan passes' lists passes")
    precompile.add_argument("--weights", action="store_true", help="have the model's weights inside too")
    precompile.add_argument("--sign", type=Path, metavar="KEY", help="sign it: a file with a secret, or an Ed25519 key (PEM)")
    precompile.add_argument("-o", "--output", type=Path, required=True, help="the artifact to write, such as model.tspan")
    precompile.set_defaults(command=_precompile)

    _add_artifact_commands(commands)

    commands.add_parser("train", help="train a model as a graph: 'torchspan train --help'", add_help=False)

    passes = commands.add_parser("passes", help="the passes over a graph, and their options")
    passes.add_argument("--json", action="store_true", help="print JSON")
    passes.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="run the pass again that failed and left FILE; this runs FILE as a program: take it from whom you trust",
    )
    passes.set_defaults(command=_passes)
    return parser


_AS_RUN: dict[str, Any] = {"masquerade": False, "disable": "", "report": None, "verbose": False, "budget_seconds": None}
_AS_RUN |= {"budget_memory": None, "quiet": False, "topics": (Topic.COMPILE,), "finish": True}


def _add_artifact_commands(commands: Any) -> None:
    artifact = commands.add_parser("artifact", help="look into artifacts: show, verify, diff")
    actions = artifact.add_subparsers(dest="action", required=True, metavar="show|verify|diff")
    show = actions.add_parser("show", help="what its manifest says; nothing else in it is opened")
    verify = actions.add_parser("verify", help="whether it is whole, signed, and fits this machine")
    verify.add_argument("--trusted-key", type=Path, action="append", default=[], metavar="KEY", help="who may have signed it")
    for parser, command in ((show, _artifact_show), (verify, _artifact_verify)):
        parser.add_argument("file", type=Path)
        parser.set_defaults(command=command)
    diff = actions.add_parser("diff", help="which entries and payloads differ; the exit code is 1 if any do")
    diff.add_argument("first", type=Path)
    diff.add_argument("second", type=Path)
    diff.set_defaults(command=_artifact_diff)
    for parser in (show, verify, diff):
        parser.add_argument("--json", action="store_true", help="print JSON")


def _add_port_command(commands: Any) -> None:
    port = commands.add_parser(
        "port",
        help="write a program that runs on every device, without torchspan",
        usage="torchspan port script.py [-o OUTPUT] [--diff] [--check] [--device DEVICE] [-- arguments of the script]",
        description="Replace each line of a program that names CUDA by one that runs on every device, and show the diff. Lines "
        "that have no such form are left as they are and listed on standard error; then the exit code is 1.",
    )
    port.add_argument(
        "-o", "--output", type=Path, help="the ported script (.py), or a folder for it and the modules it imports"
    )
    port.add_argument("--diff", action="store_true", help="print the diff although there is an output (without one: always)")
    port.add_argument(
        "--check",
        action="store_true",
        help="run both, the original under torchspan and the ported program without it, with the arguments after '--', "
        "and compare what they print; if they differ, the exit code is 1",
    )
    port.add_argument("--device", default="auto", help="with --check: as for 'torchspan run' (default: auto)")
    port.add_argument("script", help="the program; the modules under its folder that it imports are looked at too")
    port.set_defaults(command=_port)


def _add_compile_commands(commands: Any) -> None:
    compile = commands.add_parser(
        "compile",
        help="run an unmodified program with its torch.compile calls bounded, and say how they went",
        usage="torchspan compile [options] (script.py | -m module) ...",
    )
    compile.add_argument("--budget-seconds", help="seconds that one compile may take")
    compile.add_argument("--budget-memory", help="memory that one compile may take, such as 4GiB")
    compile.add_argument("--profile", type=Path, help="write where time and memory went to this file, .html or .json (a trace)")
    compile.add_argument("--repro", type=Path, help="write a reproduction of each compile that fails into this folder")
    compile.set_defaults(
        command=_compile, **{k: v for k, v in _AS_RUN.items() if not k.startswith("budget")}, compile="bounded"
    )

    explain = commands.add_parser(
        "explain",
        help="run a program and say where its graphs break, why, and what is compiled again",
        usage="torchspan explain [options] (script.py | -m module) ...",
    )
    explain.add_argument("--json", action="store_true", help="print JSON, after what the program prints")
    explain.add_argument("--seconds", type=float, help="a compile that takes longer ends the program (default: 300)")
    explain.set_defaults(command=_explain, **_AS_RUN | {"quiet": True}, compile="off")
    for command in (compile, explain):
        command.add_argument("--device", default="auto", help="as for 'torchspan run' (default: auto)")
        command.add_argument("-m", dest="module", action="store_true", help="what follows is the name of a module")
        command.add_argument("program", nargs=argparse.REMAINDER, metavar="program", help="the program and its arguments")


# doctor


def _doctor(options: argparse.Namespace) -> int:
    from torchspan.backports._base import all_backports, get_backport, status
    from torchspan.environment.facts import gather

    if options.name is not None and (described := _described_plug_in(options.name)):
        _emit(options.json, described, lambda console: console.print(_pairs(described)))
        return 0
    if options.name is not None:
        backport = get_backport(options.name)
        state, reason = status(backport)
        facts_of = {
            "name": backport.name,
            "provides": backport.summary,
            "here": f"{state}: {reason}",
            "since": f"torch {backport.since}" if backport.since else "registered",
            "upstream": backport.upstream or "none",
            "differs": backport.differs,
        } | ({"instead": backport.instead} if backport.instead else {})
        _emit(options.json, facts_of, lambda console: console.print(_pairs(facts_of)))
        return 0
    facts = gather()
    rows = [(b, *status(b)) for b in all_backports()]
    values: dict[str, Any] = {
        "facts": facts.to_dict(),
        "backports": [{"name": b.name, "target": b.target, "state": state, "reason": why} for b, state, why in rows],
        **{kind: {name: _summary(registry, name) for name in registry.names()} for kind, registry in _plug_ins().items()},
    }

    def draw(console: Console) -> None:
        here = facts.to_dict() | {"memory_bytes": format_bytes(facts.memory_bytes)}
        here["accelerator"] = facts.accelerator() or "none: requests for one are redirected to the CPU"
        console.print(_pairs({name.removesuffix("_bytes"): "not found" if v is None else str(v) for name, v in here.items()}))
        console.print()
        table = _table("backport", "here", "torch has it since", "provides")
        for backport, state, why in rows:
            since = backport.since if backport.since[:1].isdigit() else "-"
            provides = f"{backport.summary} ({why})" if state == "not possible here" else backport.summary
            table.add_row(backport.name, state, since, provides)
        console.print(table)
        for kind in _plug_ins():
            console.print()
            listed = _table(kind.replace("_", " "), "does")
            for name, summary in values[kind].items():
                listed.add_row(name, summary)
            console.print(listed)
        console.print("\n'torchspan doctor NAME' explains one", style="dim")

    _emit(options.json, values, draw)
    return 0


def _plug_ins() -> dict[str, Registry]:
    """The kinds of plug-ins besides backports."""
    kinds = {"device_rules": "devices", "passes": "passes", "strategies": "strategies", "models": "models"}
    return {kind: Registry(f"torchspan.{folder}", kind.replace("_", " ").rstrip("s")) for kind, folder in kinds.items()}


def _summary(registry: Registry, name: str) -> str:
    return registry.docstring(name).partition("\n")[0]


def _described_plug_in(name: str) -> dict[str, str] | None:
    """What a plug-in of this name says of itself; None where there is none besides backports."""
    found = next(((kind, registry) for kind, registry in _plug_ins().items() if name in registry.names()), None)
    if found is None:
        return None
    kind, registry = found
    return {"name": name, "kind": kind.replace("_", " "), "says": registry.docstring(name), "file": registry.target(name)}


# scan


def _scan(options: argparse.Namespace) -> int:
    from torchspan.scan import scan
    from torchspan.scan._requires import fix_requires

    found = scan(options.paths, options.torch)
    values = found.to_dict()
    if options.fix_requires:
        values["requires"] = fix_requires(found, options.paths)
    _emit(options.json, values, lambda console: draw_scan(found, console))
    if options.fix_requires and not options.json:
        print(values["requires"])
    return found.exit_code


def draw_scan(found: Scan, console: Console) -> None:
    """Each cause on a line of its own, then what they come to."""
    lines = [("bold", found.summary)]
    lines[:0] = [("red", f"could not be read: {path}: {reason}") for path, reason in found.unreadable.items()]
    for standing, style in (("unknown", "dim"), ("guarded", "dim"), ("covered", ""), ("uncovered", "")):
        texts = found.texts(standing)
        lines[:0] = [("bold", standing), *((style, f"  {text}") for text in texts)] if texts else []
    for style, text in lines:
        console.print(text, style=style or None, highlight=False, markup=False, emoji=False, soft_wrap=True)


# run


def _run(options: argparse.Namespace) -> int:
    from torchspan.api import autoload, deactivate
    from torchspan.regions.lifecycle import end_compiles
    from torchspan.regions.watch import finish_compiles
    from torchspan.report import Recording, draw_table, rank_of_world, report_path, write_page

    if not options.program:
        raise InputError("no program to run; expected 'torchspan run script.py' or 'torchspan run -m module'")
    target, *arguments = options.program
    _check_program(target, options.module)
    report_to = report_path(options.report) if options.report else None
    os.environ |= {  # children that the program starts are activated by these, as this process is
        "TORCHSPAN": "1",
        "TORCHSPAN_DEVICE": options.device,
        "TORCHSPAN_MASQUERADE": str(int(options.masquerade)),
        "TORCHSPAN_COMPILE": options.compile,
        "TORCHSPAN_DISABLE": options.disable,
    }
    budget = {"TORCHSPAN_BUDGET_SECONDS": options.budget_seconds, "TORCHSPAN_BUDGET_MEMORY": options.budget_memory}
    os.environ |= {name: value for name, value in budget.items() if value is not None}
    is_wanted = bool(report_to or options.verbose)
    with Recording([target, *arguments], None if options.module else target, is_wanted=is_wanted) as recording:
        autoload()
        try:
            code, recording.outcome = _run_program(target, options.module, arguments)
        finally:
            if options.compile == "bounded" and options.finish:
                finish_compiles()
            elif options.compile == "bounded":
                end_compiles()
            deactivate()
        if not recording.is_here:
            return code
        if is_wanted:
            page = recording.page()
        if report_to:
            write_page(page, report_to)
        if not options.quiet and not rank_of_world()[0]:
            console = _console(stderr=True)
            draw_report(recording.report, console, options.topics)
            if options.verbose:
                draw_table(page, console)
            elif (
                not report_to
                and not options.topics
                and any(decision.topic is Topic.DEVICE for decision in recording.report.decisions)
            ):
                console.print("'torchspan run --report out.html' shows what to write instead of each line", style="dim")
    return code


def _check_program(target: str, is_module: bool) -> None:
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


def _run_program(target: str, is_module: bool, arguments: list[str]) -> tuple[int, str]:
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
        if isinstance(error, ModuleNotFoundError) and (told := advice(error.name or "")):
            print(f"torchspan: {told}", file=sys.stderr)
        return 1, "failed: " + "".join(traceback.format_exception_only(type(error), error)).strip()
    return 0, "ended"


def _without_ours(trace: TracebackType | None) -> TracebackType | None:
    """The part of a traceback that begins in the user's program."""
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, runpy.__file__, "<frozen runpy>"):
        trace = trace.tb_next
    return trace


# port


def _port(options: argparse.Namespace) -> int:
    from torchspan.report import port_program, prove, write_ported

    script = Path(options.script)
    _check_program(options.script, is_module=False)
    if options.arguments and not options.check:
        raise InputError(
            f"arguments {shlex.join(options.arguments)!r} are of a run; expected '--check', which runs the program"
        )
    proof = None
    if options.check:
        ported, proof = prove(script, options.arguments, options.device)
    else:
        ported = port_program(script)
    if options.diff or options.output is None:
        print("".join(each.diff for each in ported), end="", flush=True)
    written = write_ported(ported, options.output) if options.output else []
    console = _console(stderr=True)
    is_whole = _draw_ported(ported, written, options.output, console)
    return int(not (_draw_proof(proof, console) and is_whole))


def _draw_ported(ported: Sequence[Ported], written: Sequence[Path], output: Path | None, console: Console) -> bool:
    """Say what was replaced, and what is left to do; whether that is nothing."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    is_one = output is not None and output.suffix == ".py"
    for each in ported:
        for statement in each.left:
            say(f"{each.name}:{statement.first}: by hand: {statement.source.strip()}")
            say(*(f"    {note}" for note in statement.notes), sep="\n", style="yellow")
    others = [each.name for each in ported[1:] if each.is_changed] if is_one else []
    if others:
        say(f"not written: {', '.join(others)}, which the script imports; '-o FOLDER' ports them too", style="yellow")
    num_replaced, num_left = (
        sum(map(count, ported)) for count in (lambda each: each.num_replaced, lambda each: len(each.left))
    )
    where = f", written to {', '.join(map(str, written))}" if written else ""
    say(f"{num_replaced} statements replaced, {num_left} left to do by hand{where}", style="bold")
    return not num_left and not others


def _draw_proof(proof: Proof | None, console: Console) -> bool:
    """Say whether both runs ended alike and printed the same; True where there were none."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    if proof is None:
        return True
    if proof.is_same:
        lines = len(proof.ported.output.splitlines())
        say(f"both ran: exit code {proof.ported.code}, the same {lines} lines of output, to the letter", style="bold")
        return proof.ported.code == 0
    if proof.difference:
        say(proof.difference)
    for name, ending in (("the original under torchspan", proof.original), ("the ported program without", proof.ported)):
        say(f"{name}: exit code {ending.code}{f': {ending.last_words}' if ending.code else ''}")
    say("the two do not print the same", style="bold")
    return False


# compile, explain


def _compile(options: argparse.Namespace) -> int:
    from torchspan.diagnosis.profiling import write_profiles
    from torchspan.regions.watch import Finished, watching

    if options.profile and options.profile.suffix not in (".html", ".json"):
        raise InputError(f"profile {str(options.profile)!r} is of no known kind; expected a name that ends in .html or .json")
    folder = options.repro.absolute() if options.repro else None
    profile_to = check_folder(options.profile).absolute() if options.profile else None
    finished: list[Finished] = []
    with watching(finished.append):
        code = _run(options)
    if profile_to:
        write_profiles(finished, profile_to)
    if folder:
        _write_repros(finished, folder)
    return code


def _write_repros(finished: Sequence[Any], folder: Path) -> None:
    from torchspan.diagnosis.repro import write_repro

    console = _console(stderr=True)
    failed = [one for one in finished if one.ending.outcome in ("failed", "timeout", "memory", "crashed")]
    for number, one in enumerate(failed, 1):
        made = write_repro(one.payload, one.settings, one.ending, folder / f"{number}-{one.region}" if failed[1:] else folder)
        size = f", {made.num_operations} of {made.num_operations_before} operations" if made.kind == "graph" else ""
        console.print(f"{one.region}: {one.ending.outcome}; reproduction: {made.program} ({made.kind}{size})", markup=False)
    if not failed:
        console.print("no compile failed: there is nothing to reproduce", style="dim")


def _explain(options: argparse.Namespace) -> int:
    from torchspan.diagnosis.explain import explaining
    from torchspan.jobs.budget import DEFAULT_BUDGET, Budget

    with explaining(DEFAULT_BUDGET if options.seconds is None else Budget(options.seconds)) as found:
        code = _run(options)
    _emit(options.json, found.to_dict(), lambda console: _draw_explanation(found, console))
    return code


def _draw_explanation(found: Any, console: Console) -> None:
    console.rule("[bold]torchspan explain", align="left")
    counts = f"{len(found.graphs)} graphs, {len(found.breaks)} graph breaks, {len(found.recompiles)} recompiles"
    console.print(f"{found.num_calls} calls of torch.compile: {counts}", highlight=False)
    for one in found.hung:
        said = f"a compile hung: not done after {one.seconds:g} s, at {one.site or one.where}"
        console.print(said, style="red", markup=False, soft_wrap=True)
    sections = (
        (
            ("graph", "where", "operations", "guards"),
            [(g.function, g.site, g.num_operations, g.num_guards) for g in found.graphs],
        ),
        (("graph break", "why"), [(b.site, b.reason.partition("\n\n")[0]) for b in found.breaks]),
        (
            ("compiled again", "where", "failed guard"),
            [(r.function, r.site, r.reason.partition("\n")[0].partition("  #")[0]) for r in found.recompiles],
        ),
    )
    for columns, rows in sections:
        if rows:
            table = _table(*columns)
            for row in rows:
                table.add_row(
                    *(
                        escape(_short_site(cell) if name in ("where", "graph break") else str(cell))
                        for name, cell in zip(columns, row, strict=True)
                    )
                )
            console.print()
            console.print(table)


# precompile, train, passes


def _precompile(options: argparse.Namespace) -> int:
    from torchspan.artifacts import parse_dynamic, parse_inputs, precompile, read_key

    inputs = [(parse_inputs(text), parse_dynamic(text)) for text in options.inputs]
    key = read_key(options.sign) if options.sign else None
    model = _load_model(options.model)
    check_folder(options.output)  # now, not after the compile
    report = Report()
    settings = {"compiler": options.compiler, "passes": options.passes, "weights": options.weights, "report": report}
    artifact = precompile(model, inputs[0][0], dynamic=inputs[0][1], **settings)
    for more, dynamic in inputs[1:]:
        artifact.add(model, more, dynamic=dynamic)
    artifact.entries["rebuild"] = _rebuild_command(artifact.entries["rebuild"], options)
    artifact.save(options.output, key=key)
    console = _console()
    draw_report(report, console)
    console.print(f"wrote {options.output} ({format_bytes(options.output.stat().st_size)})", highlight=False)
    return 0


def _rebuild_command(command: str, options: argparse.Namespace) -> str:
    """The command that makes an artifact again, with what only the command line knows."""
    more = (" --weights" if options.weights else "") + (f" --sign {shlex.quote(str(options.sign))}" if options.sign else "")
    command = command.replace("module:factory", shlex.quote(options.model), 1)
    return command.replace(" -o FILE", f"{more} -o {shlex.quote(str(options.output))}", 1)


def _artifact_show(options: argparse.Namespace) -> int:
    from torchspan.artifacts import describe

    found = describe(options.file)

    def draw(console: Console) -> None:
        console.print(f"[bold]{escape(found['path'])}[/], signed by {found['signed_by'] or 'nobody'}", highlight=False)
        console.print(_pairs({name: _brief(value) for name, value in found["entries"].items()}))
        table = _table("payload", "size", "SHA-256")
        for payload in found["payloads"]:
            table.add_row(payload["name"], format_bytes(payload["size"]), payload["sha256"][:16])
        console.print(table)

    _emit(options.json, found, draw)
    return 0


def _artifact_verify(options: argparse.Namespace) -> int:
    from torchspan.artifacts import read_key, verify

    found = verify(options.file, [read_key(path) for path in options.trusted_key] or None)

    def draw(console: Console) -> None:
        whole = f"{found['payloads']} payloads, {format_bytes(found['bytes'])}, are as they were written"
        console.print(f"{found['path']}: {whole}; signed by {found['signed_by'] or 'nobody'}", highlight=False, markup=False)
        if found["differs"]:
            console.print("It does not fit here:")
            console.print(_pairs(found["differs"]))
        else:
            console.print("It fits this torch and this machine.")

    _emit(options.json, found, draw)
    return int(bool(found["differs"]))


def _artifact_diff(options: argparse.Namespace) -> int:
    from torchspan.artifacts import diff

    found = diff(options.first, options.second)
    is_same = not (found["entries"] or found["payloads"])

    def draw(console: Console) -> None:
        if is_same:
            console.print("the same entries and payloads")
            return
        table = _table("differs", str(options.first), str(options.second))
        for name, (one, other) in found["entries"].items():
            table.add_row(name, _brief(one), _brief(other))
        for name, digests in found["payloads"].items():
            table.add_row(name, *("not there" if one is None else one[:16] for one in digests))
        console.print(table)

    _emit(options.json, found, draw)
    return int(not is_same)


def _brief(value: Any) -> str:
    """An entry of a manifest in at most two hundred characters."""
    text = value if isinstance(value, str) else json.dumps(value)
    return escape(text if len(text) <= 200 else f"{text[:200]} … ({len(text)} characters)")


def _load_model(spec: str) -> Any:
    module_name, colon, factory_name = spec.partition(":")
    if not colon:
        raise InputError(f"{spec!r} names no model; expected module:factory, such as mypackage.models:build")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as cause:
        if cause.name and module_name.startswith(cause.name):
            raise InputError(f"no module {module_name!r}; expected one that 'import {module_name}' finds from here") from cause
        raise
    if not hasattr(module, factory_name):
        public = [name for name in vars(module) if not name.startswith("_")]
        raise unknown_name("factory", factory_name, public, f"module {module_name!r} has: {', '.join(public[:10])}")
    factory = getattr(module, factory_name)
    if hasattr(factory, "forward") and not isinstance(factory, type):
        raise InputError(f"{spec!r} is a model; name a function that gives it, such as one with 'return {factory_name}'")
    try:
        with suppress(ValueError):  # some builtins do not say what they take
            inspect.signature(factory).bind()
    except TypeError as cause:
        raise InputError(f"{spec!r} cannot be called without arguments: {cause}") from cause
    return factory()


def _train(arguments: list[str]) -> int:
    from torchspan.train import main as train_main
    from torchspan.train._rank import telling_launcher

    report = Report()
    with telling_launcher():
        code = train_main(arguments, report)
    if (report.decisions or report.attempts) and int(os.environ.get("RANK", "0")) == 0:  # nothing of a check, nor of --help
        draw_report(report, _console(stderr=True))
    return code


def _leave(code: int) -> NoReturn:
    """End a rank whose work is done, without C++'s own end of the process.

    In that, torch 2.13.0 aborts now and then ("terminate called without an active exception"): 2 of 36 plain jobs on gloo did.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)


def _passes(options: argparse.Namespace) -> int:
    from torchspan.passes import describe_passes

    if options.replay is not None:
        return _replay(options.replay)
    rows = describe_passes()

    def draw(console: Console) -> None:
        table = _table("pass", "what it does", "numbers", "options")
        table.columns[0].no_wrap = True
        for stage, group in itertools.groupby(rows, key=lambda row: row["stage"] or "any"):
            table.add_row(f"[bold]{stage}[/]")
            for row in group:
                options = ", ".join(f"{name}={value}" for name, value in row["options"].items()) or "none"
                table.add_row(f"  {row['name']}", row["summary"], row["claim"], options)
        console.print(table)
        console.print("Passes of a pipeline stand in the order of their stages.", style="dim")

    _emit(options.json, rows, draw)
    return 0


def _replay(path: Path) -> int:
    """Run a recorded pass again: what it raises is shown as any error, else what it was recorded with is told."""
    import torch

    from torchspan.passes._replay import load_recording

    recording = load_recording(path)
    graph, console = recording.graph, _console()
    lines = [
        f"pass {recording.written} on a graph of {len(graph.module.graph.nodes)} nodes, recorded with torch {recording.torch}"
    ]
    if recording.torch != torch.__version__:
        lines.append(f"this is torch {torch.__version__}")
    console.print("\n".join(lines), markup=False, highlight=False)
    recording.replay()
    console.print(f"it does not fail here; where it was recorded: {recording.error}", markup=False, highlight=False)
    return 0


# drawing


def _console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; 110 columns where the output goes to a file."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=110)


def draw_report(report: Report, console: Console, only: Sequence[Topic] | None = None) -> None:
    """One screen: what was decided, grouped by topic (`only` these), what was tried, and what was measured."""
    decisions = [decision for decision in report.decisions if only is None or decision.topic in only]
    if not (decisions or report.attempts or report.figures):
        console.print("torchspan: nothing was changed", style="dim")
        return
    console.rule("[bold]torchspan", align="left")
    for topic in Topic:
        _draw_decisions(console, topic, [d for d in decisions if d.topic is topic])
    _draw_attempts(console, report.attempts)
    for name, value in report.figures.items():
        label, _, unit = name.rpartition("_")
        console.print(f"{label.replace('_', ' ')}: {value:.3g} {unit}", highlight=False)


def _draw_decisions(console: Console, topic: Topic, decisions: Sequence[Decision]) -> None:
    """A topic's decisions, those with the same reason under it."""
    if not decisions:
        return
    console.print(f"[bold]{topic.heading}")
    width = min(40, max(len(decision.subject) for decision in decisions))
    for reason in dict.fromkeys(decision.reason for decision in decisions):
        console.print(f"  {reason}", style="italic", highlight=False, markup=False)
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(overflow="fold", width=width)
        table.add_column(overflow="fold", min_width=9)
        table.add_column(justify="right", no_wrap=True, min_width=5)
        table.add_column(overflow="fold")
        for decision in decisions:
            if decision.reason == reason:
                times = f"{decision.count}×" if decision.count > 1 else ""
                cells = (decision.subject, f"→ {decision.choice}", times, _short_site(decision.site))
                table.add_row(*map(escape, cells))
        console.print(Padding(table, (0, 0, 0, 4)))


def _draw_attempts(console: Console, attempts: Sequence[Attempt]) -> None:
    if not attempts:
        return
    table = _table("compile attempt", "strategy", "backend", "outcome", "seconds", "peak memory", "cause")
    for attempt in attempts:
        peak = format_bytes(attempt.peak_bytes) if attempt.peak_bytes else "-"
        cause = " ".join(filter(None, (attempt.cause, attempt.where and f"at {attempt.where}")))
        table.add_row(
            attempt.region, attempt.strategy, attempt.backend, attempt.outcome, f"{attempt.seconds:.1f}", peak, cause or "-"
        )
    console.print(table)


def _short_site(site: str | None) -> str:
    if site is None:
        return ""
    path, _, line = site.rpartition(":")
    is_outside = os.path.isabs(path) and not path.startswith(os.getcwd() + os.sep)
    return f"{Path(path).name if is_outside else os.path.relpath(path)}:{line}"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        is_number = column in ("times", "seconds", "peak memory")
        table.add_column(column, overflow="fold", no_wrap=column == "backport", justify="right" if is_number else "left")
    return table


def _pairs(values: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in values.items():
        table.add_row(name.replace("_", " "), value)
    return table


def _emit(as_json: bool, values: Any, draw: Callable[[Console], None]) -> None:
    if as_json:
        print(json.dumps(values, indent=1))
    else:
        draw(_console())
