"""What a capture knows of dynamic sizes, and what was assumed of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchspan.artifacts.size_conditions import is_size
from torchspan.capture.dynamo import spoken
from torchspan.core.errors import UnsupportedError
from torchspan.private.dynamo import source_name


@dataclass(frozen=True)
class Shapes:
    """What a capture knows of dynamic sizes: `symbols` and where each is found; tensors whose shape has any, by source.

    Those of `firm` may not be fixed: they were marked as dynamic, not only as dimensions that may be.
    """

    symbols: Mapping[str, torch.SymInt]
    firm: frozenset[str]
    sources: Mapping[str, str]
    tensors: Mapping[str, Any]
    context: Any

    def conditions(self) -> list[str]:
        """All that was assumed of shapes, also by compilers that ran since.

        Raises:
            UnsupportedError: a dimension that was marked as dynamic was fixed.
        """
        env, tracked = self.context.fake_mode.shape_env, self.context.fake_mode.shape_env.tracked_fakes
        for name, symbol in self.symbols.items():
            if name in self.firm and env.replace(symbol.node._expr).is_number:
                raise UnsupportedError(
                    f"{spoken(self.sources[name])} was marked as dynamic, and the program or its compiler needs it to be "
                    f"{env.replace(symbol.node._expr)}; leave that dimension unmarked"
                )
        return list(env.produce_guards([entry.fake for entry in tracked], [entry.source for entry in tracked]))


def shapes_of(context: Any) -> Shapes:
    """The dynamic sizes of a capture, from its tracing context."""
    env = getattr(context.fake_mode, "shape_env", None)
    tracked = getattr(env, "tracked_fakes", None) or []
    symbols: dict[str, torch.SymInt] = {}
    tensors: dict[str, Any] = {}
    firm: set[str] = set()
    for entry in tracked:
        sizes = (
            [size for size in (*entry.fake.shape, *entry.fake.stride()) if is_size(size)]
            if isinstance(entry.fake, torch.Tensor)
            else []
        )
        if sizes:
            tensors[source_name(entry.source)] = entry.fake
            constraints = entry.symbolic_context.constraint_sizes
            firm |= {
                str(size.node._expr)
                for size, each in zip(entry.fake.shape, constraints)
                if each and not each.warn_only and is_size(size)
            }
        for size in [*sizes, *([entry.fake] if is_size(entry.fake) else [])]:
            if size.node._expr.is_symbol:
                symbols.setdefault(str(size.node._expr), size)
    known = {str(symbol): source_name(origins[0]) for symbol, origins in getattr(env, "var_to_sources", {}).items() if origins}
    sources = {name: known[name] for name in symbols if re.search(r"\.(size|stride)\(\)\[", known[name])}
    return Shapes({name: symbols[name] for name in sources}, frozenset(firm), sources, tensors, context)
