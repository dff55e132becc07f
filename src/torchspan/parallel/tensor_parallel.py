"""Tensor parallelism: a model's plan, as text, applied with DTensor's parallel styles; activations split along the sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from torchspan.core.errors import InputError, unknown_name
from torchspan.parallel._collectives import all_gather, reduce_scatter
from torchspan.parallel.plan import modules_of

_SEQUENCE = Shard(1)


class GatherSequence(ParallelStyle):
    """Gathers the first argument of a module, split along the sequence; the others are the same on every rank already."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def gather(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            split = DTensor.from_local(args[0], device_mesh, (_SEQUENCE,), run_check=False)
            return (split.redistribute(placements=(Replicate(),)), *args[1:])

        module.register_forward_pre_hook(gather)
        return module


class EmbeddingRows(ParallelStyle):
    """Gives each rank its rows of an embedding's table; the result is split along the sequence.

    Not DTensor's own, whose masks two models of one process share on torch 2.8: the second one's step is an error there.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, nn.Embedding), f"the style is for an embedding, not for a {type(module).__name__}"
        if module.padding_idx is not None or module.max_norm is not None or module.sparse:
            raise InputError(f"{module} cannot be shared by its rows; expected no padding_idx, no max_norm and not sparse")
        rows = module.weight.detach().chunk(device_mesh.size())[device_mesh.get_local_rank()].clone()
        weight = DTensor.from_local(rows, device_mesh, (Shard(0),), run_check=False)
        module.register_parameter("weight", nn.Parameter(weight, requires_grad=module.weight.requires_grad))
        module.__class__ = type(type(module).__name__, (_RowsOfEmbedding, type(module)), {"_mesh": device_mesh})
        return module


class _RowsOfEmbedding(nn.Embedding):
    _mesh: DeviceMesh

    def forward(self, tokens_BS: Tensor) -> Tensor:
        weight: Any = self.weight
        rows_RD = weight.to_local()
        local_BS = tokens_BS - self._mesh.get_local_rank() * rows_RD.shape[0]
        is_here_BS = (local_BS >= 0) & (local_BS < rows_RD.shape[0])
        x_BSD = F.embedding(local_BS.masked_fill(~is_here_BS, 0), rows_RD).masked_fill(~is_here_BS.unsqueeze(-1), 0)
        split: Tensor = _SumAndSplit.apply(x_BSD, self._mesh)
        return split


class _SumAndSplit(torch.autograd.Function):
    """Sum over the ranks of a mesh, of which each keeps its part of the sequence."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, mesh: DeviceMesh) -> Tensor:
        ctx.mesh = mesh
        parts = x_BSD.unflatten(1, (mesh.size(), -1)).transpose(0, 1)  # of all ranks, first
        return reduce_scatter(parts.flatten(0, 1), mesh)

    @staticmethod
    def backward(ctx: Any, gradient_BSD: Tensor) -> tuple[Tensor, None]:
        parts = all_gather(gradient_BSD, ctx.mesh).unflatten(0, (ctx.mesh.size(), -1))
        return parts.transpose(0, 1).flatten(1, 2), None


class Replicated(ParallelStyle):
    """Every rank computes the same: parameters and input are on every rank, and so is the result, a DTensor."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            copied = DTensor.from_local(parameter.detach(), device_mesh, (Replicate(),), run_check=False)
            module.register_parameter(name, nn.Parameter(copied, requires_grad=parameter.requires_grad))
        return module


class ToLocal(ParallelStyle):
    """Makes the first argument, where it is a DTensor that is on every rank, a tensor that each rank uses for its own heads.

    The gradients that the ranks give it are added up.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def to_local(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            x = args[0].to_local(grad_placements=(Partial(),)) if isinstance(args[0], DTensor) else args[0]
            return (x, *args[1:])

        module.register_forward_pre_hook(to_local)
        return module


def _styles() -> dict[str, ParallelStyle]:
    """The DTensor style of each shard style that a model's plan may name (see ``torchspan.models._base.ShardStyle``)."""
    return {
        "embedding": EmbeddingRows(),
        "column": ColwiseParallel(),
        "row": RowwiseParallel(output_layouts=_SEQUENCE),
        "sequence": SequenceParallel(use_local_output=True),
        "tokens": SequenceParallel(sequence_dim=0, use_local_output=True),
        "replicate": Replicated(),
        "to_local": ToLocal(),
        "gather_sequence": GatherSequence(),
        "logits": ColwiseParallel(input_layouts=_SEQUENCE, output_layouts=Replicate()),
    }


def apply_tensor_parallel(module: nn.Module, mesh: DeviceMesh, plan: Mapping[str, str]) -> nn.Module:
    """Shard the parameters of `module` over the one-dimensional `mesh`, in place, by `plan`.

    `plan` maps patterns of submodule names to shard styles. Parameters become DTensors on `mesh`; a style that is unknown and
    a pattern that nothing answers to are InputErrors.
    """
    styles = _styles()
    frozen = [(m, name) for m in module.modules() for name, p in m._parameters.items() if p is not None and not p.requires_grad]
    for pattern, style in plan.items():
        if style not in styles:
            raise unknown_name("shard style", style, styles, f"there are: {', '.join(styles)}")
        for submodule in modules_of(module, pattern, "tensor-parallel"):
            # src_data_rank=None: every rank drew the same weights, none needs to be sent
            parallelize_module(submodule, mesh, styles[style], src_data_rank=None)
    for submodule, name in frozen:  # some of torch's styles forget it
        submodule.get_parameter(name).requires_grad_(False)
    return module
