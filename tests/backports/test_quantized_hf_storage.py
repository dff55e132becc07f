"""QuantizedHuggingFaceStorageReader: block-scaled and MXFP4 checkpoints load as plain tensors."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchspan.backports._base import REGISTRY, is_lacking

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]
ours_only = pytest.mark.skipif(
    not is_lacking(REGISTRY.get("quantized_hf_storage").BACKPORT), reason="torch's own does otherwise"
)

BLOCK = 4
FP4 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0]


def write(folder: Path, *files: dict[str, torch.Tensor]) -> None:
    """Files of these tensors, and their index."""
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(files, 1):
        name = f"model-{number:05}-of-{len(files):05}.safetensors"
        save_file(tensors, folder / name)
        weight_map |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def load(folder: Path, into: dict[str, Any], **options: Any) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader

    dcp.load(into, storage_reader=QuantizedHuggingFaceStorageReader(path=str(folder), **options))
    return into


def scaled(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A float8 weight, its scales, and what it stands for, element by element."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(-(-rows // BLOCK), -(-columns // BLOCK), generator=generator) + 0.5
    meant = torch.tensor([[weight[i, j].float() * scale[i // BLOCK, j // BLOCK] for j in range(columns)] for i in range(rows)])
    return weight, scale, meant


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("num_files", [1, 2])
def test_block_scaled_weights_are_multiplied_and_others_left(tmp_path: Path, dtype: torch.dtype, num_files: int) -> None:
    weight, scale, meant = scaled(10, 7)
    norm = torch.arange(5.0)
    first = {"a.weight": weight, "norm.weight": norm}
    write(tmp_path, *([first, {"a.weight_scale_inv": scale}] if num_files == 2 else [{**first, "a.weight_scale_inv": scale}]))
    into = {"a.weight": torch.zeros(10, 7, dtype=dtype), "norm.weight": torch.zeros(5)}
    result = load(tmp_path, into, thread_count=2, target_dtype=dtype, block_size=BLOCK)
    assert torch.equal(result["a.weight"], meant.to(dtype)) and torch.equal(result["norm.weight"], norm)


@pytest.mark.parametrize("dim", [0, 1])
def test_a_shard_gets_its_part_even_where_it_begins_inside_a_block(tmp_path: Path, dim: int) -> None:
    import torch.distributed as dist
    from torch.distributed.checkpoint import load as dcp_load
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    weight, scale, meant = scaled(10, 6)
    write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": scale})
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        part = meant.chunk(2, dim)[1]
        shard = DTensor.from_local(torch.zeros_like(part), init_device_mesh("cpu", (2,)), [Shard(dim)], run_check=False)
        reader = QuantizedHuggingFaceStorageReader(str(tmp_path), block_size=BLOCK)
        dcp_load({"a.weight": shard}, storage_reader=reader, no_dist=True)
        assert torch.equal(shard.to_local(), part)
    finally:
        dist.destroy_process_group()


def mxfp4() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Packed blocks, their exponents, and what they stand for, number by number."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (2, 3, 4, 16), generator=generator, dtype=torch.uint8)
    scales = torch.randint(120, 135, (2, 3, 4), generator=generator, dtype=torch.uint8)
    meant = torch.zeros(2, 3, 128)
    for expert in range(2):
        for row in range(3):
            numbers = []
            for group in range(4):
                for byte in blocks[expert, row, group].tolist():
                    exponent = int(scales[expert, row, group]) - 127
                    numbers += [FP4[byte & 15] * 2.0**exponent, FP4[byte >> 4] * 2.0**exponent]
            meant[expert, row] = torch.tensor(numbers)
    return blocks, scales, meant


def test_metadata_of_mxfp4_has_the_size_that_it_unpacks_to(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import QuantizedHuggingFaceStorageReader

    blocks, scales, meant = mxfp4()
    write(tmp_path, {"experts_blocks": blocks, "experts_scales": scales})
    metadata = QuantizedHuggingFaceStorageReader(str(tmp_path)).read_metadata()
    assert metadata.state_dict_metadata["experts_blocks"].size == meant.shape


@ours_only  # torch 2.13 and 2.15 load the first values of each row only: the chunk in their metadata has the packed size
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mxfp4_is_unpacked(tmp_path: Path, dtype: torch.dtype) -> None:
    blocks, scales, meant = mxfp4()
    write(tmp_path, {"experts_blocks": blocks, "experts_scales": scales})
    result = load(tmp_path, {"experts_blocks": torch.zeros(2, 3, 128, dtype=dtype)}, target_dtype=dtype)
    assert torch.equal(result["experts_blocks"], meant.to(dtype))


@ours_only
@pytest.mark.parametrize(("begin", "length"), [(0, 128), (5, 7), (30, 40), (96, 32)])
def test_a_part_of_mxfp4_is_unpacked(tmp_path: Path, begin: int, length: int) -> None:
    from types import SimpleNamespace

    from safetensors import safe_open
    from torch.distributed.checkpoint import QuantizedHuggingFaceStorageReader

    blocks, scales, meant = mxfp4()
    write(tmp_path, {"experts_blocks": blocks, "experts_scales": scales})
    reader = QuantizedHuggingFaceStorageReader(str(tmp_path))
    reader.read_metadata()
    expected = torch.zeros(1, 2, length)
    planner = SimpleNamespace(resolve_tensor=lambda item: expected, commit_tensor=lambda item, tensor: None)
    item = SimpleNamespace(
        storage_index=SimpleNamespace(fqn="experts_blocks"), storage_offsets=[1, 1, begin], lengths=[1, 2, length]
    )
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", framework="pt") as file:
        reader._read_item(planner, file, item)
    assert torch.equal(expected, meant[1:2, 1:3, begin : begin + length])


def test_the_signature_is_upstreams_and_no_index_is_an_error(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    from torch.distributed.checkpoint.quantized_hf_storage import QuantizedHuggingFaceStorageReader as Reader

    defaults = {name: parameter.default for name, parameter in inspect.signature(Reader).parameters.items()}
    assert list(defaults.items())[1:] == [("thread_count", 1), ("target_dtype", torch.float32), ("block_size", 128)]
    assert issubclass(Reader, HuggingFaceStorageReader)
    assert Reader.__module__ == "torch.distributed.checkpoint.quantized_hf_storage"
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors\.index\.json"):
        Reader(str(tmp_path)).read_metadata()
