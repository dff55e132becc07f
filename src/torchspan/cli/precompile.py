"""``torchspan precompile``: compile a model into an artifact that loads without compiling."""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import shlex
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchspan.cli.drawing import draw_report, new_console
from torchspan.core.errors import InputError, unknown_name
from torchspan.core.report import Report
from torchspan.core.text import check_folder, format_bytes


def add(commands: Any) -> None:
    """Declare the command."""
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
    console = new_console()
    draw_report(report, console)
    console.print(f"wrote {options.output} ({format_bytes(options.output.stat().st_size)})", highlight=False)
    return 0


def _rebuild_command(command: str, options: argparse.Namespace) -> str:
    """The command that makes an artifact again, with what only the command line knows."""
    more = (" --weights" if options.weights else "") + (f" --sign {shlex.quote(str(options.sign))}" if options.sign else "")
    command = command.replace("module:factory", shlex.quote(options.model), 1)
    return command.replace(" -o FILE", f"{more} -o {shlex.quote(str(options.output))}", 1)


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
