"""The whole program is one region: the fastest code, and a compile time that grows with the program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchspan.core.program import program_name
from torchspan.regions.part import Part
from torchspan.strategies._base import Cut, Request

SUMMARY = "the whole program as one region"


def cut(program: Callable[..., Any], request: Request) -> Cut:
    """One part: the program."""
    return Cut((Part(program_name(program), (program,)),), "one region")
