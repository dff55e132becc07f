"""The training loop, its data and its configurations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchspan.core.report import Report


def main(argv: Sequence[str], report: Report | None = None) -> int:
    """``torchspan train``: train as `argv` says, fill `report`, and give the exit code.

    Raises InputError for what cannot be used.
    """
    from torchspan.train import loop  # imports torch: only on use

    return loop.main(argv, report)
