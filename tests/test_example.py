"""The main job: a CUDA trainer for a newer torch runs here, unmodified, and says what was changed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SMALL = ("--layers", "2", "--width", "32", "--context", "16", "--batch", "4", "--sample", "40")
TORCHSPAN = ("-m", "torchspan", "run")


def losses(output: str) -> list[str]:
    return re.findall(r"step +\d+  loss ([0-9.]+|nan)", output)


def written_for_cpu(text: str) -> str:
    """The same program, ported to the CPU by hand."""
    dropped = [
        "torch.cuda.manual_seed_all(1337)\n",
        "torch.backends.cuda.matmul.allow_tf32 = True\n",
        "torch.backends.cudnn.benchmark = True\n",
        ", pin_memory=True",
        "copies = torch.cuda.Stream()\n",
        "begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)\n",
        " on {torch.cuda.get_device_name(0)}",
        "begin.record()\n",
        "    with torch.cuda.stream(copies):\n",
        "        inputs, targets = inputs.to(device, non_blocking=True), targets.cuda(non_blocking=True)\n",
        "    torch.cuda.current_stream().wait_stream(copies)\n",
        "        torch.cuda.synchronize()\n",
        "end.record()\n",
        "torch.cuda.synchronize()\n",
        'print(f"{begin.elapsed_time(end) / args.steps:.1f} ms a step, '
        '{torch.cuda.max_memory_allocated() / 2**20:.0f} MiB at most")\n',
    ]
    replacements = [*((old, "") for old in dropped), ("GPT().cuda()", "GPT()"), ('"cuda"', '"cpu"')]
    for old, new in replacements:
        assert old in text, old
        text = text.replace(old, new)
    assert "cuda" not in text.split('"""', 2)[2]
    return text


def test_the_numbers_are_those_of_the_program_written_for_the_cpu(run_python, tmp_path: Path) -> None:
    program = (EXAMPLES / "newer_cuda_gpt.py").read_text().replace("torch.compile(model)", "model").replace("% 100", "% 5")
    (tmp_path / "corpus.txt").write_text((EXAMPLES / "corpus.txt").read_text())
    (tmp_path / "for_cuda.py").write_text(program)
    (tmp_path / "for_cpu.py").write_text(written_for_cpu(program))
    arguments = ("--steps", "30", *SMALL)
    for_cuda = run_python(None, *TORCHSPAN, "--quiet", "for_cuda.py", *arguments).stdout
    for_cpu = run_python(None, *TORCHSPAN, "--quiet", "--device", "off", "for_cpu.py", *arguments).stdout
    assert len(losses(for_cuda)) == 7 and losses(for_cuda) == losses(for_cpu)
    assert for_cuda.splitlines()[-3:] == for_cpu.splitlines()[-3:]  # the text that they wrote


@pytest.mark.slow
def test_it_trains_unmodified_and_ends_with_what_was_changed(run_python, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    program = str(EXAMPLES / "newer_cuda_gpt.py")
    process = run_python(None, *TORCHSPAN, "--report", str(report), program, "--steps", "400", *SMALL, as_found=True)
    assert float(losses(process.stdout)[-1]) < float(losses(process.stdout)[0])
    values = json.loads(report.read_text())
    backported = {d["subject"] for d in values["decisions"] if d["topic"] == "backport"}
    lacking = torch.__version__.startswith("2.8.")
    assert ("torch.fx.traceback.annotate" in backported) == lacking
    redirected = [d for d in values["decisions"] if d["topic"] == "device"]
    assert len(redirected) >= 10 and all(".py:" in d["site"] for d in redirected)
    assert values["attempts"][0]["outcome"] in ("compiled", "cancelled"), values["attempts"]
    assert values["figures"]["first_step_wait_s"] < 5
    for words in ("redirected", "compile attempt", "first step wait"):
        assert words in process.stderr
    assert ("backported" in process.stderr) == bool(backported)


@pytest.mark.once
def test_the_walk_through_shows_graphs_and_loads_in_a_process_that_compiles_nothing(run_python) -> None:
    shown = run_python(None, str(EXAMPLES / "precompile_walkthrough.py")).stdout
    assert "torch.ops.aten.native_layer_norm_backward.default" in shown
    assert "== gradients equal eager's: True" in shown
    assert "== another shape: the graph of Classifier is not for this call: " in shown
    assert "== fresh process: equal to eager; dynamo was imported: False" in shown


@pytest.mark.once
def test_ranks_train_with_the_artifact_that_rank_0_compiled(run_python, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(f"""
import os, runpy, sys
if os.environ["RANK"] == "1":
    os.environ["PATH"] = ""  # no compiler
runpy.run_path({str(EXAMPLES / "artifact_on_ranks.py")!r}, run_name="__main__")
print(f"rank {{os.environ['RANK']}}: imported inductor: {{'torch._inductor.compile_fx' in sys.modules}}")
""")
    shown = run_python(None, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "ranks.py").stdout
    assert "rank 0: imported inductor: True" in shown and "rank 1: imported inductor: False" in shown
    differences = [float(value) for value in re.findall(r"differ by at most ([\d.]+e[+-]\d+)", shown)]
    assert len(differences) == 2 and max(differences) < 1e-6
