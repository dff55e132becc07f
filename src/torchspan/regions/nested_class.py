"""Makes the calls of a block nested regions while a program is traced, by torch's ``nested_compile_region``."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from torchspan.core.replaced import replaced

_tracing = threading.RLock()


def is_available() -> bool:
    """Whether this torch has ``torch.compiler.nested_compile_region``."""
    return hasattr(torch.compiler, "nested_compile_region")


@contextmanager
def nesting(classes: Sequence[type[nn.Module]]) -> Iterator[None]:
    """Make the forward of these classes a nested region in what is traced inside; eager calls work as before.

    The class is patched, not each block: with a forward of their own on each block, torch 2.13 and 2.15 use the first block's
    parameters for all blocks (measured: results differ from eager's).

    >>> forward = nn.ReLU.forward
    >>> with nesting([nn.ReLU]):
    ...     nn.ReLU.forward is forward, nn.ReLU()(torch.tensor([-1.0, 2.0]))
    (False, tensor([0., 2.]))
    >>> nn.ReLU.forward is forward
    True
    """
    if not classes:
        yield
        return
    with _tracing, ExitStack() as stack:
        for cls in classes:
            stack.enter_context(replaced(cls, "forward", _nested(cls.forward)))
        yield


@cache
def _nested(forward: Callable[..., Any]) -> Callable[..., Any]:
    region: Callable[..., Any] = torch.compiler.nested_compile_region(forward)
    return region
