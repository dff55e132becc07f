"""Calls back for each compile that ended: the command line needs them for its profiles and reproductions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torchspan.jobs.supervisor import Ending
from torchspan.regions.settings import Settings

COMPILE_THREAD = "torchspan-compile"
AGREEMENT_THREAD = "torchspan-agreement"  # of ranks, on the call in which all take over what was compiled


@dataclass(frozen=True)
class Finished:
    """A region's compile that ended: the pickled Task that the child was given, when it began, and how it ended."""

    region: str
    strategy: str
    settings: Settings
    payload: bytes
    began_ns: int
    ending: Ending


_watchers: list[Callable[[Finished], None]] = []


@contextmanager
def watching(on_finished: Callable[[Finished], None]) -> Iterator[None]:
    """Call `on_finished` with each compile that ends inside the block, recorded; from the thread that waited for it."""
    _watchers.append(on_finished)
    try:
        yield
    finally:
        _watchers.remove(on_finished)


def is_watched() -> bool:
    """Whether there is a watcher: then what the compiler does is recorded."""
    return bool(_watchers)


def tell(finished: Finished) -> None:
    """Tell every watcher."""
    for on_finished in tuple(_watchers):
        on_finished(finished)


def finish_compiles() -> None:
    """Wait for the compiles that are under way, each until its own budget ends it."""
    for thread in threading.enumerate():
        if thread.name == COMPILE_THREAD:
            thread.join()
