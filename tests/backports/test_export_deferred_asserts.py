"""export(prefer_deferred_runtime_asserts_over_guards=True): sizes whose relation no Dim can say stay dynamic, and checked."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor
from torch.export import Dim

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # dynamo's imports, from 2.13 on

OURS = is_lacking(REGISTRY.get("export_deferred_asserts").BACKPORT)
OPTION = "prefer_deferred_runtime_asserts_over_guards"
EXAMPLE = torch.randn(4, 6), torch.randn(24)
SHAPES = {
    "matrix": {0: Dim("rows", min=2, max=64), 1: Dim("columns", min=2, max=64)},
    "vector": {0: Dim("length", min=4, max=4096)},
}


class Flattened(torch.nn.Module):
    """Adds its inputs, which must have as many elements: rows * columns == length."""

    def forward(self, matrix: Tensor, vector: Tensor) -> Tensor:
        return matrix.reshape(-1) + vector


def test_with_it_the_program_takes_all_sizes_that_fit_and_refuses_others(environment: Environment) -> None:
    program = torch.export.export(Flattened(), EXAMPLE, dynamic_shapes=SHAPES, **{OPTION: True}).module()
    for rows, columns in ((4, 6), (3, 5), (8, 2)):
        matrix, vector = torch.randn(rows, columns), torch.randn(rows * columns)
        torch.testing.assert_close(program(matrix, vector), matrix.reshape(-1) + vector)
    with pytest.raises((RuntimeError, AssertionError)):
        program(torch.randn(3, 5), torch.randn(14))


def test_it_is_an_argument_by_name_and_false_by_default(environment: Environment) -> None:
    for export in (torch.export.export, torch.export.draft_export):
        parameter = inspect.signature(export).parameters[OPTION]
        assert (parameter.kind, parameter.default) == (inspect.Parameter.KEYWORD_ONLY, False)


@pytest.mark.skipif(not OURS, reason="torch's own reports nothing")
def test_the_tracer_is_given_it_in_that_export_only_and_the_report_says_so(environment: Environment) -> None:
    def uses() -> int:
        return sum(decision.count for decision in environment.report.decisions if OPTION in decision.subject)

    torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    torch.export.export(torch.nn.ReLU(), (torch.ones(2),), **{OPTION: False})
    assert uses() == 0
    torch.export.export(torch.nn.ReLU(), (torch.ones(2),), **{OPTION: True})
    assert uses() == 1
    with pytest.raises(ValueError, match="Expected `mod` to be an instance"):
        torch.export.export(lambda x: x, (torch.ones(2),), **{OPTION: True})
    torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    assert uses() == 1
