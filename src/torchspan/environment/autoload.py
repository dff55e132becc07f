"""The entry point that torch itself calls at the end of ``import torch`` (its group ``torch.backends``)."""

from __future__ import annotations

import importlib
import os
import sys

from torchspan.core.errors import InputError


def autoload() -> None:
    """Activate torchspan if ``TORCHSPAN`` is set to something other than 0; else do nothing.

    The verb is looked up by name, as a plug-in is: what composes the environment stands above this folder. A variable that
    cannot be used ends the process with one line and exit code 2: torch would bury it in an error of its own.
    """
    if os.environ.get("TORCHSPAN", "0") in ("", "0"):
        return
    try:
        importlib.import_module("torchspan.api").autoload()
    except InputError as error:
        sys.stderr.write(f"torchspan: {error}\n")
        sys.exit(error.exit_code)
