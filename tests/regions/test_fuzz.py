"""Random programs give by torchspan.compile what they give eagerly, in each step; `tools/fuzz_compile.py` runs more of them."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[2] / "tools"
NUM_PROGRAMS = 30


@pytest.fixture(scope="module")
def fuzz() -> Any:
    """The fuzzer, a script that stands beside its generator."""
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module("fuzz_compile")
    finally:
        sys.path.remove(str(TOOLS))


@pytest.mark.filterwarnings("ignore")
def test_random_programs_give_what_eager_gives_in_each_step(fuzz: Any, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = [
        program for program in map(fuzz.program, range(2 * NUM_PROGRAMS)) if program.backend != "inductor"
    ]  # whose kernels take seconds
    verdicts = [fuzz.judged(program) for program in drawn[:NUM_PROGRAMS]]
    assert [verdict.seed for verdict in verdicts if verdict.difference] == [], capsys.readouterr().out
    assert sum(verdict.num_swapped > 0 for verdict in verdicts) > NUM_PROGRAMS / 2
    assert sum(verdict.num_compiled_steps for verdict in verdicts) > NUM_PROGRAMS


def test_the_fuzzer_sees_a_wrong_number_a_missing_hook_and_another_error(fuzz: Any) -> None:
    text = "import torch\nmodel, events = None, []\n"

    def gap(*steps: str) -> str:
        worlds = [fuzz.World(fuzz.Program(0, text, [step], "eager", {}, set()), None) for step in steps]
        results = [world.step(0) for world in worlds]
        return str(fuzz.Comparison(is_ordered=True).of(*results))

    assert gap("out = torch.ones(2)", "out = torch.ones(2)") == ""
    assert gap("out = torch.ones(2)", "out = torch.ones(2) + 1e-7") == ""
    assert "1 of 2 elements differ" in gap("out = torch.ones(2)", "out = torch.tensor([1.0, 1.001])")
    assert gap("events.append(1)", "events.append(1); events.append(2)") == "events: parts [0] instead of [0, 1]"
    assert gap("raise ValueError('a')", "raise ValueError('b')") == "raises 'ValueError: a' instead of 'ValueError: b'"
    assert gap("out = torch.ones(2)", "torch.rand(1); out = torch.ones(2)").startswith("random state")
    assert gap("given = [torch.ones(1)]; out = given[0]", "given = [torch.ones(1)]; out = torch.ones(1)").startswith("shared")
