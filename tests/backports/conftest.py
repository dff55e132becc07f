"""Every test here runs against torch's own where it has it, and against the backport where it does not."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from torchspan.backports._base import all_backports
from torchspan.environment.scope import Environment


@pytest.fixture
def environment() -> Iterator[Environment]:
    """All backports in force; on a torch that has everything they change nothing."""
    with Environment([patch for backport in all_backports() for patch in backport.patches()]) as environment:
        yield environment
    if "torch._dynamo" in sys.modules:
        sys.modules["torch._dynamo"].reset()
