"""The step compiled whole: its time beside eager's and torch.compile's on the same ranks, and the time to the first step.

Each side is a job of its own (`--ranks` gloo processes), in turn: eager, torch.compile of the same program, the graph with
full_inductor_compilation compiled for the first time, and a second start that loads what `--compile.artifact` kept. Of a job
are measured: wall seconds from the launch to the end of the first step, CPU seconds of all its processes, and the median of
the later steps' seconds on rank 0. All jobs of one run share a new cache folder, so that only the first compile is cold.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path

from _harness import Row, arguments, write

KINDS = ("eager", "torch_compile", "cold", "artifact")


@dataclass(frozen=True)
class Measured:
    """One job: wall seconds to the end of its first step, CPU seconds in all, seconds of a later step."""

    first_step_s: float
    cpu_s: float
    step_s: float


def main() -> None:
    """Measure each kind of job, and write the rows."""
    options = arguments(
        __doc__ or "", config="tiny", ranks=2, tp=1, steps=20, seq_len=32, batch=4, budget=1800.0, torch_compile=True
    )
    with tempfile.TemporaryDirectory() as folder:
        kinds = [kind for kind in KINDS if kind != "torch_compile" or options.torch_compile]
        runs = {kind: run(kind, options, Path(folder)) for kind in kinds}
    best = min((kind for kind in ("eager", "torch_compile") if kind in runs), key=lambda kind: runs[kind].step_s)
    eager = runs["eager"]
    rows = [
        Row("step", runs["artifact"].step_s, runs[best].step_s, goal=1.0, note=f"other side: {best}"),
        Row("start, cold: to the first step", runs["cold"].first_step_s, eager.first_step_s, note="other side: eager"),
        Row("start, artifact: to the first step", runs["artifact"].first_step_s, eager.first_step_s, goal=1.5),
        Row("start, artifact: CPU of the job", runs["artifact"].cpu_s, eager.cpu_s, note="all processes, the launcher too"),
    ]
    write("full_inductor", rows, options.out, job=f"{options.config}, {options.ranks} ranks, tp {options.tp}")


def run(kind: str, options: Namespace, folder: Path) -> Measured:
    """One job from its launch on."""
    losses = folder / f"{kind}.json"
    flags = {
        "--module": "llama3",
        "--config": options.config,
        "--training.steps": options.steps,
        "--training.seq_len": options.seq_len,
        "--training.global_batch_size": options.batch,
        "--training.threads": 1,
        "--parallelism.tensor_parallel_degree": options.tp,
        "--losses": losses,
    }
    if kind in ("cold", "artifact"):
        flags |= {
            "--compile.joint_passes": "inductor_decomposition",
            "--compile.passes": "full_inductor_compilation",
            "--compile.budget_seconds": options.budget,
            "--compile.artifact": folder / "kept",
        }
    program = [__file__, "torch_compile"] if kind == "torch_compile" else ["-m", "torchspan", "train"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={options.ranks}", *program]
    command += [str(text) for pair in flags.items() for text in pair] + (
        [] if "--compile.passes" in flags else ["--no-compile"]
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began, first = time.perf_counter(), None
    environ = os.environ | {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache")}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environ) as job:
        assert job.stdout is not None
        lines = []
        for line in job.stdout:
            lines.append(line)
            if first is None and line.startswith("step 1 "):
                first = time.perf_counter() - began
    if job.returncode or first is None:
        sys.exit(f"the job {kind} failed:\n{''.join(lines)}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Measured(first, cpu_s, statistics.median(json.loads(losses.read_text())["seconds"][2:]))


def with_torch_compile(argv: list[str]) -> None:
    """``torchspan train`` of `argv`, with torch.compile around the program, on this rank."""
    import torch

    from torchspan.train import loop
    from torchspan.train.config import parse_config

    build = loop.build_program

    def compiled(*args: object, **kwargs: object) -> object:
        program = build(*args, **kwargs)  # type: ignore[arg-type]
        program.compile()
        return program

    loop.build_program = compiled  # type: ignore[assignment]
    config = parse_config(argv)
    assert config is not None, "a job is measured, not its help"
    torch.set_num_threads(1)
    loop.main(config)


if __name__ == "__main__":
    if sys.argv[1:2] == ["torch_compile"]:
        with_torch_compile(sys.argv[2:])
    else:
        main()
