"""The ten commands of the compiler toolkit's reference, at tiny sizes: on four gloo ranks, which give eager's losses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.passes._base import REGISTRY
from torchspan.passes._pipeline import Pipeline

BUCKETS = "transformer_block_bucketing"
# model, flavour, degree of experts, joint passes, passes
COMMANDS = {
    "experts": ("deepseek_v3", "tiny", 2, "", ""),
    "experts, flex": ("deepseek_v3", "tiny_flex_attn", 2, "", ""),
    "plain": ("llama3", "tiny", 1, "", ""),
    "auto-bucketing": ("llama3", "tiny", 1, "", "autobucketing_reordering"),
    "block-bucketing": ("llama3", "tiny", 1, "", BUCKETS),
    "flex": ("llama3", "tiny_flex_attn", 1, "", ""),
}
THAT_COMPILE = {
    "flex, auto-bucketing, regional": ("llama3", "tiny_flex_attn", 1, "", "autobucketing_reordering,regional_inductor"),
    "flex, block-bucketing, regional": ("llama3", "tiny_flex_attn", 1, "", f"{BUCKETS},regional_inductor"),
    "flex, block-bucketing, regional, cudagraph": ("llama3", "tiny_flex_attn", 1, "", f"{BUCKETS},regional_inductor,cudagraph"),
    "full inductor": ("llama3", "tiny", 1, "inductor_decomposition", "full_inductor_compilation"),
}
if torch.__version__ < "2.9":  # refused by name: tests/passes/test_full_inductor_compilation.py
    del THAT_COMPILE["full inductor"]
RANKS = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from torchspan.train.config import Compile, Parallelism, TrainConfig, Training
from torchspan.train.loop import train

dist.init_process_group("gloo")
out, commands = Path(sys.argv[1]), json.loads(sys.argv[2])
answers = {}

def losses(module, config, ep, compile):
    parallelism = Parallelism(data_parallel_shard_degree=2, tensor_parallel_degree=2, expert_parallel_degree=ep)
    training = Training(steps=2, global_batch_size=4, seq_len=16, threads=1)
    result = train(TrainConfig(module, config, training=training, parallelism=parallelism, compile=compile))
    return list(result.losses), [(d.subject, d.choice) for d in result.report.decisions if d.topic == "pass"]

eager = {}
for name, (module, config, ep, joint_passes, passes) in commands.items():
    if (module, config) not in eager:
        eager[module, config] = losses(module, config, ep, Compile(enable=False))[0]
    found, decisions = losses(module, config, ep, Compile(joint_passes=joint_passes, passes=passes, budget_seconds=400.0))
    answers[name] = {"losses": found, "eager": eager[module, config], "decisions": decisions}
if dist.get_rank() == 0:
    out.write_text(json.dumps(answers))
dist.destroy_process_group()
"""


def run(commands: dict[str, Any], folder: Path, launch: Any) -> None:
    """Losses are eager's: to the last bit, or within what the passes claim."""
    (folder / "ranks.py").write_text(RANKS)
    launch(4, str(folder / "ranks.py"), str(folder / "answers.json"), json.dumps(commands))
    answers = json.loads((folder / "answers.json").read_text())
    for name, (_, _, _, joint_passes, passes) in commands.items():
        pipeline = Pipeline.parse(f"{joint_passes},{passes}".strip(","))
        tolerance = max((REGISTRY.get(pass_.name).PASS.tolerance for pass_ in pipeline.passes), default=0.0)
        result = answers[name]
        assert result["losses"] == (result["eager"] if not tolerance else pytest.approx(result["eager"], rel=tolerance)), name
        assert {pass_.name for pass_ in pipeline.passes} <= {subject for subject, _ in result["decisions"]}, name


def test_the_six_commands_that_compile_nothing_give_eagers_losses(tmp_path: Path, launch: Any) -> None:
    run(COMMANDS, tmp_path, launch)


def test_the_four_commands_that_compile_give_eagers_losses(tmp_path: Path, launch: Any) -> None:
    run(THAT_COMPILE, tmp_path, launch)
