"""What torch reads once, while it is imported, of how operators run that MPS has no kernel for."""

from __future__ import annotations

import os
import sys

VARIABLE = "PYTORCH_ENABLE_MPS_FALLBACK"


def fall_back_on_mps() -> None:
    """Let operators that MPS has no kernel for run on the CPU, where this is a Mac; the program's own setting stays.

    Torch reads the variable when it is imported: after that, nothing is done here, and the report says so.
    """
    if sys.platform == "darwin" and "torch" not in sys.modules:
        os.environ.setdefault(VARIABLE, "1")
