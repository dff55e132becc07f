"""Which capture a training step gets."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from torchspan.core.errors import unknown_name
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report, current_report

CAPTURES = ("auto", "train_step", "joint")


def choose_capture(capture: str, has_joint: bool) -> tuple[str, str]:
    """The capture that the name `capture` stands for, and why.

    >>> choose_capture("auto", has_joint=False)
    ('train_step', 'this torch exports no joint graph (2.10 and later do)')
    >>> choose_capture("train_step", has_joint=True)
    ('train_step', 'asked for')
    """
    if capture not in CAPTURES:
        raise unknown_name("capture", capture, CAPTURES, f"there are: {', '.join(CAPTURES)}")
    if capture != "auto":
        return capture, "asked for"
    if has_joint:
        return "joint", "this torch exports joint graphs: functional, and split for activation memory later"
    return "train_step", "this torch exports no joint graph (2.10 and later do)"


def capture_training(
    program: Program, name: str = "auto", report: Report | None = None, optimizer: Optimizer | None = None
) -> Graph:
    """The training step of `program` as one Graph, captured as `name` says; the choice is a Decision in `report`.

    With `optimizer` its step is in the Graph.
    """
    from torchspan.capture.joint import capture_joint, is_supported
    from torchspan.capture.train_step import capture_train_step

    report = report or Report(parent=current_report())
    choice, reason = choose_capture(name, is_supported())
    report.decide("capture", f"{program.name} on torch {torch.__version__}", choice, reason)
    capture = capture_joint if choice == "joint" else capture_train_step
    return capture(program, optimizer=optimizer)
