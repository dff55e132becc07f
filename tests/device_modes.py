"""Shared by the tests of device modes: the rules of a mode in force, as on a machine that has nothing but a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

TWO = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu!"


def in_mode(mode: str = "auto", facts: Facts = Facts(), **options: bool) -> Environment:  # noqa: B008 - a frozen value
    """An environment of these rules, with its report."""
    report = Report()
    return Environment(device_patches(facts, mode, report, **options), report)


@pytest.fixture
def redirected() -> Iterator[Report]:
    """The report of an environment with the default mode's rules in force."""
    with in_mode() as environment:
        yield environment.report


@pytest.fixture(scope="class")
def redirected_throughout() -> Iterator[Report]:
    """The same for all tests of a class, which do not look at the report."""
    with in_mode() as environment:
        yield environment.report


@pytest.fixture(scope="class")
def followed_throughout() -> Iterator[Report]:
    """The same for cuda-semantics, for all tests of a class."""
    with in_mode("cuda-semantics") as environment:
        yield environment.report


@pytest.fixture
def followed() -> Iterator[Report]:
    """The same for cuda-semantics."""
    with in_mode("cuda-semantics") as environment:
        yield environment.report


def on_gpu(*shape: int) -> torch.Tensor:
    """Ones that lie on the device."""
    return torch.ones(*shape, device="cuda")
