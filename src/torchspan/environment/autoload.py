"""The entry point that torch itself calls at the end of ``import torch`` (its group ``torch.backends``)."""

from __future__ import annotations

import importlib
import os


def autoload() -> None:
    """Activate torchspan if ``TORCHSPAN`` is set to something other than 0; else do nothing.

    The verb is looked up by name, as a plug-in is: what composes the environment stands above this folder.
    """
    if os.environ.get("TORCHSPAN", "0") not in ("", "0"):
        importlib.import_module("torchspan.api").autoload()
