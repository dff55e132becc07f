"""``torchspan explain``: run a program and say where its graphs break, why, and what is compiled again."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.markup import escape

from torchspan.cli.drawing import new_table, short_site, show
from torchspan.cli.parser import add_program
from torchspan.cli.run import Afterwards, run_program
from torchspan.core.activation import Activation


def add(commands: Any) -> None:
    """Declare the command."""
    explain = commands.add_parser(
        "explain",
        help="run a program and say where its graphs break, why, and what is compiled again",
        usage="torchspan explain [options] (script.py | -m module) ...",
    )
    explain.add_argument("--json", action="store_true", help="print JSON, after what the program prints")
    explain.add_argument("--seconds", type=float, help="a compile that takes longer ends the program (default: 300)")
    explain.add_argument("--device", default="auto", help="as for 'torchspan run' (default: auto)")
    add_program(explain)
    explain.set_defaults(command=_explain)


def _explain(options: argparse.Namespace) -> int:
    from torchspan.diagnosis.explain import explaining
    from torchspan.jobs.budget import DEFAULT_BUDGET, Budget

    with explaining(DEFAULT_BUDGET if options.seconds is None else Budget(options.seconds)) as explanation:
        activation = Activation(options.device, compile="off")
        code = run_program(options.program, options.module, activation, Afterwards(quiet=True))
    show(options.json, explanation.to_dict(), lambda console: _draw_explanation(explanation, console))
    return code


def _draw_explanation(explanation: Any, console: Console) -> None:
    console.rule("[bold]torchspan explain", align="left")
    counts = (
        f"{len(explanation.graphs)} graphs, {len(explanation.breaks)} graph breaks, {len(explanation.recompiles)} recompiles"
    )
    console.print(f"{explanation.num_calls} calls of torch.compile: {counts}", highlight=False)
    for hang in explanation.hung:
        text = f"a compile hung: not done after {hang.seconds:g} s, at {hang.site or hang.where}"
        console.print(text, style="red", markup=False, soft_wrap=True)
    sections = (
        (
            ("graph", "where", "operations", "guards"),
            [(g.function, g.site, g.num_operations, g.num_guards) for g in explanation.graphs],
        ),
        (("graph break", "why"), [(b.site, b.reason.partition("\n\n")[0]) for b in explanation.breaks]),
        (
            ("compiled again", "where", "failed guard"),
            [(r.function, r.site, r.reason.partition("\n")[0].partition("  #")[0]) for r in explanation.recompiles],
        ),
    )
    for columns, rows in sections:
        if rows:
            table = new_table(*columns)
            for row in rows:
                table.add_row(
                    *(
                        escape(short_site(cell) if name in ("where", "graph break") else str(cell))
                        for name, cell in zip(columns, row, strict=True)
                    )
                )
            console.print()
            console.print(table)
