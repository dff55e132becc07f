"""A warm compile server, an own cache, and a look for what was left running."""

from compile_server import cache, nothing_left, server, stack, until  # noqa: F401
