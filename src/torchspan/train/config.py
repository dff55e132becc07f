"""Configuration of a training job: dataclasses whose fields are dotted flags, such as ``--training.steps 5``."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchspan.core.errors import InputError


@dataclass(frozen=True)
class Training:
    """What is trained on, and for how long."""

    steps: int = 10
    """optimizer steps"""
    seed: int = 0
    """from which the weights and the order of the data are drawn"""
    global_batch_size: int = 8
    """sequences of a step, over all ranks"""
    seq_len: int = 128
    """tokens of a sequence"""
    dataset: Path | None = None
    """a text file; without one, text is generated"""
    threads: int = 0
    """threads of the CPU a rank; 0 leaves torch's choice"""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "seq_len"):
            if getattr(self, name) < 1:
                raise InputError(f"--training.{name} is {getattr(self, name)}; expected 1 or more")


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    lr: float = 8e-4
    """learning rate"""
    weight_decay: float = 0.1
    """decoupled weight decay"""

    def __post_init__(self) -> None:
        if not self.lr > 0:
            raise InputError(f"--optimizer.lr is {self.lr}; expected more than 0")


@dataclass(frozen=True)
class Parallelism:
    """How the job's processes share the work."""

    data_parallel_shard_degree: int = -1
    """ranks that share parameters and batch (SimpleFSDP); -1 takes what tensor parallelism leaves"""
    tensor_parallel_degree: int = 1
    """ranks that share each matrix"""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of gathered parameters"""


@dataclass(frozen=True)
class Compile:
    """Whether the step is captured as a graph, and what happens to it."""

    enable: bool = True
    """capture the step as a graph; --compile.no-enable (or --no-compile) runs it eagerly"""
    capture: Literal["auto", "train_step", "joint"] = "auto"
    """train_step works on every torch, joint on 2.10 and later; auto chooses"""
    passes: str = ""
    """a pipeline, such as transformer_block_bucketing,regional_inductor; 'torchspan passes' lists what there is"""
    budget_seconds: float = 300.0
    """seconds that the compile of one region may take"""
    budget_memory: str = "8GiB"
    """memory that the compile of one region may take"""
    dump: Path | None = None
    """a folder to which each graph is written as text"""


@dataclass(frozen=True)
class TrainConfig:
    """A training job."""

    module: str = "llama3"
    """the model"""
    config: str = "debugmodel"
    """its flavour"""
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallelism: Parallelism = field(default_factory=Parallelism)
    compile: Compile = field(default_factory=Compile)
    losses: Path | None = None
    """a JSON file for the losses, exact, and the report"""


def parse_config(argv: Sequence[str]) -> TrainConfig | None:
    """The configuration that `argv` writes, or None if it asked for help, which is then printed.

    ``llama3 debugmodel`` in front stand for ``--module llama3 --config debugmodel``, ``--no-compile`` for
    ``--compile.no-enable``.

    >>> parse_config(["llama3", "tiny", "--training.steps", "5", "--no-compile"]).compile.enable
    False
    >>> parse_config(["--training.stepps", "5"])  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.InputError: Unrecognized options: --training.stepps, 5; perhaps --training.steps? ...
    """
    import tyro

    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(TrainConfig, args=_spelled_out(argv), prog="torchspan train", description="Train a model.")
    except SystemExit as end:
        if not end.code:
            return None
        raise InputError(_one_line(shown.getvalue())) from None


def _spelled_out(argv: Sequence[str]) -> list[str]:
    """`argv` with positions and short forms written as flags."""
    positions: list[str] = []
    rest = list(argv)
    while rest and not rest[0].startswith("-") and len(positions) < 2:
        positions.append(rest.pop(0))
    flags = [text for name, value in zip(("--module", "--config"), positions) for text in (name, value)]
    return [*flags, *("--compile.no-enable" if text == "--no-compile" else text for text in rest)]


def _one_line(box: str) -> str:
    """What tyro's framed message says, as one line; the frame is drawn in ASCII where the terminal is."""
    lines = [line.strip("│|╭╮╰╯+ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    is_border = [re.search(r"[─-]{4}", line) is not None for line in lines]
    first = is_border.index(True) + 1 if True in is_border else 0
    end = is_border.index(True, first) if True in is_border[first:] else len(lines)
    close = re.search(r"Perhaps you meant:\s*(--\S+)", "\n".join(lines))
    hint = f"; perhaps {close[1]}?" if close else ";"
    return f"{' '.join(line for line in lines[first:end] if line).rstrip('.')}{hint} 'torchspan train --help' lists them"
