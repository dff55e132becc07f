"""Run the ten commands of the compiler toolkit's reference as written, each beside the same job run eagerly.

    python tools/ten_commands.py --out benchmarks/results/ten_commands_2.13.0.json
    python tools/ten_commands.py --only 9 10 --out /tmp/part.json

Llama 3 runs on 8 ranks (dp_shard 2 × tp 4), DeepSeek V3 on 4 (dp_shard 2 × tp 2, ep 2), five steps of the flavour `debugmodel`.
It has for each command: seconds of the whole, exit code, losses, their largest relative difference from eager's, and what
the report says of capture and passes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
MESHES = {
    "llama3": (8, ["--parallelism.data_parallel_shard_degree=2", "--parallelism.tensor_parallel_degree=4"]),
    "deepseek_v3": (
        4,
        [
            "--parallelism.data_parallel_shard_degree=2",
            "--parallelism.tensor_parallel_degree=2",
            "--parallelism.expert_parallel_degree=2",
            "--activation_checkpoint.mode",
            "none",
        ],
    ),
}
BLOCKS = "transformer_block_bucketing"
# model, flavour, arguments of the compiler
COMMANDS: list[tuple[str, str, list[str]]] = [
    ("deepseek_v3", "debugmodel", []),
    ("deepseek_v3", "debugmodel_flex_attn", []),
    ("llama3", "debugmodel", []),
    ("llama3", "debugmodel", ["--compile.passes", "autobucketing_reordering"]),
    ("llama3", "debugmodel", ["--compile.passes", BLOCKS]),
    ("llama3", "debugmodel_flex_attn", []),
    ("llama3", "debugmodel_flex_attn", ["--compile.passes", "autobucketing_reordering,regional_inductor"]),
    ("llama3", "debugmodel_flex_attn", ["--compile.passes", f"{BLOCKS},regional_inductor"]),
    ("llama3", "debugmodel_flex_attn", ["--compile.passes", f"{BLOCKS},regional_inductor,cudagraph"]),
    (
        "llama3",
        "debugmodel",
        ["--compile.joint_passes", "inductor_decomposition", "--compile.passes", "full_inductor_compilation"],
    ),
]


def main(arguments: list[str]) -> int:
    """Run them, one after another; 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--only", type=int, nargs="*", default=range(1, 11), help="numbers of commands, from 1")
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args(arguments)
    eager: dict[tuple[str, str], list[float]] = {}
    results = []
    for number in options.only:
        model, flavour, passes = COMMANDS[number - 1]
        if (model, flavour) not in eager:
            eager[model, flavour] = run(model, flavour, ["--no-compile"], options.steps)["losses"]
        result = {"command": number, **run(model, flavour, passes, options.steps)}
        result["differs_from_eager"] = difference(result["losses"], eager[model, flavour])
        results.append(result)
        answer = {"torch": torch.__version__, "steps": options.steps, "commands": results}
        options.out.write_text(json.dumps(answer, indent=1) + "\n")
    return int(any(result["exit_code"] for result in results))


def run(model: str, flavour: str, compiler: list[str], steps: int) -> dict[str, Any]:
    """One command; what it gave."""
    ranks, mesh = MESHES[model]
    with tempfile.TemporaryDirectory() as folder:
        losses = Path(folder) / "losses.json"
        words = ["--module", model, "--config", flavour, *mesh, *compiler]
        start = time.perf_counter()
        job = subprocess.run(
            [ROOT / "run_train.sh", *words, "--training.steps", str(steps), "--losses", losses],
            env={**os.environ, "NGPU": str(ranks), "PYTHON": sys.executable},
            capture_output=True,
            text=True,
        )
        seconds = round(time.perf_counter() - start)
        outcome = json.loads(losses.read_text()) if losses.exists() else {"losses": [], "report": {"decisions": []}}
    decisions = [decision for decision in outcome["report"]["decisions"] if decision["topic"] in ("capture", "pass")]
    return {
        "words": f"NGPU={ranks} ./run_train.sh {' '.join(words)}",
        "exit_code": job.returncode,
        "seconds": seconds,
        "losses": outcome["losses"],
        "report": [f"{decision['subject']} → {decision['choice']}" for decision in decisions],
        "error": job.stderr[-2000:] if job.returncode else "",
    }


def difference(losses: list[float], eager: list[float]) -> float | None:
    """The largest relative difference of two runs' losses; None where one of them has none."""
    if not losses or len(losses) != len(eager):
        return None
    return max(abs(mine - theirs) / abs(theirs) for mine, theirs in zip(losses, eager, strict=True))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
