"""``torchspan port``: write a program that runs on every device, without torchspan."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from torchspan.cli.drawing import new_console
from torchspan.cli.run import check_program
from torchspan.core.errors import InputError

if TYPE_CHECKING:
    from torchspan.report import Ported, Proof


def add(commands: Any) -> None:
    """Declare the command."""
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


def _port(options: argparse.Namespace) -> int:
    from torchspan.report import port_program, prove, write_ported

    script = Path(options.script)
    check_program(options.script, is_module=False)
    if options.arguments and not options.check:
        raise InputError(f"arguments {shlex.join(options.arguments)!r} are for the program; expected '--check', which runs it")
    proof = None
    if options.check:
        ported, proof = prove(script, options.arguments, options.device)
    else:
        ported = port_program(script)
    if options.diff or options.output is None:
        print("".join(each.diff for each in ported), end="", flush=True)
    written = write_ported(ported, options.output) if options.output else []
    console = new_console(stderr=True)
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
