"""What a program for ``torch.compiler.precompile`` sees: its errors, its options, and the classes of what it is given."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchspan.core.errors import GuardError, TorchspanError

if TYPE_CHECKING:
    from typing_extensions import Self


class PrecompileError(TorchspanError, RuntimeError):
    """What ``torch.compiler.precompile`` and its artifacts raise.

    >>> from torchspan.artifacts.single_call_loading import load
    >>> load("no.py", "no.cache")
    Traceback (most recent call last):
    torch.compiler.PrecompileError: no artifact 'no.py'; torch.compiler.precompile.capture writes one
    """

    __module__ = "torch.compiler"


class CallMismatchError(PrecompileError, GuardError):
    """An artifact was called with what it was not captured for; the message names the guard."""


@dataclass(frozen=True)
class MakeFxTracer:
    """How a call is captured: once, by make_fx, which records the operators of that one run.

    `decompositions` is a table of decompositions, as ``make_fx`` takes it.
    """

    decompositions: dict[Any, Any] | None = None


class PrecompiledRunnable:
    """What `load` returns: call it as the captured function. As a context manager it does nothing, nor does ``unload``.

    ``installed`` says whether something of the process was changed: never.
    """

    installed: bool = False

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.unload()

    def unload(self) -> None:
        """Take back what was installed: nothing."""


@dataclass(frozen=True, kw_only=True)
class PrecompileSummary:
    """What a capture covered: numbers of frames and graphs, frames that it could not serve, guards that it kept and dropped.

    A capture of one call gives none, here as in torch, where it is for captures of many.
    """

    frames: int
    resume_functions: int
    guarded_codes: int
    backend_graphs: int
    bypassed: tuple[str, ...] = ()
    truncated: tuple[str, ...] = ()
    uncovered_frames: tuple[str, ...] = ()
    wont_generalize: tuple[str, ...] = ()
    dropped_guards: tuple[tuple[str, str], ...] = ()
    kept_guards: tuple[tuple[str, str], ...] = ()
    risky_dropped_guards: tuple[tuple[str, str], ...] = ()
    policy_dropped_guards: tuple[tuple[str, str], ...] = ()
    dropped_guard_code: tuple[tuple[str, str, str], ...] = ()
    capture_errors: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything that ran was captured, and something was."""
        missed = (self.bypassed, self.truncated, self.uncovered_frames, self.capture_errors)
        return not any(missed) and self.guarded_codes > 0 and self.backend_graphs > 0

    @property
    def dropped_guard_types(self) -> dict[str, int]:
        """How many guards of each kind were dropped."""
        return dict(Counter(kind for kind, _ in self.dropped_guards))

    @property
    def kept_guard_types(self) -> dict[str, int]:
        """How many guards of each kind were kept."""
        return dict(Counter(kind for kind, _ in self.kept_guards))


class Capture:
    """What `capture` returns: a context manager, called once inside its block, whose two files are written at its end."""

    def __enter__(self) -> Self:
        raise NotImplementedError

    def __exit__(self, *exc: object) -> None:
        raise NotImplementedError

    def __call__(self, *args: object, **kwargs: object) -> object:
        raise NotImplementedError

    def save(self) -> None:
        """Write the files now, without ending the capture."""
        raise NotImplementedError
