"""``torch.distributed.checkpoint.quantized_hf_storage``: a reader that gives quantized safetensors as plain tensors."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchspan.backports import _safetensors
from torchspan.backports._base import Backport
from torchspan.environment.patch import MissingName, Patch, Replacement

_PLACE = "torch.distributed.checkpoint.quantized_hf_storage"
_NAME = "QuantizedHuggingFaceStorageReader"
_OF_FIRST = "_calculate_scale_shape"  # what torch 2.9's reader has, and no later one
_ADDED = "_get_slice_to_block_mapping"  # what torch 2.10's has, which knows where in a block a shard begins
_BLOCKS, _SCALES = "_blocks", "_scales"  # MXFP4, as in gpt-oss
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)

if TYPE_CHECKING:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader


def scale_names(names: Iterable[str]) -> dict[str, str]:
    """For each quantized tensor, the name of its scales.

    >>> scale_names(["w.weight", "w.weight_scale_inv", "b_blocks", "b_scales", "norm.weight"])
    {'w.weight': 'w.weight_scale_inv', 'b_blocks': 'b_scales'}
    """
    names = dict.fromkeys(names)
    scales = {}
    for name in names:
        scale = name.removesuffix(_BLOCKS) + _SCALES if name.endswith(_BLOCKS) else f"{name}_scale_inv"
        if scale in names and name.endswith((".weight", _BLOCKS)):
            scales[name] = scale
    return scales


def scale_blocks(weight: Tensor, scale: Tensor, offsets: tuple[int, int], block_size: int, dtype: torch.dtype) -> Tensor:
    """Multiply each element with the scale of its block.

    Args:
        weight: a part ``(rows, columns)`` of a quantized weight.
        scale: all its scales, one for each block of ``(block_size, block_size)``.
        offsets: where in the weight the part begins.
        block_size: rows and columns of a block.
        dtype: what the result is in.
    """
    of_rows, of_columns = (
        torch.arange(offset, offset + size) // block_size for offset, size in zip(offsets, weight.shape, strict=True)
    )
    return (weight.to(torch.float32) * scale[of_rows][:, of_columns]).to(dtype)


def unpack_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Unpack 4-bit floats, ``(..., groups, bytes)`` with exponents ``(..., groups)``, to ``(..., groups * bytes * 2)``."""
    values = torch.tensor(_FP4)
    pairs = torch.stack([values[(blocks & 0x0F).long()], values[(blocks >> 4).long()]], dim=-1)
    scaled = torch.ldexp(pairs.flatten(-2), scales.to(torch.int32).unsqueeze(-1) - 127)
    return scaled.flatten(-2).to(dtype)


@functools.cache
def _reader() -> type[HuggingFaceStorageReader]:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

    class QuantizedHuggingFaceStorageReader(HuggingFaceStorageReader):
        """Reads a folder of whole tensors in safetensors files, and dequantizes those that have scales.

        Args:
            path: the folder; its ``model.safetensors.index.json`` says where each tensor is.
            thread_count: how many files to read at a time.
            target_dtype: what dequantized tensors are in.
            block_size: rows and columns that share a ``weight_scale_inv``.
        """

        _is_torchspans = True

        def __init__(
            self, path: str, thread_count: int = 1, target_dtype: torch.dtype = torch.float32, block_size: int = 128
        ) -> None:
            super().__init__(path)
            self.thread_count = thread_count
            self.target_dtype = target_dtype
            self.block_size = block_size
            self._files: dict[str, str] = {}
            self._scales: dict[str, str] = {}

        def read_metadata(self) -> Any:
            metadata = super().read_metadata()
            index = json.loads(Path(self.path, _safetensors.INDEX_FILE).read_text(encoding="utf-8"))
            self._files = index.get("weight_map", {})
            self._scales = scale_names(self._files)
            for name in self._scales:
                if name.endswith(_BLOCKS) and name in metadata.state_dict_metadata:
                    entry: Any = metadata.state_dict_metadata[name]
                    *prefix, num_groups, num_bytes = entry.size
                    entry.size = torch.Size([*prefix, num_groups * num_bytes * 2])
                    start = torch.Size([0] * len(entry.size))
                    entry.chunks = [ChunkStorageMetadata(offsets=start, sizes=entry.size)]
                    stored = metadata.storage_data.pop(MetadataIndex(name, [0] * (len(start) + 1)))
                    metadata.storage_data[MetadataIndex(name, start)] = stored
            return metadata

        def read_data(self, plan: Any, planner: Any) -> Any:
            return _safetensors.read_data(self, plan, functools.partial(self._read_item, planner))

        def _read_item(self, planner: Any, file: Any, item: Any) -> None:
            name, offsets, lengths = item.storage_index.fqn, item.storage_offsets, item.lengths
            if name not in self._scales:
                tensor = _safetensors.read_box(file, name, offsets, lengths)
            elif name.endswith(_BLOCKS):
                tensor = self._read_blocks(file, name, offsets, lengths)
            elif len(offsets) == 2:
                weight = _safetensors.read_box(file, name, offsets, lengths)
                tensor = scale_blocks(weight, self._read_scales(name), tuple(offsets), self.block_size, self.target_dtype)
            else:
                raise ValueError(f"{name} has block scales and {len(offsets)} dimensions; expected 2")
            _safetensors.give(planner, item, tensor)

        def _read_blocks(self, file: Any, name: str, offsets: Any, lengths: Any) -> Tensor:
            """The groups that the values asked for are in, unpacked, and of them those values."""
            *prefix, begin = offsets
            *sizes, length = lengths
            quantized = file.get_slice(name)
            num_bytes = quantized.get_shape()[-1]
            first, last = begin // (2 * num_bytes), -(-(begin + length) // (2 * num_bytes))
            box = [slice(offset, offset + size) for offset, size in zip(prefix, sizes, strict=True)] + [slice(first, last)]
            values = unpack_mxfp4(quantized[(*box, slice(None))], self._read_scales(name)[tuple(box)], self.target_dtype)
            return values.narrow(-1, begin - first * 2 * num_bytes, length)

        def _read_scales(self, name: str) -> Tensor:
            from safetensors import safe_open

            with safe_open(Path(self.path, self._files[self._scales[name]]), framework="pt") as file:
                scales: Tensor = file.get_tensor(self._scales[name])
            return scales

    QuantizedHuggingFaceStorageReader.__module__ = _PLACE
    QuantizedHuggingFaceStorageReader.__qualname__ = _NAME
    return QuantizedHuggingFaceStorageReader


class _InPackageToo(Backport):
    """The class is a name of ``torch.distributed.checkpoint`` as well; torch 2.9's own is replaced in both places."""

    def patches(self) -> Iterable[Patch]:
        yield from super().patches()
        package = _PLACE.rpartition(".")[0]
        yield MissingName(self.name, package, _NAME, lambda: getattr(importlib.import_module(_PLACE), _NAME), self.reason)
        # both when the package is imported: its __init__ takes the class out of the module, which must be as torch has it
        for attribute in (_NAME, f"quantized_hf_storage.{_NAME}"):
            yield Replacement(self.name, package, attribute, _complete)


def _complete(reader: type) -> type:
    """The reader, or ours where it is torch 2.9's."""
    return _reader() if _is_first_form(reader) else reader


def _is_first_form(reader: type) -> bool:
    """Whether it is torch 2.9's, by two methods of its own."""
    return hasattr(reader, _OF_FIRST) and not hasattr(reader, _ADDED)


def _lacks(module: ModuleType | None) -> bool:
    reader = getattr(module, _NAME, None)
    return reader is None or hasattr(reader, "_is_torchspans") or _is_first_form(reader)


BACKPORT = _InPackageToo(
    name="quantized_hf_storage",
    summary="QuantizedHuggingFaceStorageReader: block-scaled and MXFP4 safetensors read as plain tensors",
    target=_PLACE,
    since="2.9.0",
    first_forms={"2.9": "multiplies a shard that begins inside a block with the scales of other blocks"},
    upstream="https://github.com/pytorch/pytorch/pull/160682",
    differs=(
        "all of an MXFP4 tensor is read, however many dimensions it has (torch 2.13 and 2.15 fill the first values of each row "
        "only: the chunk in their metadata has the packed size); torch 2.9's own, which multiplies a shard that begins inside "
        "a block with other blocks' scales, is replaced"
    ),
    is_module=True,
    names={_NAME: _reader},
    lacks=_lacks,
)
