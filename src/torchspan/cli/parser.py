"""A parser of arguments whose errors are one line, and the arguments that several commands take."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from torchspan.core.errors import unknown_name


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line that says what was meant."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}; '{self.prog} --help' shows what can be given", file=sys.stderr)
        sys.exit(2)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            kind = action.option_strings[0] if action.option_strings else action.dest.removesuffix("_name")
            raise unknown_name(kind, str(value), action.choices, f"'{self.prog} --help' lists what there is")


def add_program(command: argparse.ArgumentParser) -> None:
    """The program that a command runs, with its arguments: the last ones of a command line."""
    command.add_argument("-m", dest="module", action="store_true", help="what follows is the name of a module")
    command.add_argument("program", nargs=argparse.REMAINDER, metavar="program", help="the program and its arguments")


def add_budget(command: argparse.ArgumentParser) -> None:
    """What one compile may spend."""
    command.add_argument("--budget-seconds", help="seconds that one compile may take")
    command.add_argument("--budget-memory", help="memory that one compile may take, such as 4GiB")


def add_json(command: argparse.ArgumentParser) -> None:
    """JSON instead of a drawing."""
    command.add_argument("--json", action="store_true", help="print JSON")
