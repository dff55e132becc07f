"""Pipelines: the action ``REDUCE_GRAD``, ``PipelineStage(get_mesh=)`` and block masks cut into microbatches."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from torchspan.backports._base import Backport, Change

_PLACE = "torch.distributed.pipelining.schedules"
_KIND = "_ComputationType"
_NAME = "REDUCE_GRAD"
_VALUE = 12


@functools.cache
def _reduce_grad() -> Any:
    """The member ``REDUCE_GRAD`` of torch's ``_ComputationType``: torch's own, or one like it."""
    import torch.distributed.pipelining.schedules as schedules

    kinds = schedules._ComputationType
    if _NAME in kinds.__members__:
        return kinds[_NAME]
    member: Any = object.__new__(kinds)
    member._name_, member._value_, member._sort_order_, member.__objclass__ = _NAME, _VALUE, len(kinds), kinds
    return member


def _shown(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return functools.wraps(show)(lambda kind: _NAME if kind is _reduce_grad() else show(kind))


def _read(read: Any) -> Any:
    return staticmethod(functools.wraps(read.__func__)(lambda text: _reduce_grad() if text == _NAME else read.__func__(text)))


def _reading_actions(pattern: re.Pattern[str]) -> re.Pattern[str]:
    """The pattern of a whole action, such as ``0REDUCE_GRAD``."""
    return pattern if _NAME in pattern.pattern else re.compile(pattern.pattern.replace("|UNSHARD|", f"|{_NAME}|UNSHARD|"))


def _split_block_mask(block_mask: Any, num_chunks: int) -> list[Any]:
    """A block mask cut along the batch, each part with a `mask_mod` that knows where in the batch it is.

    Raises AssertionError if there are fewer batches than parts; a mask for all batches is every part's.
    """
    from torch.nn.attention.flex_attention import BlockMask

    num_batches = block_mask.kv_num_blocks.size(0)
    if num_batches == 1:
        return [block_mask] * num_chunks
    if num_batches < num_chunks:
        raise AssertionError(f"Block mask has fewer batch size than the number of chunks: {num_batches} and {num_chunks}")
    names = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    masks, begin = [], 0
    for index in torch.arange(num_batches).tensor_split(num_chunks):
        part = slice(begin, begin + len(index))
        tensors = {name: tensor[part] for name in names if (tensor := getattr(block_mask, name)) is not None}
        mask_mod = _from_batch(block_mask.mask_mod, begin)
        masks.append(
            BlockMask.from_kv_blocks(
                **tensors, BLOCK_SIZE=block_mask.BLOCK_SIZE, mask_mod=mask_mod, seq_lengths=block_mask.seq_lengths
            )
        )
        begin += len(index)
    return masks


def _from_batch(mask_mod: Callable[..., Any], begin: int) -> Callable[..., Any]:
    def from_batch(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return mask_mod(b + torch.full_like(b, begin), h, q_idx, kv_idx)

    return from_batch


def _taking_mesh(init: Callable[..., None]) -> Callable[..., None]:
    """PipelineStage's constructor: `get_mesh` is asked for the meshes of DTensors that stages send to each other."""

    @functools.wraps(init)
    def construct(self: Any, *args: Any, get_mesh: Any = None, **options: Any) -> None:
        init(self, *args, **options)
        if get_mesh is not None:
            BACKPORT.record_use("PipelineStage(get_mesh=…): this torch's stages send plain tensors, which need no mesh")

    return construct


def _if_lacking_mesh(init: Callable[..., None]) -> Callable[..., None]:
    import inspect

    return init if "get_mesh" in inspect.signature(init).parameters else _taking_mesh(init)


BACKPORT = Backport(
    name="pipeline_reduce_grad",
    summary="pipelines: the action REDUCE_GRAD, PipelineStage(get_mesh=…), block masks cut into microbatches",
    target=_PLACE,
    since="2.10.0",
    first_forms={"2.10, 2.11": "PipelineStage takes no get_mesh"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/pipelining/schedules.py",
    differs=(
        "schedules put no REDUCE_GRAD in: gradients are reduced with a stage's last backward; stages send no DTensors, so "
        "get_mesh is not asked"
    ),
    names={"REDUCE_GRAD": _reduce_grad},
    elsewhere={"torch.distributed.pipelining.microbatch": {"_split_block_mask": lambda: _split_block_mask}},
    also=(
        Change("torch.distributed.pipelining.schedules", "_ComputationType.__str__", _shown),
        Change("torch.distributed.pipelining.schedules", "_ComputationType.from_str", _read),
        Change("torch.distributed.pipelining.schedules", "_action_regex", _reading_actions),
        Change(
            "torch.distributed.pipelining.schedules",
            "_ComputationType.REDUCE_GRAD",
            lambda old: old or _reduce_grad(),
            create=True,
        ),
        Change("torch.distributed.pipelining.stage", "PipelineStage.__init__", _if_lacking_mesh, always=True),
    ),
)
