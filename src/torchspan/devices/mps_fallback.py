"""Operators that MPS has no kernel for: whether they run on the CPU, said once. CUDA has a kernel for nearly all of them."""

from __future__ import annotations

import os
from collections.abc import Iterable

from torchspan.core.topics import Standing, Topic
from torchspan.devices._redirect import Redirection
from torchspan.environment.mps import VARIABLE
from torchspan.environment.patch import Patch


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Patch nothing; where the accelerator is MPS, report whether its fallback to the CPU is on."""
    if redirection.target == "mps":
        value = os.environ.get(VARIABLE)
        if value is None:
            why = f"torch was imported before torchspan could set it; run with {VARIABLE}=1 or with 'torchspan run'"
            redirection.report.decide(Topic.DEVICE, VARIABLE, "not set", why, None, Standing.LEFT_OUT)
        else:
            why = "operators that MPS has no kernel for run on the CPU" if value == "1" else "the program's own setting"
            redirection.report.decide(Topic.DEVICE, VARIABLE, value, why, None, Standing.REDIRECTED)
    return ()
