"""System 4: a program compiled ahead of time, on disk: made once, loaded in a fresh process without tracing or compiling.

Names are imported when they are first looked up: loading an artifact must not import what compiles one.
"""

from torchspan.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__)
