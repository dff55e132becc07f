"""Triton's kernels where there is a CPU alone: Triton's own interpreter runs them, slowly.

It has to be on before Triton defines its library, so it is turned on when ``triton.knobs`` is imported, which comes first.
A program that sets TRITON_INTERPRET itself is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Replacement


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The switch, and the call of an interpreted kernel, which is on the report."""
    if redirection.target != "cpu" or redirection.mode == "strict" or "TRITON_INTERPRET" in os.environ:
        return
    yield Replacement("interpreter", "triton.knobs", "runtime.interpret", lambda old: True)
    yield Replacement("interpreter", "triton.runtime.interpreter", "GridExecutor.__call__", partial(_run, redirection))


def _run(redirection: Redirection, old: Function) -> Function:
    @wraps(old)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = getattr(self.fn, "__name__", "a kernel")
        redirection.simulate(f"the Triton kernel {name}", "run by Triton's interpreter, on the CPU, slowly")
        return old(self, *args, **kwargs)

    return run
