"""Check: every mistake in a job's configuration that can be told without its weights and without its other processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torchspan.core.errors import InputError
from torchspan.core.text import check_folder
from torchspan.models._base import ModelSpec, get_model
from torchspan.parallel.mesh import Degrees, check_sizes
from torchspan.passes._base import STAGES
from torchspan.passes._pipeline import Pipeline
from torchspan.train.config import Parallelism, TrainConfig, Training
from torchspan.train.data import VOCAB_SIZE


@dataclass(frozen=True)
class Plan:
    """What a configuration means: the model, its flavour by name, the degrees of parallelism, the passes."""

    spec: ModelSpec
    flavour: str
    degrees: Degrees
    pipeline: Pipeline

    def __str__(self) -> str:
        num_ranks, axes = self.degrees.world_size, self.degrees.axes()
        product = " × ".join(f"{name} {degree}" for name, degree in axes.items() if degree > 1)
        ranks = f"{num_ranks} ranks: {product}" if num_ranks > 1 else "1 rank"
        experts = f", ep {self.degrees.ep}" if self.degrees.ep > 1 else ""
        return f"{self.spec.name} {self.flavour} fits {ranks}{experts}; passes: {str(self.pipeline) or 'none'}"


def check(config: TrainConfig, world_size: int) -> Plan:
    """The plan of a job of `world_size` processes; InputError for what cannot be used in it.

    It imports torch, and builds neither weights nor a process group.

    >>> check(TrainConfig(config="tiny"), world_size=2).degrees.dp_shard
    2
    >>> check(TrainConfig(config="tiny", parallelism=Parallelism(tensor_parallel_degree=4)), world_size=4)
    Traceback (most recent call last):
    torchspan.core.errors.InputError: num_kv_heads is 2, which tp 4 does not divide; expected a multiple of 4
    """
    pipeline = _pipeline(config)
    spec = get_model(config.module)
    spec.flavour(config.config)
    degrees = degrees_of(config.parallelism, world_size)
    _check_model(spec, config, degrees)
    if config.compile.capture == "joint" and config.parallelism.reshard_after_forward == "always":
        raise InputError(
            "--parallelism.reshard_after_forward is always; a joint graph keeps gathered parameters: expected "
            "--compile.capture train_step"
        )
    _check_batch(config.training, degrees.dp_replicate * degrees.dp_shard)
    _check_files(config)
    return Plan(spec, config.config, degrees, pipeline)


def degrees_of(parallelism: Parallelism, world_size: int) -> Degrees:
    """The degrees of a job of `world_size` processes.

    >>> degrees_of(Parallelism(tensor_parallel_degree=2), 8).dp_shard
    4
    >>> degrees_of(Parallelism(data_parallel_shard_degree=2), 1)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.InputError: dp_shard 2 × tp 1 are 2 processes, this job has 1; set the degrees so that ...
    """
    replicate, shard = parallelism.data_parallel_replicate_degree, parallelism.data_parallel_shard_degree
    others = replicate * parallelism.tensor_parallel_degree
    if shard == -1:
        shard = max(1, world_size // others)
    degrees = Degrees(
        dp_replicate=replicate,
        dp_shard=shard,
        tp=parallelism.tensor_parallel_degree,
        ep=parallelism.expert_parallel_degree,
    )
    degrees.check(world_size)
    return degrees


def _pipeline(config: TrainConfig) -> Pipeline:
    """The passes of both options, in their order, and the one for activation checkpointing where its stage begins."""
    texts = (config.compile.joint_passes, config.compile.passes)
    passes = [pass_ for text in texts for pass_ in Pipeline.parse(text).passes]
    (*checkpointing,) = Pipeline.parse(config.activation_checkpoint.as_pass()).passes if config.compile.enable else ()
    if checkpointing and any(pass_.name == checkpointing[0].name for pass_ in passes):
        raise InputError(
            f"--activation_checkpoint.mode is {config.activation_checkpoint.mode}, and --compile.passes has "
            f"{checkpointing[0].name}: the same in two ways; expected one of them"
        )
    later = STAGES[STAGES.index("memory") :]
    place = next((index for index, pass_ in enumerate(passes) if pass_.stage in later), len(passes))
    return Pipeline((*passes[:place], *checkpointing, *passes[place:]))


def _check_model(spec: ModelSpec, config: TrainConfig, degrees: Degrees) -> None:
    """Raise InputError unless the model takes the tokens, and the degrees divide its sizes."""
    flavour, seq_len, called = spec.flavour(config.config), config.training.seq_len, f"{spec.name} {config.config}"
    if flavour.vocab_size < VOCAB_SIZE:
        raise InputError(f"{called} has {flavour.vocab_size} tokens; bytes need {VOCAB_SIZE}; choose a config that has them")
    if seq_len > flavour.max_seq_len:
        raise InputError(f"--training.seq_len is {seq_len}; {called} takes at most {flavour.max_seq_len}")
    if degrees.tp > 1 and not spec.tensor_parallel:
        raise InputError(f"--parallelism.tensor_parallel_degree is {degrees.tp}; {spec.name} cannot be split so: expected 1")
    check_sizes({name: getattr(flavour, name) for name in spec.sizes}, degrees.tp)
    check_sizes({"--training.seq_len": seq_len}, degrees.tp)
    num_experts = getattr(flavour, "num_experts", 0)
    is_run_again = config.activation_checkpoint.mode != "none" and not config.compile.enable
    if is_run_again and num_experts and flavour.balance_rate:
        raise InputError(
            f"--activation_checkpoint.mode is {config.activation_checkpoint.mode}; run eagerly, it would count the tokens of "
            f"{called}'s experts twice: expected none, or leave --no-compile out"
        )
    if degrees.ep > 1 and not num_experts:
        raise InputError(f"--parallelism.expert_parallel_degree is {degrees.ep}; {called} has no experts: expected 1")
    check_sizes({"num_experts": num_experts}, degrees.ep, "ep")


def _check_batch(training: Training, num_data_parallel: int) -> None:
    """Raise InputError unless every rank gets as many sequences in each micro-batch."""
    parts = num_data_parallel * training.gradient_accumulation_steps
    if training.global_batch_size % parts:
        several = training.gradient_accumulation_steps
        each = f" with {several} micro-batches each" if several > 1 else ""
        raise InputError(
            f"--training.global_batch_size is {training.global_batch_size}, which {num_data_parallel} data-parallel ranks"
            f"{each} do not divide; expected a multiple of {parts}"
        )


def _check_files(config: TrainConfig) -> None:
    """Raise InputError for a dataset that cannot be opened or is too short, and for results that cannot be written."""
    if config.training.dataset is not None:
        _check_dataset(config.training.dataset, config.training.seq_len)
    if config.losses is not None:
        check_folder(config.losses)
    for name in ("dump", "artifact"):
        folder = getattr(config.compile, name)
        if folder is not None and folder.exists() and not folder.is_dir():
            raise InputError(f"--compile.{name} is the file {str(folder)!r}; expected a folder, which may not exist yet")


def _check_dataset(path: Path, seq_len: int) -> None:
    """Raise InputError unless a text is there and long enough; its tokens are its bytes."""
    try:
        with path.open("rb"):
            num_tokens = path.stat().st_size
    except OSError as cause:
        raise InputError(f"cannot read the dataset {path}: {cause}; expected a text file in UTF-8") from cause
    if num_tokens <= seq_len:
        raise InputError(
            f"the dataset {path} has {num_tokens} tokens, a sequence needs {seq_len + 1}; give more text or a smaller "
            "--training.seq_len"
        )
