"""``torchspan doctor``: what is here, and what torchspan provides for it."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console

from torchspan.cli.drawing import new_table, pairs, show
from torchspan.cli.parser import add_json
from torchspan.core.registry import Registry
from torchspan.core.text import format_bytes


def add(commands: Any) -> None:
    """Declare the command."""
    doctor = commands.add_parser("doctor", help="what is here, and what torchspan provides for it")
    doctor.add_argument("name", nargs="?", help="explain one backport")
    add_json(doctor)
    doctor.set_defaults(command=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    from torchspan.backports._base import all_backports, get_backport, status
    from torchspan.environment.facts import gather

    if options.name is not None and (described := _described_plug_in(options.name)):
        show(options.json, described, lambda console: console.print(pairs(described)))
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
        show(options.json, facts_of, lambda console: console.print(pairs(facts_of)))
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
        console.print(pairs({name.removesuffix("_bytes"): "not found" if v is None else str(v) for name, v in here.items()}))
        console.print()
        table = new_table("backport", "here", "torch has it since", "provides")
        for backport, state, why in rows:
            since = backport.since if backport.since[:1].isdigit() else "-"
            provides = f"{backport.summary} ({why})" if state == "not possible here" else backport.summary
            table.add_row(backport.name, state, since, provides)
        console.print(table)
        for kind in _plug_ins():
            console.print()
            listed = new_table(kind.replace("_", " "), "does")
            for name, summary in values[kind].items():
                listed.add_row(name, summary)
            console.print(listed)
        console.print("\n'torchspan doctor NAME' explains one", style="dim")

    show(options.json, values, draw)
    return 0


def _plug_ins() -> dict[str, Registry]:
    """The kinds of plug-ins besides backports."""
    kinds = {"device_rules": "devices", "passes": "passes", "strategies": "strategies", "models": "models"}
    return {kind: Registry(f"torchspan.{folder}", kind.replace("_", " ").rstrip("s")) for kind, folder in kinds.items()}


def _summary(registry: Registry, name: str) -> str:
    return registry.docstring(name).partition("\n")[0]


def _described_plug_in(name: str) -> dict[str, str] | None:
    """What a plug-in of this name says of itself; None where there is none besides backports."""
    plug_in = next(((kind, registry) for kind, registry in _plug_ins().items() if name in registry.names()), None)
    if plug_in is None:
        return None
    kind, registry = plug_in
    return {"name": name, "kind": kind.replace("_", " "), "says": registry.docstring(name), "file": registry.target(name)}
