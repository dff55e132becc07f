"""What a Decision is about, and how what was given stands to what was asked for."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from torchspan.core.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self


class _Named(str, Enum):
    """A word of a Report: as text it is itself, and `of` finds it by its text."""

    __str__ = str.__str__

    @classmethod
    def of(cls, name: str) -> Self:
        """The member of this name; raises InputError for a name that is none."""
        member = cls._value2member_map_.get(name)
        if not isinstance(member, cls):
            raise InputError(f"{cls.__name__.lower()} is {name!r}; expected one of {', '.join(cls)}")
        return member


class Topic(_Named):
    """The part of torchspan that decided: its `heading` in a report, and the `folder` whose logger it writes to.

    >>> Topic.of("device").heading, Topic.of("pass").folder
    ('redirected', 'passes')
    """

    heading: str
    folder: str

    def __new__(cls, value: str, heading: str, folder: str) -> Topic:
        """`value` is the topic as text, in JSON."""
        topic = str.__new__(cls, value)
        topic._value_, topic.heading, topic.folder = value, heading, folder
        return topic

    # in the order of a report
    BACKPORT = "backport", "backported", "backports"
    DEVICE = "device", "redirected", "devices"
    COMPILE = "compile", "compiled", "strategies"
    PRECOMPILE = "precompile", "precompiled", "artifacts"
    PARALLEL = "parallel", "placed", "parallel"
    CAPTURE = "capture", "captured", "capture"
    PASS = "pass", "transformed", "passes"
    TRAIN = "train", "trained", "train"
    ATTENTION = "attention", "attention", "train"
    ARTIFACT = "artifact", "kept for the next start", "train"
    DEPRECATED = "deprecated", "deprecated", "backports"
    UNSUPPORTED = "unsupported", "not supported", "backports"


class Standing(_Named):
    """How what was given stands to what was asked for; a `badge` names it on a page, in a colour of page.css."""

    badge: str

    def __new__(cls, value: str, badge: str) -> Standing:
        """`value` is the standing as text, in JSON and on the page."""
        standing = str.__new__(cls, value)
        standing._value_, standing.badge = value, badge
        return standing

    REDIRECTED = "redirected", ""
    SIMULATED = "simulated", "simulated"
    LEFT_OUT = "left out", "left"
    UNSUPPORTED = "unsupported", "unsupported"
