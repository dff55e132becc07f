"""Graph → Graph; one pass per file, valid in, valid out."""

from __future__ import annotations

from typing import Any


def describe_passes() -> list[dict[str, Any]]:
    """Every pass by name: ``name``, ``summary``, and ``options``, which are names with their defaults."""
    from torchspan.passes import _pipeline  # imports torch.fx: only on use

    return _pipeline.describe_passes()
