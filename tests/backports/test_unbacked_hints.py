"""Unbacked sizes: hints change no result, and a bound that would not be checked is refused."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError
from torchspan.environment.scope import Environment

BACKPORT = REGISTRY.get("unbacked_hints").BACKPORT


def test_a_hint_changes_no_result(environment: Environment) -> None:
    x = torch.ones(6, 2)
    torch._dynamo.decorators.mark_unbacked(x, 0, hint_override=8)
    torch._dynamo.override_optimization_hint(4, 9)

    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    compiled = torch.compile(double, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), x * 2)
    assert torch.equal(compiled(torch.ones(7, 2)), torch.full((7, 2), 2.0))


def test_a_bound_is_kept_or_refused_with_what_to_write(environment: Environment) -> None:
    x = torch.ones(6, 2)
    for name, value, instead in (
        ("min", 2, r"size\(dim\) >= min"),
        ("max", 9, r"size\(dim\) <= max"),
        ("shape_id", "b", "y.size"),
    ):
        if not is_lacking(BACKPORT):
            torch._dynamo.decorators.mark_unbacked(x, 0, **{name: value})
            continue
        with pytest.raises(UnsupportedError, match=rf"mark_unbacked\({name}={value!r}\): .* since 2\.1.*{instead}"):
            torch._dynamo.decorators.mark_unbacked(x, 0, **{name: value})
