"""The command line: doctor, scan, run, port, compile, explain, precompile, artifact, train, passes. A file for each."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import torchspan
from torchspan.cli import artifact, compile, doctor, explain, passes, port, precompile, run, scan
from torchspan.cli.parser import Parser
from torchspan.cli.train import leave, train
from torchspan.core.errors import TorchspanError
from torchspan.core.logs import show_logs


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code. A user's mistake is one line on standard error and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        show_logs(os.environ.get("TORCHSPAN_LOG", ""))
        if arguments[:1] == ["train"]:
            code = train(arguments[1:])
            if argv is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
                leave(code)
            return code
        return _run_command(arguments)
    except TorchspanError as error:
        print(f"torchspan: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing more can be said
        return 141


def _run_command(arguments: list[str]) -> int:
    end = arguments.index("--") if "port" in arguments[:2] and "--" in arguments else len(arguments)
    options = _parser().parse_args(arguments[:end])
    options.arguments = arguments[end + 1 :]  # argparse takes "--" away before the command's own parser could see it
    if options.verbose and options.command_name != "run":
        show_logs(os.environ.get("TORCHSPAN_LOG") or "info")
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> Parser:
    parser = Parser(prog="torchspan", description="One PyTorch program, on any PyTorch, any device, any scale.")
    parser.add_argument("--version", action="version", version=f"torchspan {torchspan.__version__}")
    parser.add_argument("-v", "--verbose", action="store_true", help="log what is decided (run: a table at the end)")
    commands = parser.add_subparsers(dest="command_name", metavar="command", required=True, parser_class=Parser)
    for command in (doctor, scan, run, port, compile, explain, precompile, artifact):
        command.add(commands)
    commands.add_parser("train", help="train a model as a graph: 'torchspan train --help'", add_help=False)
    passes.add(commands)
    return parser
