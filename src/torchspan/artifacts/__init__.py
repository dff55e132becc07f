"""System 4: a program compiled ahead of time, on disk: made once, loaded in a fresh process without tracing or compiling."""

from torchspan.artifacts._inputs import parse_dynamic, parse_inputs
from torchspan.artifacts._inspect import describe, diff, verify
from torchspan.artifacts._sign import read_key
from torchspan.artifacts.load import load
from torchspan.artifacts.precompile import Artifact, Precompile, precompile

__all__ = [
    "Artifact",
    "Precompile",
    "describe",
    "diff",
    "load",
    "parse_dynamic",
    "parse_inputs",
    "precompile",
    "read_key",
    "verify",
]
