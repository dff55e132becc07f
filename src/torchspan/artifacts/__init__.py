"""System 4: a program compiled ahead of time, on disk: made once, loaded in a fresh process without tracing or compiling."""

from torchspan.artifacts._inputs import parse_inputs
from torchspan.artifacts._store import describe
from torchspan.artifacts.load import load
from torchspan.artifacts.precompile import Artifact, Precompile, precompile

__all__ = ["Artifact", "Precompile", "describe", "load", "parse_inputs", "precompile"]
