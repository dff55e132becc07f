"""``torchspan train``, which reads its own arguments: see :mod:`torchspan.train`."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn

from torchspan.cli.drawing import draw_report, new_console
from torchspan.core.report import Report


def train(arguments: list[str]) -> int:
    """Train as the arguments say; its exit code."""
    from torchspan.train import main as train_main
    from torchspan.train._rank import telling_launcher

    report = Report()
    with telling_launcher():
        code = train_main(arguments, report)
    if (report.decisions or report.attempts) and int(os.environ.get("RANK", "0")) == 0:  # nothing of a check, nor of --help
        draw_report(report, new_console(stderr=True))
    return code


def leave(code: int) -> NoReturn:
    """End a rank whose work is done, without C++'s own end of the process.

    In that, torch 2.13.0 aborts now and then ("terminate called without an active exception"): 2 of 36 plain jobs on gloo did.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
