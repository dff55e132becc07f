"""What this process knows about its compiler: which vector instructions work, and whether inductor is imported."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torchspan.core.replaced import replaced
from torchspan.private import inductor

_isas: dict[str, bool] = {}  # which of this machine's vector instructions work, as compile processes have tried out


def prepare_to_load(isas: Mapping[str, bool]) -> None:
    """Prepare this process to load what a compile process made: take over `isas`, and import inductor."""
    _isas.update(isas)
    with _gentle_imports():
        inductor.import_compiler()


def known_isas_here() -> dict[str, bool]:
    """Which of this machine's vector instructions work, as far as compile processes have tried them out."""
    return _isas


@contextmanager
def _gentle_imports() -> Iterator[None]:
    """Hand the GIL over more often while this thread imports: each operation of a step in another thread waits for it."""
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
