"""Device rules in force, as on a machine that has nothing but a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment


@pytest.fixture
def redirected() -> Iterator[Report]:
    """The report of an environment with the rules in force."""
    report = Report()
    with Environment(device_patches(Facts(), "auto", report), report):
        yield report
