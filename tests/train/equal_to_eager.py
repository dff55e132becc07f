"""Whether a captured step is eager's, bit by bit, on every rank: run by torchrun or alone; answers are written as JSON.

    torchrun --nproc_per_node=4 tests/train/equal_to_eager.py answers.json model=deepseek_v3 layout=2,2,2,1 captures=train_step

The layout is dp_shard,tp,ep,dp_replicate; `QUESTION` has what else can be said. Questions are separated by slashes. In each
batch, loss, every gradient and every buffer are compared, then both programs take an optimizer step. From the third batch on,
one expert of each layer has a bias with which no token chooses it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchspan.capture._choose import capture_training
from torchspan.capture._state import BoundGraph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.models._base import get_model
from torchspan.parallel.mesh import Degrees, build_meshes
from torchspan.passes._pipeline import Pipeline
from torchspan.train.config import Parallelism, TrainConfig, Training
from torchspan.train.data import ByteTokens, part_of
from torchspan.train.job import Job, Loss, build_program, check_same_collectives
from torchspan.train.loop import flex_attention_provided

Batch = tuple[Tensor, ...]


QUESTION = {
    "model": "llama3",
    "flavour": "tiny",
    "layout": "1,1,1,1",
    "dtype": "float32",
    "captures": "train_step",
    "batches": "3",
    "passes": "",
    "reshard": "never",
    "seq_len": "16",
}


def main(argv: list[str]) -> None:
    """Answer each question, and write what was found."""
    out, *words = argv
    torch.set_num_threads(1)
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    answers = [answer(dict(word.split("=", 1) for word in text.split())) for text in " ".join(words).split("/")]
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(out).write_text(json.dumps(answers))


def answer(settings: dict[str, str]) -> dict[str, Any]:
    """What was found for one question: for each capture what `compare` found, with what differs on any rank."""
    question = {**QUESTION, **settings}
    dp_shard, tp, ep, dp_replicate = map(int, question["layout"].split(","))
    degrees = Degrees(dp_shard=dp_shard, tp=tp, ep=ep, dp_replicate=dp_replicate)
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    job = Job(dist.get_rank() if dist.is_initialized() else 0, world_size, build_meshes(degrees, world_size))
    parallelism = Parallelism(param_dtype=question["dtype"], reshard_after_forward=question["reshard"])  # type: ignore[arg-type]
    training = Training(global_batch_size=4, seq_len=int(question["seq_len"]))
    config = TrainConfig(question["model"], question["flavour"], training=training, parallelism=parallelism)
    with flex_attention_provided(get_model(config.module).flavour(config.config), job, Report()):
        answers = {
            capture: compare(config, job, capture, int(question["batches"]), question["passes"])
            for capture in question["captures"].split(",")
        }
    if world_size > 1:
        gathered: list[Any] = [None] * world_size
        dist.all_gather_object(gathered, answers)
        answers = {capture: merged([of_rank[capture] for of_rank in gathered]) for capture in answers}
    return answers


def compare(config: TrainConfig, job: Job, capture: str, num_batches: int, passes: str) -> dict[str, Any]:
    """Eager and the captured step beside each other: losses, what differs, and the experts' numbers of tokens."""
    eager, program = (build_program(get_model(config.module), config, job, annotate=False) for _ in range(2))
    batches = [_batch(config, job, index) for index in range(num_batches)]
    graph = capture_training(Program(program, batches[0]), capture)
    graph = Pipeline.parse(passes).run(graph)
    check_same_collectives(graph, job)
    step = BoundGraph(graph, program)
    counts = _watch_counts(eager)
    results: dict[str, Any] = {"losses": [], "differing": [], "counts": [], "collectives": dict(graph.num_collectives())}
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-3) for model in (eager, program)]
    for index, batch in enumerate(batches):
        for model in (eager, program):
            model.zero_grad(set_to_none=True)
            if index == 2:
                _starve_an_expert(model)
        counts.clear()
        loss = eager(*batch)
        loss.backward()
        results["differing"] += [f"{index}: {name}" for name in differing(eager, program, loss, step(*batch))]
        results["losses"].append(loss.item())
        results["counts"].append([row.tolist() for row in counts])
        for optimizer in optimizers:
            optimizer.step()
    return results


def differing(eager: Loss, program: Loss, loss: Tensor, ours: Tensor) -> list[str]:
    """The names of what is not equal in every bit."""
    names = [] if torch.equal(loss, ours) else ["loss"]
    for (name, reference), parameter in zip(eager.named_parameters(), program.parameters()):
        if reference.grad is None or parameter.grad is None:
            names += [] if reference.grad is parameter.grad else [f"whether {name} has a gradient"]
        elif not torch.equal(_local(reference.grad), _local(parameter.grad)):
            names.append(f"gradient of {name}")
    buffers = zip(eager.named_buffers(), program.buffers())
    return names + [f"buffer {name}" for (name, theirs), mine in buffers if not torch.equal(theirs, mine)]


def merged(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Rank 0's answers, with what differs on any rank."""
    return {**ranks[0], "differing": [f"rank {r}: {name}" for r, answer in enumerate(ranks) for name in answer["differing"]]}


def _batch(config: TrainConfig, job: Job, index: int) -> Batch:
    training = config.training
    batch = ByteTokens.load(None).batch(training.seed, index, training.global_batch_size, training.seq_len)
    return tuple(part_of(part, job.data_parallel_rank, job.num_data_parallel) for part in batch)


def _watch_counts(module: nn.Module) -> list[Tensor]:
    """What the balance of each layer is given: the number of tokens of each expert, on all ranks."""
    counts: list[Tensor] = []
    for name, submodule in module.named_modules():
        if name.endswith("moe.balance"):
            submodule.register_forward_hook(lambda _, args, __: counts.append(args[0].detach().clone()))
    return counts


def _starve_an_expert(module: nn.Module) -> None:
    for name, buffer in module.named_buffers():
        if name.endswith("balance.bias_E"):
            buffer[1] = -1e6


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


if __name__ == "__main__":
    main(sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
