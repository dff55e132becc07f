"""Shared by the tests of the report."""

from __future__ import annotations

import socket

import pytest


@pytest.fixture
def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
