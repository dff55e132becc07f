"""Tensor parallelism: a model's plan, as text, applied with DTensor's parallel styles; activations split along the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchspan.core.errors import InputError, unknown_name

_SEQUENCE = Shard(1)


class GatherSequence(ParallelStyle):
    """Gathers the first argument of a module, split along the sequence; the others are the same on every rank already."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            split = DTensor.from_local(args[0], device_mesh, (_SEQUENCE,), run_check=False)
            return (split.redistribute(placements=(Replicate(),)), *args[1:])

        module.register_forward_pre_hook(gather)
        return module


def _styles() -> dict[str, ParallelStyle]:
    """The DTensor style of each shard style that a model's plan may name (see ``torchspan.models._base.ShardStyle``)."""
    return {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=_SEQUENCE),
        "column": ColwiseParallel(),
        "row": RowwiseParallel(output_layouts=_SEQUENCE),
        "sequence": SequenceParallel(use_local_output=True),
        "gather_sequence": GatherSequence(),
        "logits": ColwiseParallel(input_layouts=_SEQUENCE, output_layouts=Replicate()),
    }


def apply_tensor_parallel(module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> nn.Module:
    """Shard the parameters of `module` over the one-dimensional `mesh`, in place, by `plan`.

    `plan` maps patterns of submodule names to shard styles. Parameters become DTensors on `mesh`; a style that is unknown and
    a pattern that nothing answers to are InputErrors.
    """
    styles = _styles()
    names = [name for name, _ in module.named_modules()]
    for pattern, style in plan.items():
        if style not in styles:
            raise unknown_name("shard style", style, styles, f"there are: {', '.join(styles)}")
        if not any(_answers(name, pattern) for name in names):
            raise InputError(f"no submodule answers to {pattern!r} of the tensor-parallel plan; did the model change?")
    # src_data_rank=None: every rank drew the same weights, none needs to be sent
    return parallelize_module(module, mesh, {pattern: styles[style] for pattern, style in plan.items()}, src_data_rank=None)


def _answers(name: str, pattern: str) -> bool:
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted))
