"""The training loop, its data and its configurations."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchspan.core.report import Report


def main(argv: Sequence[str], report: Report | None = None) -> int:
    """``torchspan train``: train as `argv` says, fill `report`, and give the exit code.

    With ``--check-for``, or asked for help, it prints and trains nothing. Raises InputError for what cannot be used.
    """
    from torchspan.train.config import from_environment, parse_config, spelled_out

    config = parse_config([*from_environment(os.environ), *spelled_out(argv)])
    if config is None:
        return 0
    from torchspan.train._place import Ranks
    from torchspan.train.check import check  # imports torch, and nothing that takes as long again

    plan = check(config, config.check_for or Ranks.of(os.environ).world_size)
    if config.check_for is not None:
        sys.stdout.write(f"{plan}\n")
        return 0
    from torchspan.train import loop

    return loop.main(config, report)
