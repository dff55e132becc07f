"""Code of a graph that takes one list empties it, and a graph is printed whatever is asked for."""

from __future__ import annotations

import pytest
import torch
from torch import fx

pytestmark = pytest.mark.usefixtures("environment")


def module() -> fx.GraphModule:
    def add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    return fx.symbolic_trace(add)


def test_the_code_takes_one_list_and_empties_it() -> None:
    graph = module()
    graph.graph.set_codegen(fx.graph._BoxedCodeGen())
    graph.recompile()
    inputs = [torch.ones(2), torch.ones(2)]
    assert torch.equal(graph.forward(inputs), torch.full((2,), 2.0))
    assert inputs == []


def test_a_graph_is_printed_whatever_is_asked_for() -> None:
    text = module().print_readable(print_output=False, expanded_def=True, additional_meta=["seq_nr"])
    assert "x + y" in text or "add" in text
