"""How a Report describes an error."""

from __future__ import annotations

from torchspan.jobs.supervisor import Ending


def failure(cause: Exception, where: str, seconds: float = 0.0, peak_bytes: int | None = None) -> Ending:
    """The Ending of a compile that `cause` ended."""
    return Ending("failed", seconds, peak_bytes, described(cause), where)


def described(cause: Exception) -> str:
    """The error's class and text."""
    return f"{type(cause).__name__}: {text_of(cause)}"


def text_of(cause: Exception) -> str:
    """The error's text, which a user's own class may refuse to give."""
    try:
        return str(cause)
    except Exception as again:  # noqa: BLE001 - an error of a user's own class
        return f"(its text cannot be read: {type(again).__name__})"
