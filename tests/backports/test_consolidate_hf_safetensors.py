"""Consolidation of sharded safetensors files, by one process and by two gloo ranks, with torch's own and with ours."""

from __future__ import annotations

import inspect
import json
import os
import struct
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, safe_open, save_file

from torchspan.backports._base import REGISTRY, is_lacking

pytestmark = pytest.mark.usefixtures("environment")
lacking = is_lacking(REGISTRY.get("consolidate_hf_safetensors").BACKPORT)
ours_only = pytest.mark.skipif(not lacking, reason="torch's own is known to do otherwise")

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


def consolidate(*args: Any, **options: Any) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

    consolidate_safetensors_files(*args, **options)


def on_every_rank(*args: Any, **options: Any) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank

    consolidate_safetensors_files_on_every_rank(*args, **options)


def random(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10
    return values.to(dtype)


def save_shard(path: Path, tensors: dict[str, torch.Tensor], offsets: dict[str, list[int]]) -> None:
    """A file as DCP writes it: tensors, and for each one where it belongs."""
    places = {name: {"saved_offsets": place} for name, place in offsets.items()}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, {"DCP_SHARDING_INFO": json.dumps(places), "DCP_VERSION": "1.0", "format": "pt"})


def save_split(folder: Path, full: dict[str, torch.Tensor], dims: dict[str, int], sizes: list[int]) -> None:
    """Files of one dimension's split in parts of these sizes, one a rank; the last dimension may be cut short."""
    folder.mkdir(parents=True, exist_ok=True)
    for rank, size in enumerate(sizes):
        begin = sum(sizes[:rank])
        parts = {name: tensor.narrow(dims[name], begin, size) for name, tensor in full.items()}
        offsets = {name: [begin if dim == dims[name] else 0 for dim in range(full[name].dim())] for name in full}
        save_shard(folder / f"shard-{rank + 1:05}-model-00001-of-00001.safetensors", parts, offsets)


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal shape, dtype and bytes."""
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (actual, expected)]
    return actual.shape == expected.shape and actual.dtype == expected.dtype and torch.equal(*as_bytes)


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """What the index says is there, read by the safetensors library."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = {file: load_file(folder / file) for file in set(index["weight_map"].values())}
    results = {name: files[file][name] for name, file in index["weight_map"].items()}
    assert sorted(results) == sorted(name for tensors in files.values() for name in tensors)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in results.values())
    return results


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_and_column_shards_of_uneven_sizes_become_the_tensors_that_they_were(tmp_path: Path, dtype: torch.dtype) -> None:
    full = {
        "rows": random((7, 4), dtype),
        "columns": random((4, 7), dtype, 1),
        "middle": random((2, 7, 3), dtype, 2),
        "vector": random((7,), dtype, 3),
    }
    save_split(tmp_path / "in", full, {"rows": 0, "columns": 1, "middle": 1, "vector": 0}, [3, 2, 2, 0])
    (tmp_path / "out").mkdir()
    consolidate(str(tmp_path / "in"), str(tmp_path / "out"), dict.fromkeys(full, 1))
    result = read_all(tmp_path / "out")
    assert all(same(result[name], tensor) for name, tensor in full.items())
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


def test_boxes_of_a_two_dimensional_split_become_one_tensor(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    full = random((5, 6, 2), torch.bfloat16)
    corners = [(0, 0, 3, 4), (0, 4, 3, 2), (3, 0, 2, 4), (3, 4, 2, 2)]
    for rank, (row, column, height, width) in enumerate(corners):
        part = full[row : row + height, column : column + width]
        save_shard(tmp_path / "in" / f"shard-{rank}.safetensors", {"w": part}, {"w": [row, column, 0]})
    consolidate(str(tmp_path / "in"), str(tmp_path), {"w": 1})
    assert same(read_all(tmp_path)["w"], full)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_each_tensor_is_in_the_file_of_its_index_and_threads_are_honoured(tmp_path: Path, num_threads: int) -> None:
    full = {f"layers.{i}.weight": random((64, 4096), torch.float32, i) for i in range(8)}
    save_split(tmp_path / "in", full, dict.fromkeys(full, 0), [40, 24])
    indices = {name: 1 + i // 2 for i, name in enumerate(full)}
    started: set[int] = set()
    threading.setprofile(lambda *_: started.add(threading.get_ident()))  # asked in new threads only
    try:
        consolidate(str(tmp_path / "in"), str(tmp_path), indices, num_threads=num_threads)
    finally:
        threading.setprofile(None)
    assert (2 <= len(started) <= 4) if num_threads == 4 else len(started) == 0
    weight_map = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert weight_map == {name: f"model-{index:05}-of-00004.safetensors" for name, index in indices.items()}
    assert all(same(read_all(tmp_path)[name], tensor) for name, tensor in full.items())


def test_only_what_the_mapping_names_is_written(tmp_path: Path) -> None:
    full = {"a": random((4, 2), torch.float32), "b": random((4, 2), torch.float32, 1)}
    save_split(tmp_path / "in", full, {"a": 0, "b": 0}, [2, 2])
    consolidate(str(tmp_path / "in"), str(tmp_path), {"b": 1})
    assert list(read_all(tmp_path)) == ["b"]


def test_a_file_that_dcp_did_not_save_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ValueError, match="DCP"):
        consolidate(str(tmp_path / "in"), str(tmp_path), {"a": 1})
    save_split(tmp_path / "good", {"a": torch.ones(2)}, {"a": 0}, [2])
    with pytest.raises(FileNotFoundError):
        consolidate(str(tmp_path / "good"), str(tmp_path / "no such folder"), {"a": 1})


def test_the_signatures_are_upstreams() -> None:
    import torch.distributed.checkpoint._consolidate_hf_safetensors as module

    single, every = module.consolidate_safetensors_files, module.consolidate_safetensors_files_on_every_rank
    assert list(inspect.signature(single).parameters) == ["input_dir", "output_dir", "fqn_to_index_mapping", "num_threads"]
    assert list(inspect.signature(every).parameters) == [*inspect.signature(single).parameters, "process_group"]
    assert inspect.signature(every).parameters["num_threads"].default == 1
    assert single.__module__ == every.__module__ == module.__name__
    assert inspect.getdoc(single) and inspect.getdoc(every)


@ours_only
def test_scalars_integers_and_odd_sizes_are_consolidated_and_stay_aligned(tmp_path: Path) -> None:
    full = {
        "mask": torch.tensor([True, False, True]),
        "odd": random((3,), torch.float8_e4m3fn),
        "ids": torch.arange(6, dtype=torch.int64).reshape(3, 2),
        "weight": random((3, 5), torch.float32),
        "none": torch.empty(3, 0),
    }
    save_split(tmp_path / "in", full, dict.fromkeys(full, 0), [2, 1])
    save_shard(tmp_path / "in" / "scalar.safetensors", {"step": torch.tensor(7.5)}, {"step": []})
    full["step"] = torch.tensor(7.5)
    consolidate(str(tmp_path / "in"), str(tmp_path), dict.fromkeys(full, 1))
    result = read_all(tmp_path)
    assert all(same(result[name], tensor) for name, tensor in full.items())
    with safe_open(tmp_path / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    (header_size,) = struct.unpack("<Q", (tmp_path / "model-00001-of-00001.safetensors").read_bytes()[:8])
    assert header_size % 8 == 0


@ours_only
def test_what_is_missing_or_broken_is_an_error_that_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    save_split(folder, {"a": random((4, 2), torch.float32)}, {"a": 0}, [2, 2])
    with pytest.raises(ValueError, match=r"no safetensors file in .* has b, c; the mapping names them"):
        consolidate(str(folder), str(tmp_path), {"a": 1, "b": 1, "c": 2})
    first = folder / "shard-00001-model-00001-of-00001.safetensors"
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(ValueError, match=r"the shards of a have 4 of the 8 elements of shape \[4, 2\]"):
        consolidate(str(folder), str(tmp_path), {"a": 1})
    first.write_bytes(content[:-8])
    with pytest.raises(ValueError, match=r"shard-00001.* ends early: 8 of 16 bytes"):
        consolidate(str(folder), str(tmp_path), {"a": 1}, num_threads=2)
    first.write_bytes(b"text")
    with pytest.raises(ValueError, match=r"shard-00001.* is no safetensors file"):
        consolidate(str(folder), str(tmp_path), {"a": 1})
    save_shard(first, {"a": random((2, 2), torch.float16)}, {"a": [0, 0]})
    with pytest.raises(ValueError, match=r"the shards of a have dtypes \['F16', 'F32'\]"):
        consolidate(str(folder), str(tmp_path), {"a": 1})


@ours_only
def test_one_process_without_a_group_does_all_of_it_under_either_name(tmp_path: Path) -> None:
    import torch.distributed.checkpoint._consolidate_hf_safetensors as module

    full = {"a": random((4, 2), torch.float32), "b": random((4, 2), torch.float32, 1)}
    save_split(tmp_path / "in", full, {"a": 0, "b": 1}, [1, 1])
    save_split(tmp_path / "in", full, {"a": 0, "b": 0}, [3, 1])
    on_every_rank(str(tmp_path / "in"), str(tmp_path), {"a": 1, "b": 2})
    assert all(same(read_all(tmp_path)[name], tensor) for name, tensor in full.items())
    assert module.consolidate_safetensor_files is module.consolidate_safetensors_files


RANKS = """
import json, sys, warnings
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from torchspan.backports._base import all_backports, is_lacking, REGISTRY
from torchspan.environment.scope import Environment

Environment([patch for backport in all_backports() for patch in backport.patches()]).activate()
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files_on_every_rank
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

warnings.filterwarnings("ignore", message="TypedStorage is deprecated")  # torch's own checkpoint code
rank, folder = int(sys.argv[2]), Path(sys.argv[1])
store = f"file://{folder}/store"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
lacking = is_lacking(REGISTRY.get("consolidate_hf_safetensors").BACKPORT)
answers = {}
flat = init_device_mesh("cpu", (2,))
grid = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))


def random(name, shape, dtype):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(len(name))) * 10).to(dtype)


def same(found, expected):
    as_bytes = [tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (found, expected)]
    return found.shape == expected.shape and found.dtype == expected.dtype and torch.equal(*as_bytes)


full, sharded = {}, {}
for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
    for kind, mesh, placements, shape in (
        ("rows", flat, [Shard(0)], (5, 3)),
        ("columns", flat, [Shard(1)], (3, 5)),
        ("one row", flat, [Shard(0)], (1, 4)),
        ("replicated", flat, [Replicate()], (4,)),
        ("grid", grid, [Shard(0), Shard(1)], (4, 5)),
    ):
        name = f"{kind} {dtype}".replace(" ", ".")
        full[name] = random(name, shape, dtype)
        whole = full[name].view(torch.uint8) if dtype == torch.float8_e4m3fn else full[name]
        dtensor = distribute_tensor(whole, mesh, placements)
        local = dtensor.to_local().contiguous().view(dtype)  # gloo moves no float8
        sharded[name] = DTensor.from_local(local, mesh, placements, shape=torch.Size(shape), stride=full[name].stride())
full["plain"] = sharded["plain"] = random("plain", (2, 2), torch.float32)
indices = {name: 1 + i % 3 for i, name in enumerate(full)}

# as torchtitan does: every rank saves its shards, every rank makes its share of the files
where = folder / "every"
writer = HuggingFaceStorageWriter(
    path=str(where / "sharded"), save_distributed=True, fqn_to_index_mapping=indices, enable_consolidation=False
)
dcp.save(dict(sharded), storage_writer=writer)
consolidate_safetensors_files_on_every_rank(str(where / "sharded"), str(where), indices, num_threads=5)
answers["index is there on return"] = (where / "model.safetensors.index.json").exists()

# as most other programs do: the writer consolidates, with and without a mapping
for name, mapping in (("writer", indices), ("one file", None)):
    writer = HuggingFaceStorageWriter(
        path=str(folder / name),
        save_distributed=True,
        fqn_to_index_mapping=mapping,
        enable_consolidation=True,
        thread_count=2,
        thread_count_consolidation=5,
    )
    dcp.save(dict(sharded), storage_writer=writer)

# a checkpoint in safetensors is read into another sharding, from the whole files and from the shards
for name in ("every", "every/sharded", "one file"):
    into = {}
    for key, tensor in full.items():
        split = 1 if key.startswith("rows") else 0
        local = torch.chunk(torch.zeros_like(tensor), 2, dim=split)
        local = local[rank] if len(local) > rank else torch.zeros_like(tensor).narrow(split, 0, 0)
        into[key] = DTensor.from_local(
            local.contiguous(), flat, [Shard(split)], shape=tensor.shape, stride=tensor.stride()
        )
    dcp.load(into, storage_reader=HuggingFaceStorageReader(str(folder / name), thread_count=2))
    expected = {}
    for key, tensor in full.items():
        parts = torch.chunk(tensor, 2, dim=1 if key.startswith("rows") else 0)
        expected[key] = parts[rank] if len(parts) > rank else None
    answers[f"loaded from {name}"] = sorted(
        key for key, part in expected.items() if part is not None and not same(into[key].to_local(), part)
    )

if lacking:  # torch's own leaves the other rank waiting
    try:
        consolidate_safetensors_files_on_every_rank(str(where / "sharded"), str(folder), {**indices, "absent": 1})
    except (ValueError, RuntimeError) as error:
        answers["failure"] = f"{type(error).__name__}: {error}"
group = dist.new_group([0, 1], backend="gloo")
(folder / "group").mkdir(exist_ok=True)
consolidate_safetensors_files_on_every_rank(str(where / "sharded"), str(folder / "group"), indices, process_group=group)
gathered = [None, None]
dist.all_gather_object(gathered, answers)
if rank == 0:
    torch.save(full, folder / "full.pt")
    (folder / "answers.json").write_text(json.dumps([lacking, gathered]))
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "ranks.py").write_text(RANKS)
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")}
    launched = [
        subprocess.Popen(
            [sys.executable, str(folder / "ranks.py"), str(folder), str(rank)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], "\n\n".join(text[-4000:] for text in outputs)
    _, answers = json.loads((folder / "answers.json").read_text())
    return folder, answers


@pytest.mark.parametrize("place", ["every", "writer", "one file", "group"])
def test_two_ranks_save_shards_that_become_the_whole_tensors(ranks: Any, place: str) -> None:
    folder, _ = ranks
    expected = torch.load(folder / "full.pt")
    actual = read_all(folder / place)
    assert actual.keys() == expected.keys()
    assert [name for name, tensor in expected.items() if not same(actual[name], tensor)] == []
    files = {path.name for path in (folder / place).glob("*.safetensors")}
    num_files = 1 if place == "one file" else 3
    assert files == {f"model-{index:05}-of-{num_files:05}.safetensors" for index in range(1, num_files + 1)}


def test_the_index_is_there_when_any_rank_returns(ranks: Any) -> None:
    assert [answers["index is there on return"] for answers in ranks[1]] == [True, True]


@pytest.mark.parametrize("place", ["every", "every/sharded", "one file"])
def test_whole_files_and_shards_load_into_another_sharding(ranks: Any, place: str) -> None:
    assert [answers[f"loaded from {place}"] for answers in ranks[1]] == [[], []]


@ours_only
def test_an_error_on_one_rank_is_one_on_every_rank(ranks: Any) -> None:
    first, second = (answers["failure"] for answers in ranks[1])
    assert first.startswith("RuntimeError: consolidating failed on rank 1, this is rank 0: ValueError")
    assert second.startswith("ValueError: no safetensors file in") and "absent" in second


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    "box", [((0, 0, 0), (2, 3, 4)), ((0, 1, 0), (2, 1, 4)), ((1, 0, 2), (1, 3, 2)), ((1, 2, 3), (1, 1, 1))], ids=str
)
def test_a_part_is_written_to_its_place_in_the_bytes_of_the_whole(box: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    from torch.distributed.checkpoint._consolidate_hf_safetensors import _write_sub_tensor_to_file_optimized

    offsets, sizes = box
    whole = torch.arange(24, dtype=torch.int32).reshape(2, 3, 4)
    part = whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes))]
    buffer = bytearray(24 * 4)
    data = bytes(part.contiguous().flatten().view(torch.uint8).tolist())
    _write_sub_tensor_to_file_optimized(memoryview(buffer), data, 4, [2, 3, 4], list(offsets), list(sizes))
    written = torch.frombuffer(buffer, dtype=torch.int32).reshape(2, 3, 4)
    expected = torch.zeros_like(whole)
    expected[tuple(slice(begin, begin + size) for begin, size in zip(offsets, sizes))] = part
    assert torch.equal(written, expected)
