"""The older calls to compile ahead of time say what to write instead, and do what they did."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.backports._base import get_backport, status
from torchspan.environment.scope import Environment

HAS_IT = hasattr(torch.compiler, "load_compiled_function")


def square(x: torch.Tensor) -> torch.Tensor:
    return x @ x


@pytest.fixture(autouse=True)
def asked_for() -> Iterator[None]:
    """torch 2.9 and 2.10 have `aot_compile` where this option asks for it."""
    import torch._dynamo

    options = {"enable_aot_compile": True} if hasattr(torch._dynamo.config, "enable_aot_compile") else {}
    with torch._dynamo.config.patch(**options) if options else nullcontext():
        yield


def save(path: Path) -> None:
    torch.compile(square, fullgraph=True).aot_compile(((torch.ones(3, 3),), {})).save_compiled_function(str(path))


def load(path: Path) -> Any:
    with path.open("rb") as file:
        return torch.compiler.load_compiled_function(file)


@pytest.mark.skipif(not HAS_IT, reason="this torch has no aot_compile")
def test_each_line_says_once_what_to_write_and_does_what_it_did(environment: Environment, tmp_path: Path) -> None:
    path = tmp_path / "square.pt"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        save(path)
        loaded = [load(path), load(path)]
    for function in loaded:
        torch.testing.assert_close(function(torch.ones(3, 3)), square(torch.ones(3, 3)))
    results = [warning for warning in caught if "older way" in str(warning.message)]
    here = [(warning.category, warning.filename, warning.lineno) for warning in results]
    lines = Path(__file__).read_text().splitlines()
    saving, loading = (
        next(i for i, line in enumerate(lines, 1) if text in line) for text in (".aot_compile(", "compiled_function(file")
    )
    assert here == [(DeprecationWarning, __file__, line) for line in (saving, saving, loading)]
    says = [str(warning.message) for warning in results]
    assert says[0].startswith(
        "aot_compile is the older way to compile ahead of time; write torchspan.precompile(model, args).save"
    )
    assert says[1].startswith("save_compiled_function is the older way")
    assert says[2].startswith(
        "load_compiled_function is the older way to compile ahead of time; write torchspan.load(path, model)"
    )
    decided = [decision for decision in environment.report.decisions if decision.topic == "deprecated"]
    assert [(decision.subject, decision.count) for decision in decided] == [
        ("aot_compile", 1),
        ("save_compiled_function", 1),
        ("load_compiled_function", 2),
    ]
    assert decided[-1].site == f"{__file__}:{loading}"


@pytest.mark.skipif(HAS_IT, reason="this torch has aot_compile")
def test_a_torch_without_them_has_nothing_to_say(environment: Environment) -> None:
    assert status(get_backport("aot_compile_moved")) == (
        "not possible here",
        "this torch has no aot_compile, which came with 2.9",
    )
    assert not hasattr(torch.compiler, "load_compiled_function")
