"""Where an error that ends a program, a thread or a child process is shown, what it missed of torch is told below it."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from torchspan.environment.patch import Patch, Replacement

OWNER = "advice"


def advice_patches() -> list[Patch]:
    """The hooks of Python and of its child processes, with the line of `torchspan.scan.advice` under the traceback."""
    return [
        Replacement(OWNER, "sys", "excepthook", _after_traceback),
        Replacement(OWNER, "threading", "excepthook", _after_thread),
        Replacement(OWNER, "multiprocessing.process", "BaseProcess._bootstrap", _of_process),
        Replacement(OWNER, "torch.multiprocessing.spawn", "_wrap", _of_spawned),
    ]


def show_advice(error: BaseException | None) -> None:
    """Write to standard error what `error` missed of torch; nothing where it missed nothing, or where that was told already."""
    line = _advice(error)
    if line is not None and line not in getattr(error, "__notes__", ()):
        sys.stderr.write(f"{line}\n")


def _advice(error: BaseException | None) -> str | None:
    from torchspan.scan._missed import advice  # it is needed where something went wrong

    return None if error is None else advice(error)


def _after_traceback(old: Callable[..., object]) -> Callable[..., None]:
    @functools.wraps(old)
    def excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        old(kind, error, trace)
        show_advice(error)

    return excepthook


def _after_thread(old: Callable[..., object]) -> Callable[..., None]:
    def excepthook(args: Any) -> None:
        old(args)
        show_advice(args.exc_value)

    return excepthook


def _of_process(old: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(old)
    def bootstrap(self: Any, *args: Any, **kwargs: Any) -> Any:
        vars(self)["run"] = _noting(self.run)
        return old(self, *args, **kwargs)

    return bootstrap


def _of_spawned(old: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(old)
    def wrap(function: Callable[..., Any], *args: Any) -> Any:
        return old(_noting(function), *args)

    return wrap


def _noting(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose error has the advice as a note: whoever shows the error, in whichever process, shows it too."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except Exception as error:
            line = _advice(error)
            if line is not None and hasattr(error, "add_note"):  # Python 3.11
                error.add_note(line)
            elif line is not None:
                sys.stderr.write(f"{line}\n")
            raise

    return run
