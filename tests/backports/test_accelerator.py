"""What a redirected answer lets a program reach is there: ``torch.accelerator`` and ``torch.cuda`` of every torch, on a CPU."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from torchspan.scan._names import Names

PROGRAM = """
import json, sys
import torch

def ask(question):
    try:
        return question()
    except Exception as error:
        return f"{type(error).__name__}: {error}"

def captured():
    x = torch.zeros(3, device=0)
    graph = torch.accelerator.Graph()
    with torch.Stream(), graph:
        x += 1
    graph.replay()
    graph.replay()
    return x.tolist()

def hooked():
    told = []
    x = torch.zeros(1, device="cuda")
    graph = torch.cuda.CUDAGraph()
    graph.register_capture_end_hook(lambda which: told.append("end"))
    handle = graph.register_replay_start_hook(lambda which: told.append("replay"))
    with torch.cuda.graph(graph):
        x += 1
    graph.replay()
    handle.remove()
    graph.replay()
    return told

def seeded():
    torch.manual_seed(7)
    from torch.accelerator import random
    states = random.get_rng_state_all()
    return [random.initial_seed(), len(states), torch.equal(states[0], random.get_rng_state(0))]

def issue():
    free, total = torch.accelerator.get_memory_info() if torch.accelerator.is_available() else (0, 0)
    return 0 < free <= total

def figures():
    held = torch.ones(1 << 20, device="cuda")
    accelerator = torch.accelerator
    accelerator.reset_peak_memory_stats(); accelerator.reset_accumulated_memory_stats()
    accelerator.empty_cache(); accelerator.empty_host_cache()
    asked = accelerator.memory_allocated(), accelerator.max_memory_allocated(0), accelerator.memory_reserved("cuda")
    is_same = accelerator.memory_stats().keys() == torch.cuda.memory_stats().keys()
    return min(asked) > 0 and is_same and accelerator.max_memory_reserved(torch.device("cuda", 0)) > 0

def workspaces():
    from torch.backends.cuda import blas_workspace_size, cublas_workspace_size, is_ck_sdpa_available
    before = cublas_workspace_size()
    return [before > 0, cublas_workspace_size(1 << 20), blas_workspace_size(backend="cublas"), is_ck_sdpa_available()]

def uncached():
    with torch.cuda.caching_allocator_disabled():
        return torch.ones(2, device="cuda").sum().item()

def annotated():
    from torch.cuda.graph_annotations import get_kernel_annotations, is_available, mark_kernels
    with mark_kernels("phase"):
        pass
    return [is_available(), dict(get_kernel_annotations())]

questions = {name: value for name, value in dict(globals()).items() if callable(value) and name != "ask"}
questions |= {
    "capability": lambda: torch.float32 in torch.accelerator.get_device_capability()["supported_dtypes"],
    "green": lambda: torch.cuda.GreenContext.create(2),
    "solver": lambda: torch.cuda.current_solver_handle(),
    "capturing": lambda: torch.cuda.Stream().is_capturing(),
    "snapshot": lambda: torch.accelerator.memory._snapshot(),
}
answers = {name: ask(question) for name, question in questions.items()}
names = json.loads(sys.argv[1])
def is_there(name):
    place, _, last = name.rpartition(".")
    __import__(place)
    return hasattr(sys.modules[place], last)
answers["missing"] = [name for name in names if not ask(lambda: is_there(name)) is True]
print(json.dumps(answers, default=str))
"""

PLACES = ("torch.accelerator", "torch.accelerator.memory", "torch.accelerator.random", "torch.cuda", "torch.backends.cuda")


def public_names() -> list[str]:
    """What the newest torch has behind the answers that are redirected: functions, classes, modules."""
    names = Names.load()
    newest = 1 << (len(names.releases) - 1)
    results = []
    for place in PLACES:
        for name in names.names_in(place):
            dotted = f"{place}.{name}"
            is_made = any(definition.startswith(place.rpartition(".")[0]) for definition in names.definitions(dotted))
            if not name.startswith("_") and is_made and names.look_up(dotted).mask & newest:
                results.append(dotted)
    return [name for name in results if not is_of_elsewhere(names, name)]


def is_of_elsewhere(names: Names, dotted: str) -> bool:
    """Whether it is what a module happens to import, or a constant."""
    module = names._database.module(dotted.rpartition(".")[0])
    entries = [entry for _, entry in (module.names.get(dotted.rpartition(".")[2], ()) if module else ())]
    return bool(entries) and not any(entry.startswith(("(", ":", "=torch.cuda", "=torch.accelerator")) for entry in entries)


@pytest.fixture(scope="module")
def answers(run_python_once: Callable[..., Any]) -> dict[str, Any]:
    process = run_python_once(PROGRAM, json.dumps(public_names()), env={"TORCHSPAN": "1"})
    return dict(json.loads(process.stdout.strip().splitlines()[-1]))


@pytest.mark.parametrize("question", ["issue", "figures", "capability"])
def test_memory_and_capability_of_the_accelerator_are_told(answers: dict[str, Any], question: str) -> None:
    assert answers[question] is True


def test_an_accelerators_graph_is_captured_and_replayed(answers: dict[str, Any]) -> None:
    assert answers["captured"] == [2.0, 2.0, 2.0]
    assert answers["hooked"] == ["end", "replay"] and answers["capturing"] is False


def test_its_random_state_is_told(answers: dict[str, Any]) -> None:
    assert answers["seeded"] == [7, 1, True]


def test_names_of_cuda_are_there(answers: dict[str, Any]) -> None:
    assert answers["uncached"] == 2.0 and answers["annotated"] == [False, {}]
    assert answers["green"].startswith("UnsupportedError: ") and answers["solver"].startswith("UnsupportedError: ")


def test_workspaces_of_blas_are_remembered(answers: dict[str, Any]) -> None:
    assert answers["workspaces"] == [True, 1 << 20, 1 << 20, False]


def test_every_public_name_behind_a_redirected_answer_is_there(answers: dict[str, Any]) -> None:
    assert len(public_names()) > 150
    assert answers["missing"] == []
