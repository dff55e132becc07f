"""What a running program misses of torch is told under its traceback, as the scan says it."""

from __future__ import annotations

import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from torchspan.scan._missed import advice
from torchspan.scan._names import Names

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def names() -> Names:
    return Names.load()


@pytest.fixture(scope="module")
def here(names: Names) -> int:
    return 1 << names.minors.index(".".join(torch.__version__.split(".")[:2]))


def told(program: str, file: Path) -> str | None:
    """The advice under the error that the program ends with; None where it ends well."""
    file.write_text(program)
    try:
        exec(compile(program, str(file), "exec"), {"__name__": "program"})
    except Exception as error:  # noqa: BLE001 (it is what is asked about)
        return advice(error)
    return None


MISSED = {
    "name": ("import torch\ntorch.hash_tensor", "torch.hash_tensor needs torch ≥ 2.9"),
    "import": ("from torch.optim import Muon", "torch.optim.Muon needs torch ≥ 2.9"),
    "module": ("import torch.nn.no_such_module", "is in no torch release"),
    "submodule": ("import torch.cuda.green_contexts", "torch.cuda.green_contexts needs torch ≥ 2.10"),
    "tensor": ("import torch\nx = torch.ones(2)\nx.hash_tensor()", "torch.Tensor.hash_tensor needs torch ≥ 2.9"),
    "option": (
        "import torch._dynamo.config as c\nc.trace_autograd_ops",
        "torch._dynamo.config.trace_autograd_ops needs torch ≥ 2.11",
    ),
    "option is set": ("import torch._dynamo.config as c\nc.trace_autograd_ops = 1", "trace_autograd_ops needs torch ≥ 2.11"),
    "patch": (
        "import torch._dynamo.config as c\nwith c.patch(trace_autograd_ops=True): pass",
        "torch._dynamo.config.trace_autograd_ops needs torch ≥ 2.11",
    ),
    "enum": ("import torch\ntorch.Tag.out_variant", "torch.Tag.out_variant needs torch ≥ 2.11"),
    "property": ("import torch\ntorch.backends.cuda.matmul.fp32_precision = 'ieee'", "matmul.fp32_precision needs torch ≥ 2.9"),
    "keyword": (
        "from torch.distributed.device_mesh import init_device_mesh as i\ni('cpu', (1,), no=1)",
        "init_device_mesh(no=) is in no torch release",
    ),
    "keyword by a dict": (
        "import torch\nk = dict(async_stager=None, async_checkpointer_type=None, no_dist=True)\n"
        "import torch.distributed.checkpoint as dcp\ndcp.async_save({}, **k)",
        "async_save(async_stager=)",
    ),
    "keyword of a base": (
        "import torch\nclass M(torch.nn.Linear):\n  def __init__(self):\n    super().__init__(1, 2, no_such=1)\nM()",
        "torch.nn.modules.linear.Linear(no_such=) is in no torch release",
    ),
    "operator": ("import torch\ntorch.ops.aten.hash_tensor", "torch.ops.aten.hash_tensor needs torch ≥ 2.9"),
    "cause": (
        "try:\n  from torch.optim import Muon\nexcept ImportError as error:\n  raise RuntimeError('no optimizer') from error",
        "torch.optim.Muon needs torch ≥ 2.9",
    ),
}


@pytest.mark.parametrize("kind", MISSED)
def test_what_was_missed_is_told_with_its_release(kind: str, tmp_path: Path) -> None:
    program, expected = MISSED[kind]
    line = told(program, tmp_path / "program.py")
    if line is None:
        assert "no torch release" not in expected  # this torch has it
        compare = [int(part) for part in expected.rpartition("≥ ")[2].split(".")] if "≥" in expected else [0]
        assert [int(part) for part in torch.__version__.split(".")[:2]] >= compare
        return
    assert line.startswith("torchspan: ") and expected in line and "\n" not in line
    assert "no torch release" in expected or "covered" in line


@pytest.mark.parametrize(
    "program",
    [
        "class Mine:\n  pass\nMine().hash_tensor",
        "def async_save(state): ...\nasync_save(1, async_stager=2)",
        "import math\nmath.hash_tensor",
        "import torch\nx = None\nx.hash_tensor",
        "from collections import nothing_of_this_name",
        "import torch\nclass M(torch.nn.Module): ...\nM().my_own",
        "raise TypeError('what is mine')",
        "1 / 0",
    ],
)
def test_other_errors_have_no_advice(program: str, tmp_path: Path) -> None:
    assert told(program, tmp_path / "program.py") is None


def test_run_and_scan_say_the_same_of_many_names(names: Names, here: int, tmp_path: Path) -> None:
    """Names drawn from the database, those of this torch among them: each is looked up, and scanned."""
    from torchspan.scan import scan

    chance = random.Random(19)
    places = [
        "torch",
        "torch.nn",
        "torch.distributed",
        "torch.optim",
        "torch.utils.data",
        "torch.fx",
        "torch.library",
        "torch.compiler",
    ]
    drawn = [f"{place}.{name}" for place in places for name in names.names_in(place) if not name.startswith("__")]
    lacking = [name for name in drawn if not names.look_up(name).mask & here]
    chosen = [*lacking, *chance.sample([name for name in drawn if name not in lacking], 150)]
    file, whole = tmp_path / "program.py", tmp_path / "whole.py"
    programs = ["from {0} import {2}\n".format(*name.rpartition(".")) for name in chosen]
    whole.write_text("".join(programs))
    says = {finding.line: f"torchspan: {finding.name} {finding.says}" for finding in scan([whole], torch.__version__).findings}
    wrong = []
    for line, (name, program) in enumerate(zip(chosen, programs), 1):
        at_run, at_scan = told(program, file), says.get(line)
        if (at_run is None) != (at_scan is None) or not (at_run or "").startswith((at_scan or "").partition(" — ")[0]):
            wrong.append((name, at_run, at_scan))
    assert len(chosen) > 150 and wrong == []


PROGRAM = """
import sys, threading
import torch
import torch.multiprocessing as mp

def child(*_):
    torch.no_such_name

if __name__ == "__main__":
    kind = sys.argv[1]
    if kind == "thread":
        thread = threading.Thread(target=child)
        thread.start(); thread.join()
    elif kind == "process":
        process = mp.get_context("fork").Process(target=child)
        process.start(); process.join()
        sys.exit(process.exitcode)
    elif kind == "spawn":
        mp.spawn(child, nprocs=1)
    else:
        child()
"""
LINE = "torchspan: torch.no_such_name is in no torch release that torchspan knows"
WAYS = {
    "run": (["-m", "torchspan", "run", "--quiet", "program.py", "here"], {}, 1),
    "run a module": (["-m", "torchspan", "run", "--quiet", "-m", "program", "here"], {}, 1),
    "activated by a variable": (["program.py", "here"], {"TORCHSPAN": "1"}, 1),
    "thread": (["program.py", "thread"], {"TORCHSPAN": "1"}, 0),
    "process": (["program.py", "process"], {"TORCHSPAN": "1"}, 1),
    "spawned": (["program.py", "spawn"], {"TORCHSPAN": "1"}, 1),
}


@pytest.mark.once
@pytest.mark.parametrize("way", WAYS)
def test_it_is_told_once_however_the_program_runs_and_the_exit_code_is_kept(way: str, run_python: Run, tmp_path: Path) -> None:
    arguments, variables, code = WAYS[way]
    (tmp_path / "program.py").write_text(PROGRAM)
    process = run_python(None, *arguments, env=variables, expect=code)
    assert process.stderr.count(LINE) == 1, process.stderr
    assert "AttributeError: module 'torch' has no attribute 'no_such_name'" in process.stderr
