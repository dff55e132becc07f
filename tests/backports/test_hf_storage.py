"""HuggingFaceStorageWriter and -Reader in one process; what ranks do with them is in test_consolidate_hf_safetensors.py."""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open, save_file

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
ours_only = pytest.mark.skipif(not is_lacking(REGISTRY.get("hf_storage").BACKPORT), reason="torch's own does otherwise")

STATE = {
    "float8": torch.arange(6.0).reshape(2, 3).to(torch.float8_e4m3fn),
    "bfloat16": torch.arange(4).to(torch.bfloat16),
    "ids": torch.arange(3),
    "scale": torch.full((2, 2), 0.5, dtype=torch.float16),
}


def writer(path: Path, **options: Any) -> Any:
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    return HuggingFaceStorageWriter(path=str(path), **options)


def save(state: dict[str, torch.Tensor], storage_writer: Any) -> None:
    import torch.distributed.checkpoint as dcp

    dcp.save(dict(state), storage_writer=storage_writer)


def load(path: Path, like: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    into = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    dcp.load(into, storage_reader=HuggingFaceStorageReader(str(path), **options))
    return into


def same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> bool:
    pairs = [(actual[name], tensor) for name, tensor in expected.items()]
    return actual.keys() == expected.keys() and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(*(x.reshape(-1).view(torch.uint8) for x in (a, b)))
        for a, b in pairs
    )


def test_shards_are_named_after_rank_and_file_and_say_where_they_belong(tmp_path: Path) -> None:
    save(STATE, writer(tmp_path, save_distributed=True, fqn_to_index_mapping=dict.fromkeys(STATE, 1) | {"ids": 2}))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "shard-00001-model-00001-of-00002.safetensors",
        "shard-00001-model-00002-of-00002.safetensors",
    ]
    with safe_open(tmp_path / "shard-00001-model-00002-of-00002.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["DCP_SHARDING_INFO"]) == {"ids": {"saved_offsets": [0]}} and metadata["format"] == "pt"
    assert same(load(tmp_path, STATE), STATE)


@pytest.mark.parametrize("num_threads", [1, 4])
def test_what_was_written_whole_is_read_with_its_dtypes(tmp_path: Path, num_threads: int) -> None:
    indices = {name: index for index, name in enumerate(STATE, 1)}
    save(STATE, writer(tmp_path, fqn_to_index_mapping=indices, thread_count=num_threads))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: f"model-0000{index}-of-00004.safetensors" for name, index in indices.items()}
    assert same(load(tmp_path, STATE, thread_count=num_threads), STATE)


def test_a_file_that_nothing_of_dcp_wrote_is_read(tmp_path: Path) -> None:
    save_file(STATE, tmp_path / "model.safetensors")
    assert same(load(tmp_path, STATE), STATE)


def test_metadata_has_size_chunks_and_dtype_of_each_tensor(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    save_file(STATE, tmp_path / "model.safetensors")
    metadata = HuggingFaceStorageReader(str(tmp_path)).read_metadata()
    results = {name: (entry.size, entry.properties.dtype) for name, entry in metadata.state_dict_metadata.items()}
    assert results == {name: (tensor.shape, tensor.dtype) for name, tensor in STATE.items()}
    assert {info.dtype for info in metadata.storage_data.values()} == {tensor.dtype for tensor in STATE.values()}


def test_signatures_begin_as_upstreams() -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

    expected = {
        HuggingFaceStorageWriter: {
            "fqn_to_index_mapping": None,
            "thread_count": 1,
            "save_distributed": False,
            "enable_consolidation": False,
            "thread_count_consolidation": 1,
        },
        HuggingFaceStorageReader: {"thread_count": 1},
    }
    for cls, defaults in expected.items():
        parameters = inspect.signature(cls).parameters
        assert list(parameters)[: 1 + len(defaults)] == ["path", *defaults]
        assert {name: parameters[name].default for name in defaults} == defaults
        assert cls.__module__ == "torch.distributed.checkpoint.hf_storage"


def test_a_writer_says_what_it_was_made_with() -> None:
    instance = writer(Path("/somewhere"), save_distributed=True, enable_consolidation=True, thread_count_consolidation=5)
    assert (instance.save_distributed, instance.enable_consolidation, instance.thread_count_consolidation) == (True, True, 5)
    assert (str(instance.path), instance.consolidated_output_path) == ("/somewhere/sharded", "/somewhere")
    assert (instance.fqn_to_index_mapping, instance.thread_count) == (None, 1)


def test_a_missing_tensor_and_a_broken_file_are_errors(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import CheckpointException

    save(STATE, writer(tmp_path))
    with pytest.raises((CheckpointException, RuntimeError), match="absent"):
        load(tmp_path, {"absent": torch.ones(1)})
    file = tmp_path / "model-00001-of-00001.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises((CheckpointException, SafetensorError)):
        load(tmp_path, STATE)


@ours_only
def test_integers_and_scalars_are_consolidated_and_read_in_parts(tmp_path: Path) -> None:
    state = {**STATE, "step": torch.tensor(3)}
    save(state, writer(tmp_path, save_distributed=True, enable_consolidation=True, thread_count_consolidation=3))
    assert same(load_file(tmp_path / "model-00001-of-00001.safetensors"), state)
    assert same(load(tmp_path, state, thread_count=2), state)


@ours_only
def test_what_torch_itself_takes_is_taken(tmp_path: Path, environment: Environment) -> None:
    from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

    save(STATE, HuggingFaceStorageWriter(str(tmp_path / "a"), dict.fromkeys(STATE, 1), None, True))
    save(STATE, writer(tmp_path / "b", save_sharded=True, token=None))
    for name in "ab":
        assert [path.name for path in (tmp_path / name).iterdir()] == ["shard-00001-model-00001-of-00001.safetensors"]
    assert HuggingFaceStorageReader(str(tmp_path), None).thread_count == 1
    writer(tmp_path, save_distributed=True, enable_consolidation=True)
    assert "HuggingFaceStorageWriter(save_distributed=True, enable_consolidation=True)" in [
        decision.subject for decision in environment.report.decisions
    ]


@ours_only
def test_a_remote_place_is_written_and_read_as_torch_does() -> None:
    place = "memory://checkpoint"
    save(STATE, writer(place))
    assert same(load(place, STATE), STATE)


@ours_only
def test_a_pickled_writer_consolidates_where_nothing_was_activated(tmp_path: Path, run_python) -> None:
    (tmp_path / "writer.pickle").write_bytes(pickle.dumps(writer(tmp_path, save_distributed=True, enable_consolidation=True)))
    run_python(
        """
        import pickle, sys, warnings
        from pathlib import Path
        import torch
        import torch.distributed.checkpoint as dcp

        warnings.filterwarnings("ignore")
        writer = pickle.loads(Path("writer.pickle").read_bytes())
        dcp.save({"w": torch.ones(2)}, storage_writer=writer)
        assert Path("model-00001-of-00001.safetensors").exists(), list(Path().iterdir())
        """
    )
