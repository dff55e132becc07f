"""Configuration of a training job: dataclasses whose fields are dotted flags, such as ``--training.steps 5``."""

from __future__ import annotations

import contextlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torchspan.core.errors import InputError
from torchspan.core.text import parse_bytes


@dataclass(frozen=True)
class Training:
    """What is trained on, and for how long."""

    steps: int = 10
    """optimizer steps"""
    seed: int = 0
    """from which the weights and the order of the data are drawn"""
    global_batch_size: int = 8
    """sequences of a step, over all ranks and micro-batches"""
    gradient_accumulation_steps: int = 1
    """micro-batches of a step, whose gradients are added up"""
    seq_len: int = 128
    """tokens of a sequence"""
    dataset: Path | None = None
    """a text file; without one, text is generated"""
    threads: int = 0
    """threads of the CPU a rank; 0 leaves torch's choice"""

    def __post_init__(self) -> None:
        for name in ("steps", "global_batch_size", "gradient_accumulation_steps", "seq_len"):
            if getattr(self, name) < 1:
                raise InputError(f"--training.{name} is {getattr(self, name)}; expected 1 or more")
        if self.threads < 0:
            raise InputError(f"--training.threads is {self.threads}; expected 0, which leaves torch's choice, or more")


@dataclass(frozen=True)
class Optimizer:
    """AdamW."""

    lr: float = 8e-4
    """learning rate"""
    weight_decay: float = 0.1
    """decoupled weight decay"""

    def __post_init__(self) -> None:
        if not 0 < self.lr < math.inf:
            raise InputError(f"--optimizer.lr is {self.lr}; expected a finite number above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise InputError(f"--optimizer.weight_decay is {self.weight_decay}; expected a finite number, 0 or more")


@dataclass(frozen=True)
class Parallelism:
    """How the job's processes share the work."""

    data_parallel_shard_degree: int = -1
    """ranks that share parameters and batch (SimpleFSDP); -1 takes the ranks that the other degrees leave"""
    tensor_parallel_degree: int = 1
    """ranks that share each matrix"""
    data_parallel_replicate_degree: int = 1
    """groups of ranks that each hold all parameters and share the batch (hybrid sharding)"""
    expert_parallel_degree: int = 1
    """ranks that share the experts of a mixture of experts, taken out of data_parallel_shard × tensor_parallel"""
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    """dtype of gathered parameters"""
    reshard_after_forward: Literal["never", "always"] = "never"
    """whether parameters are freed after the forward and gathered again for the backward: less memory, more communication"""

    def __post_init__(self) -> None:
        for name in ("data_parallel_replicate_degree", "tensor_parallel_degree", "expert_parallel_degree"):
            if getattr(self, name) < 1:
                raise InputError(f"--parallelism.{name} is {getattr(self, name)}; expected 1 or more")
        if self.data_parallel_shard_degree < 1 and self.data_parallel_shard_degree != -1:
            raise InputError(
                f"--parallelism.data_parallel_shard_degree is {self.data_parallel_shard_degree}; expected 1 or more, or -1, "
                "which takes the ranks that the other degrees leave"
            )


@dataclass(frozen=True)
class ActivationCheckpoint:
    """Whether activations are computed again in the backward instead of being kept."""

    mode: Literal["none", "full", "selective", "memory_budget"] = "none"
    """none keeps all; full keeps what each block is given; selective, as its option says; memory_budget, what fits a budget"""
    selective_ac_option: str = "op"
    """op keeps the results of products and attention in every block; 2 treats every second block, as full does"""
    memory_budget: float = 0.5
    """share of what is kept with mode none, from 0 to 1"""

    def __post_init__(self) -> None:
        if self.selective_ac_option != "op" and not re.fullmatch("[1-9][0-9]*", self.selective_ac_option):
            raise InputError(
                f"--activation_checkpoint.selective_ac_option is {self.selective_ac_option!r}; expected op, or a whole number, "
                "such as 2 for every second block"
            )
        if not 0 <= self.memory_budget <= 1:
            raise InputError(f"--activation_checkpoint.memory_budget is {self.memory_budget}; expected a share from 0 to 1")
        for mode, name, default in (("selective", "selective_ac_option", "op"), ("memory_budget", "memory_budget", 0.5)):
            if self.mode != mode and getattr(self, name) != default:
                raise InputError(f"--activation_checkpoint.{name} is given with mode {self.mode}; expected mode {mode}")

    @property
    def every(self) -> int:
        """Every how many blocks one is treated."""
        return 1 if self.mode != "selective" or self.selective_ac_option == "op" else int(self.selective_ac_option)

    def as_pass(self) -> str:
        """The pass that does this on a captured graph, as a pipeline writes it; nothing for mode none.

        >>> ActivationCheckpoint("selective", "2").as_pass()
        'apply_sac{save="",every=2}'
        """
        if self.mode == "none":
            return ""
        if self.mode == "memory_budget":
            return f"apply_sac{{budget={self.memory_budget}}}"
        is_by_operator = self.mode == "selective" and self.selective_ac_option == "op"
        return "apply_sac" if is_by_operator else f'apply_sac{{save="",every={self.every}}}'


@dataclass(frozen=True)
class Compile:
    """Whether the step is captured as a graph, and what happens to it."""

    enable: bool = True
    """capture the step as a graph; --compile.no-enable (or --no-compile) runs it eagerly"""
    capture: Literal["auto", "train_step", "joint"] = "auto"
    """train_step works on every torch, joint on 2.10 and later; auto chooses"""
    joint_passes: str = ""
    """a pipeline that runs before the one of --compile.passes"""
    passes: str = ""
    """a pipeline, such as transformer_block_bucketing,regional_inductor; 'torchspan passes' lists what there is"""
    budget_seconds: float = 300.0
    """seconds that the compile of one region may take"""
    budget_memory: str = "8GiB"
    """memory that the compile of one region may take"""
    dump: Path | None = None
    """a folder for each graph as text, and for graph.html, on which a person steps through the passes"""
    bisect: bool = False
    """run the graph after each pass on the first batch, and name the first pass and node whose numbers differ"""
    optimizer: bool = False
    """put the optimizer's step into the graph as well"""
    strict: bool = False
    """what a pass cannot do on this machine is an error, and not a note in the report"""
    artifact: Path | None = None
    """a folder that keeps the step, compiled, for the next start of the same job; it is code, so one that you trust"""

    def __post_init__(self) -> None:
        if self.optimizer and not self.enable:
            raise InputError("--compile.optimizer puts the optimizer's step into the graph; expected it without --no-compile")
        if self.bisect and not self.enable:
            raise InputError("--compile.bisect compares graphs after each pass; expected it without --no-compile")
        if not self.budget_seconds > 0:
            raise InputError(f"--compile.budget_seconds is {self.budget_seconds:g}; expected more than 0, such as 120")
        if parse_bytes(self.budget_memory) <= 0:
            raise InputError(f"--compile.budget_memory is {self.budget_memory!r}; expected more than 0 bytes, such as 4GiB")


@dataclass(frozen=True)
class TrainConfig:
    """A training job."""

    module: str = "llama3"
    """the model; a name that is not there is answered with those that are"""
    config: str = "debugmodel"
    """its flavour, likewise"""
    training: Training = field(default_factory=Training)
    optimizer: Optimizer = field(default_factory=Optimizer)
    parallelism: Parallelism = field(default_factory=Parallelism)
    activation_checkpoint: ActivationCheckpoint = field(default_factory=ActivationCheckpoint)
    compile: Compile = field(default_factory=Compile)
    losses: Path | None = None
    """a JSON file for the losses, exact, and the report"""
    check_for: int | None = None
    """only check all this, for a job of so many ranks; nothing is trained"""

    def __post_init__(self) -> None:
        if self.check_for is not None and self.check_for < 1:
            raise InputError(f"--check-for is {self.check_for}; expected the number of ranks, 1 or more")
        if self.activation_checkpoint.mode == "memory_budget" and not self.compile.enable:
            raise InputError(
                "--activation_checkpoint.mode is memory_budget, which is planned on a captured graph; expected it without "
                "--no-compile, or mode full or selective"
            )
        if self.compile.optimizer and self.training.gradient_accumulation_steps > 1:
            raise InputError(
                f"--training.gradient_accumulation_steps is {self.training.gradient_accumulation_steps}; with "
                "--compile.optimizer each run of the graph updates the parameters: expected 1, or leave --compile.optimizer out"
            )


_DESCRIPTION = "Train a model; its name and its config may stand in front: torchspan train llama3 debugmodel --training.steps 5"


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
            return tyro.cli(TrainConfig, args=spelled_out(argv), prog="torchspan train", description=_DESCRIPTION)
    except SystemExit as end:
        if not end.code:
            return None
        raise InputError(_one_line(shown.getvalue())) from None


def spelled_out(argv: Sequence[str]) -> list[str]:
    """`argv` with positions and short forms written as flags.

    >>> spelled_out(["llama3", "tiny", "--no-compile"])
    ['--module', 'llama3', '--config', 'tiny', '--compile.no-enable']
    """
    positions: list[str] = []
    rest = list(argv)
    while rest and not rest[0].startswith("-") and len(positions) < 2:
        positions.append(rest.pop(0))
    flags = [text for name, value in zip(("--module", "--config"), positions) for text in (name, value)]
    return [*flags, *("--compile.no-enable" if text in ("--no-compile", "--no_compile") else text for text in rest)]


def from_environment(environ: Mapping[str, str]) -> list[str]:
    """The flags that the variables ``MODULE`` (or ``MODEL``) and ``CONFIG`` stand for, to be put before those that are given.

    torchtitan's names for its compiler toolkit are understood: the prefixes ``compiler_toolkit.`` of a model and
    ``compiler_toolkit_<model>_`` of a config are dropped.

    >>> from_environment({"MODEL": "compiler_toolkit.llama3", "CONFIG": "compiler_toolkit_llama3_debugmodel"})
    ['--module', 'llama3', '--config', 'debugmodel']
    >>> from_environment({"CONFIG": "tiny"})
    ['--config', 'tiny']
    """
    module = (environ.get("MODULE") or environ.get("MODEL") or "").removeprefix("compiler_toolkit.")
    config = re.sub(r"^compiler_toolkit_(llama3|deepseek_v3)_", "", environ.get("CONFIG", ""))
    flags = [("--module", module), ("--config", config)]
    return [text for name, value in flags if value for text in (name, value)]


def _one_line(box: str) -> str:
    """What tyro's framed message says, as one line; the frame is drawn in ASCII where the terminal is."""
    lines = [line.strip("│|╭╮╰╯+ ") for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    is_border = [re.search(r"[─-]{4}", line) is not None for line in lines]
    first = is_border.index(True) + 1 if True in is_border else 0
    end = is_border.index(True, first) if True in is_border[first:] else len(lines)
    close = re.search(r"Perhaps you meant:\s*(--\S+)", "\n".join(lines))
    hint = f"; perhaps {close[1]}?" if close else ";"
    return f"{' '.join(line for line in lines[first:end] if line).rstrip('.')}{hint} 'torchspan train --help' lists them"
