"""A private name of torch, with the releases that have it, and what stands behind it here."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True)
class PrivateName:
    """A module, or ``module:attribute``, that torch may change in any release.

    `since` is the first release that has it and `until` the last, such as ``2.9``; None: all that torchspan supports have it.
    """

    place: str
    since: str | None = None
    until: str | None = None

    @property
    def key(self) -> str:
        """What the file that lists it calls it: an attribute of the module, or the module's last part.

        A method stands for its class. What is called as its module is has no key: it is taken from the module.

        >>> [PrivateName(f"torch._guards{rest}").key for rest in ("", ":tracing", ":TracingContext.get", ":_guards")]
        ['_guards', 'tracing', 'TracingContext', '']
        """
        module, _, attribute = self.place.partition(":")
        last, first = module.rpartition(".")[2], attribute.partition(".")[0]
        return "" if attribute == last else first or last

    def is_in(self, release: str) -> bool:
        """Whether the torch `release`, such as ``2.13.0+cpu``, has it.

        >>> name = PrivateName("torch._dynamo.pgo", since="2.9", until="2.13")
        >>> [name.is_in(release) for release in ("2.8.0", "2.9.1", "2.13.0+cpu", "2.15.0")]
        [False, True, True, False]
        """
        minor = _minor(release)
        return (self.since is None or _minor(self.since) <= minor) and (self.until is None or minor <= _minor(self.until))

    def find(self) -> Any:
        """The module or the attribute, imported now; ImportError or AttributeError where this torch has none."""
        module, _, attribute = self.place.partition(":")
        holder = importlib.import_module(module)
        return attrgetter(attribute)(holder) if attribute else holder


def names_in(module: str, *attributes: str, since: str | None = None, until: str | None = None) -> tuple[PrivateName, ...]:
    """The names of these attributes of one module.

    >>> [name.place for name in names_in("torch._guards", "tracing", "TracingContext.get")]
    ['torch._guards:tracing', 'torch._guards:TracingContext.get']
    """
    return tuple(PrivateName(f"{module}:{attribute}", since, until) for attribute in attributes)


def find(names: Iterable[PrivateName], key: str) -> Any:
    """What one of `names` stands for, by its key, for the ``__getattr__`` of a file.

    Nothing is kept: while a name is replaced, the replacement is found. Raises AttributeError where none of `names` has that
    key or this torch has no such attribute, and ImportError where it has no such module.

    >>> find(names_in("torch._guards", "TracingContext.get"), "TracingContext").__name__
    'TracingContext'
    """
    private_name = next((name for name in names if name.key == key), None)
    if private_name is None:
        raise AttributeError(f"no private name of torch is listed here as {key!r}")
    module, _, attribute = private_name.place.partition(":")
    holder = importlib.import_module(module)
    return getattr(holder, key) if attribute else holder


def _minor(release: str) -> tuple[int, int]:
    major, minor = release.split(".")[:2]
    return int(major), int(minor)
