"""The error tree.

::

    TorchspanError                 everything that torchspan raises on purpose
    ├── InputError                 what was given cannot be used (exit code 2)
    │   └── UnknownNameError       a name that nothing answers to; says what was meant (also a KeyError)
    ├── UnsupportedError           this torch, this device or this platform cannot do it (also a NotImplementedError)
    │   └── UnknownSettingError    a setting that this torch does not know was set (also an AttributeError)
    ├── CaptureError               a program could not be captured as one graph
    ├── GuardError                 a captured graph was called with what it was not captured for
    ├── GraphError                 a graph is not valid
    │   └── PassError              a pass gave back a graph that is not valid
    ├── CompileError               a backend did not give a callable
    └── ArtifactError              an artifact cannot be used
        ├── ManifestMismatchError  it was made for something else; names the entries that differ
        └── IntegrityError         its bytes are not those that were written
            └── UntrustedError     no key that is trusted here signed it

A message says what happened with values, what was expected, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TorchspanError(Exception):
    """Base of every error that torchspan raises on purpose; ``exit_code`` is what the command line ends with."""

    exit_code = 1


class InputError(TorchspanError):
    """What was given cannot be used.

    >>> raise InputError("budget is 0 seconds; expected more than 0, such as 120")
    Traceback (most recent call last):
    torchspan.core.errors.InputError: budget is 0 seconds; expected more than 0, such as 120
    """

    exit_code = 2


class UnknownNameError(InputError, KeyError):
    """A name that nothing answers to.

    >>> str(unknown_name("pass", "bucket_fsdpp", ["bucket_fsdp"], "'torchspan passes' lists them"))
    "no pass 'bucket_fsdpp'; did you mean 'bucket_fsdp'? 'torchspan passes' lists them"
    """

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would show its repr


class UnsupportedError(TorchspanError, NotImplementedError):
    """This torch, this device or this platform cannot do it; the message names what can."""


class UnknownSettingError(UnsupportedError, AttributeError):
    """A setting was set that this torch does not know; the message names the releases that do."""


class CaptureError(TorchspanError):
    """A program could not be captured as one graph; the message names the user's file and line."""


class GuardError(TorchspanError):
    """A captured graph was called with something it was not captured for; the message names the guard."""


class GraphError(TorchspanError):
    """A graph is not valid."""


class PassError(GraphError):
    """A pass failed or gave back a graph that is not valid; the message names the pass."""


class CompileError(TorchspanError):
    """A backend did not give a callable."""


class ArtifactError(TorchspanError):
    """An artifact cannot be used."""


class ManifestMismatchError(ArtifactError):
    """An artifact was made for another torch, machine or model; the message names the entries that differ."""


class IntegrityError(ArtifactError):
    """An artifact's bytes are not those that were written."""


class UntrustedError(IntegrityError):
    """An artifact was not signed by a key that is trusted here, or was changed afterwards."""


def unknown_name(kind: str, name: str, known: Iterable[str], listing: str) -> UnknownNameError:
    """The error for a `name` that no `kind` answers to: the nearest `known` one, and where they are listed."""
    close = difflib.get_close_matches(name, list(known), n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    return UnknownNameError(f"no {kind} {name!r}; {hint}{listing}")
