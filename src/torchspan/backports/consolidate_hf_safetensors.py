"""``torch.distributed.checkpoint._consolidate_hf_safetensors``: sharded safetensors files become whole ones."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from torchspan.backports import _safetensors
from torchspan.backports._base import Backport

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_PLACE = "torch.distributed.checkpoint._consolidate_hf_safetensors"


def consolidate_safetensors_files(
    input_dir: str, output_dir: str, fqn_to_index_mapping: dict[str, int], num_threads: int = 1
) -> None:
    """Make whole tensors of the shards in the safetensors files of a folder, and write them to files of another.

    Args:
        input_dir: where the shards are, as ``HuggingFaceStorageWriter(save_distributed=True)`` saves them.
        output_dir: a folder that is there; it gets the files and ``model.safetensors.index.json``.
        fqn_to_index_mapping: for each tensor to write, the number (from 1) of its file.
        num_threads: how many tensors to work on at a time; each is in memory while it is.

    Raises:
        ValueError: a tensor of the mapping is not there or incomplete, or a file is not one that DCP saved.
    """
    _safetensors.consolidate(input_dir, output_dir, fqn_to_index_mapping, num_threads)


def consolidate_safetensors_files_on_every_rank(
    input_dir: str,
    output_dir: str,
    fqn_to_index_mapping: dict[str, int],
    num_threads: int = 1,
    process_group: ProcessGroup | None = None,
) -> None:
    """Do what `consolidate_safetensors_files` does with all ranks, each of which writes its share of the files.

    Every rank of the group calls it, and it returns when everything is written. File n is the work of rank n modulo their
    number; without a process group one process does it all.

    Args:
        input_dir: where the shards are; every rank can read them.
        output_dir: a folder that is there, the same one for every rank.
        fqn_to_index_mapping: for each tensor to write, the number (from 1) of its file.
        num_threads: how many tensors each rank works on at a time.
        process_group: the ranks that do it; the default group if None.

    Raises:
        ValueError: as `consolidate_safetensors_files`, on the rank where it happens.
        RuntimeError: it failed on another rank.
    """
    rank, num_ranks = _rank_and_size(process_group)
    file_names = _safetensors.file_names(fqn_to_index_mapping)
    own_files = {name: file_names[name] for name, index in fqn_to_index_mapping.items() if index % num_ranks == rank}
    parts = _on_every_rank(lambda: _safetensors.write_files(input_dir, output_dir, own_files, num_threads), process_group)
    sizes = {name: size for part in parts for name, size in part.items()}
    _on_every_rank(lambda: None if rank else _safetensors.write_index(output_dir, file_names, sizes), process_group)


def _rank_and_size(process_group: ProcessGroup | None) -> tuple[int, int]:
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def _on_every_rank(work: Callable[[], T], process_group: ProcessGroup | None) -> list[T]:
    """What `work` returns on each rank, once all are done; where it fails on one, it fails on all of them."""
    import torch.distributed as dist

    rank, num_ranks = _rank_and_size(process_group)
    if not dist.is_available() or not dist.is_initialized():
        return [work()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except (OSError, ValueError) as error:  # raised below: the other ranks wait for what this one has to say
        failure = error
    outcomes: list[Any] = [None] * num_ranks
    dist.all_gather_object(outcomes, (result, failure and repr(failure)), group=process_group)
    if failure is not None:
        raise failure
    for other, (_, cause) in enumerate(outcomes):
        if cause is not None:
            raise RuntimeError(f"consolidating failed on rank {other}, this is rank {rank}: {cause}")
    return [result for result, _ in outcomes]


def _write_sub_tensor_to_file_optimized(
    full_tensor_mv: memoryview,
    sub_tensor_bytes: bytes,
    element_size: int,
    tensor_shape: list[int],
    sub_tensor_offsets: list[int],
    sub_tensor_shape: list[int],
) -> None:
    """Write part of a tensor to its place in the bytes of the whole, as many at a time as lie side by side in both.

    Args:
        full_tensor_mv: the bytes of the whole tensor, which are written to.
        sub_tensor_bytes: those of the part.
        element_size: bytes of one element.
        tensor_shape: of the whole.
        sub_tensor_offsets: where in it the part begins.
        sub_tensor_shape: of the part.
    """
    if not tensor_shape or 0 in sub_tensor_shape:
        return
    inner = len(tensor_shape) - 1  # from this dimension on the part is as wide as the whole, or it is the last
    while inner > 0 and sub_tensor_shape[inner] == tensor_shape[inner]:
        inner -= 1
    length = math.prod(sub_tensor_shape[inner:]) * element_size
    strides = [math.prod(tensor_shape[dim + 1 :]) * element_size for dim in range(len(tensor_shape))]
    start = sum(offset * stride for offset, stride in zip(sub_tensor_offsets, strides))
    outer = itertools.product(*(range(0, size * stride, stride) for size, stride in zip(sub_tensor_shape[:inner], strides)))
    for number, places in enumerate(outer):
        at = start + sum(places)
        full_tensor_mv[at : at + length] = sub_tensor_bytes[number * length : (number + 1) * length]


class _WithShimsSpelling(Backport):
    """The module also answers to the name that torchtitan's own shim of it has; torch has never had that."""

    def _build_module(self, module: str = "") -> Mapping[str, object]:
        return {**super()._build_module(module), "consolidate_safetensor_files": consolidate_safetensors_files}


for _public in (consolidate_safetensors_files, consolidate_safetensors_files_on_every_rank):
    _public.__module__ = _PLACE

BACKPORT = _WithShimsSpelling(
    name="consolidate_hf_safetensors",
    summary="sharded safetensors files consolidated, by one process or by every rank",
    target=_PLACE,
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/159393",
    differs=(
        "scalars and integer tensors are consolidated too; what is missing or incomplete is an error, not zeros; an error on "
        "one rank is one on all; threads work on tensors, not on files; files say that they are for torch; the index is "
        "written without a process group too; consolidate_safetensor_files, torchtitan's spelling, is the same function"
    ),
    is_module=True,
    names={
        "consolidate_safetensors_files": lambda: consolidate_safetensors_files,
        "_write_sub_tensor_to_file_optimized": lambda: _write_sub_tensor_to_file_optimized,
        "consolidate_safetensors_files_on_every_rank": lambda: consolidate_safetensors_files_on_every_rank,
    },
)
