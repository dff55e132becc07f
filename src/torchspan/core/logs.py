"""Logs: what torchspan does, on the ``torchspan`` logger, as from the line of the program that made it do so.

Each folder of torchspan has a child logger of its own (``torchspan.devices``, ``torchspan.backports``, …). Nothing is shown
unless the program's own logging, or the variable ``TORCHSPAN_LOG``, asks for it.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from torchspan.core.errors import unknown_name
from torchspan.core.topics import Topic

_LEVELS = ("debug", "info", "warning", "error")
_FORMAT = "%(levelname).1s %(name)s%(where)s] %(message)s"


def logger_of(topic: str) -> logging.Logger:
    """The logger of the folder that decides about a `topic`.

    >>> logger_of("device").name
    'torchspan.devices'
    """
    return logging.getLogger(f"torchspan.{Topic.of(topic).folder}")


def is_logged_each(topic: str) -> bool:
    """Whether each occurrence of a Decision is to be logged, not only its first."""
    return logger_of(topic).isEnabledFor(logging.DEBUG)


def log_at(level: str, topic: str, site: str | None, function: str | None, message: str, *arguments: object) -> None:
    """Log `message` as from the program's line `site` (``file:line``) in its `function`."""
    logger = logger_of(topic)
    number = logging.getLevelName(level)
    if not logger.isEnabledFor(number):
        return
    file, _, line = (site or "").rpartition(":")
    logger.handle(logger.makeRecord(logger.name, number, file, int(line or 0), message, arguments, None, function))


def parse_log_spec(text: str) -> dict[str, str]:
    """Level by logger from text such as ``info,devices=debug``; a level alone is everybody's.

    >>> parse_log_spec("info,devices=debug")
    {'torchspan': 'INFO', 'torchspan.devices': 'DEBUG'}
    >>> parse_log_spec("device=debug")
    Traceback (most recent call last):
    torchspan.core.errors.UnknownNameError: no folder 'device'; did you mean 'devices'? TORCHSPAN_LOG is such as ...
    """
    levels = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        folder, _, level = part.rpartition("=")
        for kind, name, known in (("level", level.lower(), _LEVELS), ("folder", folder, _folders())):
            if name not in known:
                listing = f"TORCHSPAN_LOG is such as 'info,devices=debug'; there are: {', '.join(filter(None, known))}"
                raise unknown_name(kind, name, known, listing)
        levels[f"torchspan.{folder}".rstrip(".")] = level.upper()
    return levels


def _folders() -> tuple[str, ...]:
    """The folders that have a logger of their own, and "", which is all of them."""
    root = Path(__file__).resolve().parents[1]
    return ("", *sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("_")))


class _Formatter(logging.Formatter):
    """A line a record: ``I torchspan.devices train.py:12 main] message``."""

    def format(self, record: logging.LogRecord) -> str:
        path = os.path.relpath(record.pathname) if record.pathname else ""
        place = f" {path}:{record.lineno} {record.funcName or ''}".rstrip() if path else ""
        record.where = place
        return super().format(record)


def show_logs(spec: str) -> None:
    """Write what `spec` asks for (see `parse_log_spec`) to standard error; the program's own logging is left alone."""
    levels = parse_log_spec(spec)
    if not levels:
        return
    root = logging.getLogger("torchspan")
    if not any(isinstance(handler.formatter, _Formatter) for handler in root.handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Formatter(_FORMAT))
        root.addHandler(handler)
        root.propagate = False  # the program's handlers would show each line again
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
