"""What this process knows of its compiler: what compile processes found out, and whether inductor is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchspan.core.replaced import replaced
from torchspan.private import inductor

_isas: dict[str, bool] = {}  # what was found of this machine's vector instructions, by any compile process


def prepare_to_load(isas: Mapping[str, bool]) -> None:
    """Ready this process for loading what a compile process made: what that found out, and the imports."""
    _isas.update(isas)
    with _gentle_imports():
        inductor.import_compiler()


def known_isas_here() -> dict[str, bool]:
    """What compile processes found of this machine's vector instructions."""
    return _isas


@contextmanager
def _gentle_imports() -> Iterator[None]:
    """Hand the GIL over more often while this thread imports: every operation of a step waits for it once."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, 0.0005))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def known_isas(known: dict[str, bool]) -> Iterator[None]:
    """Answer which vector instructions work here from `known`, and note there what had to be tried.

    Trying takes a C++ compile and a process that imports torch: once a machine is enough, not once a process.
    """
    vec_isa = inductor.VecISA
    try_out = vec_isa.check_build

    def check_build(self: Any, code: str) -> bool:
        name = f"{type(self).__name__}: {self}"
        if name not in known:
            known[name] = try_out(self, code)
        return known[name]

    with replaced(vec_isa, "check_build", check_build):
        yield
