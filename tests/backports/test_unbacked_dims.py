"""Unbacked dimensions are made by their newer name, and a hint for one is what was asked for."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError
from torchspan.environment.scope import Environment

BACKPORT = REGISTRY.get("unbacked_dims").BACKPORT


def test_an_unbacked_dimension_is_made_by_its_newer_name(environment: Environment) -> None:
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import (
        DimDynamic,
        ShapeEnv,
        StatelessSymbolicContext,
        free_unbacked_symbols,
        optimization_hint,
    )

    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.UNBACKED, DimDynamic.STATIC], shape_ids=None)
    fake = mode.from_tensor(torch.ones(6, 2), symbolic_context=context)
    assert free_unbacked_symbols(fake.shape[0]) and fake.shape[1] == 2
    assert optimization_hint(fake.shape[0], fallback=5) in (5, 8192) and optimization_hint(3) == 3
    if is_lacking(BACKPORT):
        with pytest.raises(UnsupportedError, match="shape_ids"):
            StatelessSymbolicContext(dynamic_sizes=[DimDynamic.UNBACKED], shape_ids={0: "b"})
