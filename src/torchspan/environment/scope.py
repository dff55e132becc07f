"""Environment: Patches in force, with the Report of what they were used for, and an exact way back."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from contextlib import ExitStack

from torchspan.core.report import Report, reporting
from torchspan.environment.patch import Patch, Patches

_lock = threading.RLock()
_active: list[Environment] = []


class Environment:
    """Patches that can be put in force and taken back; a context manager. Entering one that is in force changes nothing.

    `settings` are the environment variables that put the same patches in force in a child process.
    """

    def __init__(
        self, patches: Iterable[Patch], report: Report | None = None, settings: Mapping[str, str] | None = None
    ) -> None:
        self.report = report or Report()
        self.settings = dict(settings or {})
        self._patches = [Patches(patches, self.report)]
        self._scope = ExitStack()

    @property
    def is_active(self) -> bool:
        """Whether the patches are in force."""
        return self in _active

    def activate(self) -> Environment:
        """Put the patches in force."""
        with _lock:
            if not self.is_active:
                self._scope.enter_context(reporting(self.report))
                for patches in self._patches:
                    patches.apply()
                _active.append(self)
        return self

    def extend(self, patches: Iterable[Patch]) -> None:
        """Add patches, in force at once if this is."""
        with _lock:
            self._patches.append(Patches(patches, self.report))
            if self.is_active:
                self._patches[-1].apply()

    def deactivate(self) -> None:
        """Take the patches back: every object that they replaced is there again."""
        with _lock:
            if self.is_active:
                _active.remove(self)
                for patches in reversed(self._patches):
                    patches.undo()
                self._scope.close()

    def __enter__(self) -> Environment:
        return self.activate()

    def __exit__(self, *exc_info: object) -> None:
        self.deactivate()


def active_environment() -> Environment | None:
    """The Environment that was activated last and is in force, or None."""
    return _active[-1] if _active else None
