"""Tensors in safetensors files: shards as torch.distributed.checkpoint saves them, and how they are made whole."""

from __future__ import annotations

import json
import math
import struct
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from torchspan.core.report import log

SUFFIX = ".safetensors"
INDEX_FILE = "model.safetensors.index.json"
METADATA = "__metadata__"
SHARDING = "DCP_SHARDING_INFO"  # the entry of a file's metadata that says where each of its shards belongs
_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Shard:
    """A box of a tensor: `num_bytes` from `start` of the file `path`, which belong at `offsets` of the whole."""

    path: Path
    start: int
    num_bytes: int
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Whole:
    """A tensor of which all shards are known; `itemsize` is in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    itemsize: int
    shards: tuple[Shard, ...]

    @property
    def num_bytes(self) -> int:
        """The bytes that it takes."""
        return math.prod(self.shape) * self.itemsize


def read_header(stream: IO[bytes]) -> tuple[dict[str, Any], int]:
    """A safetensors file's header, and where its data begins; ValueError where it has none."""
    length = stream.read(_LENGTH.size)
    text = stream.read(*_LENGTH.unpack(length)) if len(length) == _LENGTH.size else b""
    try:
        header = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{getattr(stream, 'name', stream)} is no safetensors file: {error}") from error
    return header, _LENGTH.size + len(text)


def sharding_of(header: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """The offsets, by name, of the shards in a file with this header; None if it was saved without them."""
    text = header.get(METADATA, {}).get(SHARDING)
    return text and {name: tuple(place["saved_offsets"]) for name, place in json.loads(text).items()}


def consolidate(input_dir: str, output_dir: str, indices: Mapping[str, int], num_threads: int) -> None:
    """Write the tensors whole to files, each to that of its index, and the index file that says which is where."""
    begin = time.monotonic()
    names = file_names(indices)
    sizes = write_files(input_dir, output_dir, names, num_threads)
    write_index(output_dir, names, sizes)
    log.info("consolidated %d tensors of %s in %.1f s", len(sizes), input_dir, time.monotonic() - begin)


def file_names(indices: Mapping[str, int]) -> dict[str, str]:
    """For each tensor, the file that the index (from 1) means.

    >>> file_names({"embed": 1, "head": 2})
    {'embed': 'model-00001-of-00002.safetensors', 'head': 'model-00002-of-00002.safetensors'}
    """
    highest = max(indices.values(), default=0)
    return {name: f"model-{index:05}-of-{highest:05}{SUFFIX}" for name, index in indices.items()}


def write_files(input_dir: str, output_dir: str, file_names: Mapping[str, str], num_threads: int) -> dict[str, int]:
    """Write the tensors that `file_names` names to its files, whole; returns each one's size in bytes.

    `num_threads` tensors are worked on at a time, each held in memory while it is.
    """
    shards = _find_shards(Path(input_dir))
    missing = [name for name in file_names if name not in shards]
    if missing:
        raise ValueError(f"no safetensors file in {input_dir} has {', '.join(missing)}; the mapping names them")
    files: dict[str, list[Whole]] = {}
    for name, file_name in file_names.items():
        files.setdefault(file_name, []).append(_whole(name, shards[name]))
    tasks = [task for file_name, tensors in files.items() for task in _begin_file(Path(output_dir, file_name), tensors)]
    _run(tasks, num_threads)
    return {tensor.name: tensor.num_bytes for tensors in files.values() for tensor in tensors}


def write_index(output_dir: str, file_names: Mapping[str, str], sizes: Mapping[str, int]) -> None:
    """Write the file that says in which file each tensor is, as Hugging Face's libraries read it."""
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(file_names)}
    Path(output_dir, INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _find_shards(folder: Path) -> dict[str, list[Shard]]:
    shards: dict[str, list[Shard]] = {}
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        with path.open("rb") as stream:
            header, data_start = read_header(stream)
        offsets = sharding_of(header)
        if offsets is None:
            raise ValueError(f"{path} has no DCP metadata: only what torch.distributed.checkpoint saved can be consolidated")
        for name, entry in header.items():
            if name != METADATA:
                begin, end = entry["data_offsets"]
                shard = Shard(path, data_start + begin, end - begin, entry["dtype"], tuple(entry["shape"]), offsets[name])
                shards.setdefault(name, []).append(shard)
    return shards


def _whole(name: str, shards: Iterable[Shard]) -> Whole:
    """The tensor that the shards make up; ValueError where they leave a hole."""
    shards = tuple(shards)
    ends = ([offset + size for offset, size in zip(s.offsets, s.shape, strict=True)] for s in shards)
    shape = tuple(max(sizes) for sizes in zip(*ends, strict=True))
    num_present, num_all = sum(math.prod(s.shape) for s in shards), math.prod(shape)
    if num_present < num_all:
        raise ValueError(f"the shards of {name} have {num_present} of the {num_all} elements of shape {list(shape)}")
    itemsizes = {s.num_bytes / math.prod(s.shape) for s in shards if s.num_bytes}
    if len({s.dtype for s in shards}) != 1 or len(itemsizes) > 1 or any(size % 1 for size in itemsizes):
        raise ValueError(f"the shards of {name} have dtypes {sorted({s.dtype for s in shards})}, not one of whole bytes")
    return Whole(name, shards[0].dtype, shape, int(itemsizes.pop()) if itemsizes else 1, shards)


def _begin_file(path: Path, tensors: list[Whole]) -> list[Callable[[], None]]:
    """Write the header of the file, make it as long as it will be, and return what writes each tensor."""
    entries: dict[str, Any] = {METADATA: {"format": "pt"}}
    begins: list[tuple[Whole, int]] = []
    end = 0
    for tensor in sorted(tensors, key=lambda tensor: -tensor.itemsize):  # each is aligned then, which readers rely on
        begins.append((tensor, end))
        end += tensor.num_bytes
        offsets = [end - tensor.num_bytes, end]
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": offsets}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as stream:
        stream.write(_LENGTH.pack(len(header)) + header)
        data_start = stream.tell()
        stream.truncate(data_start + end)
    return [partial(_write_tensor, path, data_start + begin, tensor) for tensor, begin in begins if tensor.num_bytes]


def _write_tensor(path: Path, position: int, tensor: Whole) -> None:
    data = _assemble(tensor)
    with path.open("r+b") as stream:
        stream.seek(position)
        stream.write(data)


def _assemble(tensor: Whole) -> bytearray:
    """The bytes of the whole tensor, in row-major order."""
    data = bytearray(tensor.num_bytes)
    bytes_of = torch.frombuffer(data, dtype=torch.uint8).view(*tensor.shape, tensor.itemsize)
    for shard in tensor.shards:
        if shard.num_bytes:
            box = tuple(slice(offset, offset + size) for offset, size in zip(shard.offsets, shard.shape, strict=True))
            _read_into(data, bytes_of[box], shard)
    return data


def _read_into(data: bytearray, place: Tensor, shard: Shard) -> None:
    """Read the shard to `place`, which is part of `data`; without a copy in between where it lies in one piece."""
    whole = place.is_contiguous()
    begin = place.storage_offset() if whole else 0
    buffer = data if whole else bytearray(shard.num_bytes)
    with shard.path.open("rb") as stream:
        stream.seek(shard.start)
        num_read = stream.readinto(memoryview(buffer)[begin : begin + shard.num_bytes])
    if num_read != shard.num_bytes:
        raise ValueError(f"{shard.path} ends early: {num_read} of {shard.num_bytes} bytes from {shard.start}")
    if not whole:
        place.copy_(torch.frombuffer(buffer, dtype=torch.uint8).view(place.shape))


def _run(tasks: list[Callable[[], None]], num_threads: int) -> None:
    if num_threads <= 1:
        for task in tasks:
            task()
        return
    with ThreadPoolExecutor(num_threads, "safetensors") as pool:
        for _ in pool.map(lambda task: task(), tasks):  # the first that fails ends it, with its error
            continue


def read_data(reader: Any, plan: Any, read_item: Callable[[Any, Any], None]) -> torch.futures.Future[None]:
    """What a storage reader's ``read_data`` does, with a thread for each file, `thread_count` at a time.

    `read_item` is called for each item of the plan, with the open file that it is in.
    """
    from safetensors import safe_open

    per_file: dict[str, list[Any]] = {}
    for item in plan.items:
        per_file.setdefault(reader.storage_data[item.storage_index].relative_path, []).append(item)

    def read_file(name: str) -> None:
        with safe_open(name, framework="pt") as file:
            for item in per_file[name]:
                read_item(file, item)

    _run([partial(read_file, name) for name in per_file], getattr(reader, "thread_count", 1))
    done: torch.futures.Future[None] = torch.futures.Future()
    done.set_result(None)
    return done


def read_box(file: Any, name: str, offsets: Iterable[int], lengths: Iterable[int]) -> Tensor:
    """The part of a tensor at `offsets`, of shape `lengths`, from an open file."""
    box = tuple(slice(offset, offset + length) for offset, length in zip(offsets, lengths, strict=True))
    tensor: Tensor = file.get_slice(name)[box] if box else file.get_tensor(name)
    return tensor


def give(planner: Any, item: Any, tensor: Tensor) -> None:
    """Copy what was read for an item of a load plan to where the planner wants it."""
    target = planner.resolve_tensor(item).detach()
    if target.size() != tensor.size():
        raise AssertionError(f"{item.storage_index} is {tuple(tensor.size())} in the file, {tuple(target.size())} is wanted")
    target.copy_(tensor)
    planner.commit_tensor(item, target)
