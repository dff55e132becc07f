"""A training step that make_fx traces knows that it is traced, and its backward which forward it belongs to."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental import proxy_tensor

pytestmark = pytest.mark.usefixtures("environment")


def test_it_is_said_inside_only() -> None:
    compiler = torch.compiler
    assert not compiler._is_non_strict_tracing()
    with compiler._non_strict_tracing_context():
        assert compiler._is_non_strict_tracing()
        with compiler._non_strict_tracing_context():
            pass
        assert compiler._is_non_strict_tracing()
    assert not compiler._is_non_strict_tracing()


def test_a_step_is_traced_with_its_stack_and_its_backward() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        with torch.compiler._patch_engine_backward():
            x.sin().sum().backward()
        assert x.grad is not None
        return x.grad

    with torch.compiler._non_strict_tracing_context(), torch.fx.traceback.preserve_node_meta():
        graph = proxy_tensor.make_fx(step, record_stack_traces=True)(torch.ones(3)).graph
    (cosine,) = (node for node in graph.nodes if node.target is torch.ops.aten.cos.default)
    (sine,) = (node for node in graph.nodes if node.target is torch.ops.aten.sin.default)
    assert cosine.meta.get("seq_nr") == sine.meta.get("seq_nr") is not None


def test_a_backward_outside_is_an_error() -> None:
    x = torch.ones(2).requires_grad_()
    with torch.compiler._patch_engine_backward(), pytest.raises(AssertionError, match="must be used under"):
        x.sum().backward()
    x.sum().backward()
