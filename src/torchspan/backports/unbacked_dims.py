"""``DimDynamic.UNBACKED``, ``StatelessSymbolicContext(shape_ids=, unbacked_bounds=)`` and ``optimization_hint``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport, Change
from torchspan.core.errors import UnsupportedError
from torchspan.private import inductor


def optimization_hint(a: Any, fallback: int | None = None) -> int:
    """A number for a symbolic size, for decisions that change no result: its hint, or `fallback` where it has none."""
    if not isinstance(a, torch.SymInt):
        assert type(a) is int, f"Expected int, got {type(a)}"
        return a
    hint = a.node.shape_env.size_hint(a.node.expr, allow_none=True)
    if hint is not None:
        return int(hint)
    return int(inductor.config.unbacked_symint_fallback) if fallback is None else fallback


def _with_shape_ids(init: Callable[..., None]) -> Callable[..., None]:
    """StatelessSymbolicContext's constructor, which refuses what it cannot keep."""

    @functools.wraps(init)
    def construct(self: Any, *args: Any, shape_ids: Any = None, unbacked_bounds: Any = None, **options: Any) -> None:
        for name, value in (("shape_ids", shape_ids), ("unbacked_bounds", unbacked_bounds)):
            if value:
                raise UnsupportedError(
                    f"StatelessSymbolicContext({name}={value!r}): this torch's symbols have no such thing; torch has it since "
                    f"{'2.11.0' if name == 'shape_ids' else '2.12.0'}; leave it None"
                )
        init(self, *args, **options)

    return construct


def _unbacked(old: Any) -> object:
    import torch.fx.experimental.symbolic_shapes as module

    dynamic: Any = module.DimDynamic
    return old or dynamic.SIZE_LIKE_UNBACKED  # what it was called before


def _lacks(module: ModuleType | None) -> bool:
    # its older name, and no member of its own by the newer one
    return module is not None and "SIZE_LIKE_UNBACKED" in module.DimDynamic.__members__


BACKPORT = Backport(
    name="unbacked_dims",
    summary="unbacked dimensions by their newer names: DimDynamic.UNBACKED, optimization_hint",
    target="torch.fx.experimental.symbolic_shapes",
    since="2.11.0",
    came={"2.12.0": ("optimization_hint",)},
    upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/fx/experimental/symbolic_shapes.py",
    differs="shape_ids and unbacked_bounds of a context are refused",
    names={"optimization_hint": lambda: optimization_hint},
    replaces={"StatelessSymbolicContext.__init__": _with_shape_ids},
    also=(Change("torch.fx.experimental.symbolic_shapes", "DimDynamic.UNBACKED", _unbacked, create=True),),
    lacks=_lacks,
)
