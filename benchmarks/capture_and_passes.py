"""Capture and passes: what a captured training step costs against eager, and how many collectives the passes leave.

Per step: a Llama 3 in one process, eager and as a graph, in turn. Counts: the same model on a mesh of 4 × 2 ranks of which this
process is the first (shapes are real, nothing is sent).
"""

from __future__ import annotations

import gc
from dataclasses import replace

import torch
import torch.distributed as dist
from _harness import Row, arguments, in_turn, seconds, write

from torchspan.capture._state import BoundGraph
from torchspan.capture.joint import capture_joint, is_supported
from torchspan.capture.train_step import capture_train_step
from torchspan.core.program import Program
from torchspan.models._base import get_model
from torchspan.parallel.mesh import Degrees, build_mesh
from torchspan.passes._instruments import count
from torchspan.passes._pipeline import Pipeline
from torchspan.train.config import Parallelism, TrainConfig, Training
from torchspan.train.data import ByteTokens
from torchspan.train.job import Job, Loss, build_program

CAPTURES = {"train_step": capture_train_step, **({"joint": capture_joint} if is_supported() else {})}


def main() -> None:
    """Measure both sides and write them."""
    options = arguments(__doc__ or "", config="debugmodel", repeats=9, seq_len=64, batch=4)
    training = Training(global_batch_size=options.batch, seq_len=options.seq_len)
    config = TrainConfig(config=options.config, training=training)
    rows = [*step_rows(config, options.repeats), *count_rows(config)]
    write("capture and passes", rows, options.out)


def step_rows(config: TrainConfig, repeats: int) -> list[Row]:
    """Capture against one eager step, and a graph's step against eager's."""
    spec = get_model(config.module)
    program: Loss = build_program(spec, config, Job(), annotate=False)
    inputs = ByteTokens.load(None).batch(0, 0, config.training.global_batch_size, config.training.seq_len)

    def eager() -> None:
        program.zero_grad(set_to_none=True)
        program(*inputs).backward()

    rows = []
    eager()
    for name, capture in CAPTURES.items():
        capture(Program(program, inputs))  # the first one imports torch's compiler
        captured, step = in_turn(
            lambda c=capture: seconds(lambda: c(Program(program, inputs))),  # type: ignore[misc]
            lambda: seconds(eager),
            3,
        )
        rows.append(Row(f"{name}: one capture / one eager step", captured, step))
        bound = BoundGraph(capture(Program(program, inputs)), program)
        bound(*inputs)
        gc.collect()
        ours, theirs = in_turn(lambda b=bound: seconds(lambda: b(*inputs)), lambda: seconds(eager), repeats)  # type: ignore[misc]
        rows.append(Row(f"{name}: graph's step / eager's step", ours, theirs, note="forward and backward"))
    return rows


def count_rows(config: TrainConfig) -> list[Row]:
    """Nodes and collectives after the pass against before."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    config = replace(config, parallelism=Parallelism(4, 2))
    job = Job(0, 8, build_mesh(Degrees(4, 2), 8))
    program = build_program(get_model(config.module), config, job, annotate=False)
    tokens = torch.zeros(config.training.global_batch_size // 4, config.training.seq_len, dtype=torch.long)
    rows = []
    for name, capture in CAPTURES.items():
        graph = capture(Program(program, (tokens, tokens)))
        after = count(Pipeline.parse("transformer_block_bucketing").run(graph))
        rows += [
            Row(f"{name}, 4 × 2 ranks: {kind}", after[kind], before, "", note="after / before block bucketing")
            for kind, before in count(graph).items()
        ]
    dist.destroy_process_group()
    return rows


if __name__ == "__main__":
    main()
