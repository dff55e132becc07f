"""async_save with a stager: what is saved is the state of the call, and its two futures say when."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError
from torchspan.environment.scope import Environment

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
]
lacking = is_lacking(REGISTRY.get("async_save").BACKPORT)


def stager(background: bool = True) -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(StagingOptions(False, False, background, False))


def save(state: dict[str, Any], path: Path, **options: Any) -> Any:
    import torch.distributed.checkpoint as dcp

    return dcp.async_save(state, checkpoint_id=path, **options)


def loaded(path: Path, **like: Any) -> dict[str, Any]:
    import torch.distributed.checkpoint as dcp

    dcp.load(like, checkpoint_id=path)
    return like


class Gate:
    """An object whose copy waits until it is let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        assert self.go.wait(60)
        return "copied"


class Model(torch.nn.Linear):
    """A stateful object: its state_dict is asked for when it is saved."""


def test_the_state_that_was_staged_is_saved_while_training_goes_on(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

    model, its_stager = Model(3, 2), stager()
    for step in range(3):  # as torchtitan does: one stager for all checkpoints
        response = save({"model": model, "step": step}, tmp_path / str(step), async_stager=its_stager)
        assert isinstance(response, AsyncSaveResponse)
        assert isinstance(response.staging_completion, Future) and isinstance(response.upload_completion, Future)
        assert response.staging_completion.result(60) is None
        expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            model.weight.add_(1)
        response.upload_completion.result(60)
        other = Model(3, 2)
        actual = loaded(tmp_path / str(step), model=other, step=-1)
        assert actual["step"] == step
        assert all(torch.equal(tensor, expected[name]) for name, tensor in other.state_dict().items())
    its_stager.close()


def test_it_returns_before_the_copy_is_done(tmp_path: Path) -> None:
    gate, its_stager = Gate(), stager()
    response = save({"w": torch.ones(3), "gate": gate}, tmp_path, async_stager=its_stager)
    assert not response.staging_completion.done() and not response.upload_completion.done()
    gate.go.set()
    response.staging_completion.result(60)
    response.upload_completion.result(60)
    assert loaded(tmp_path, w=torch.zeros(3), gate="")["gate"] == "copied"
    its_stager.close()


def test_a_stager_that_blocks_gives_one_future(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    weight = torch.ones(3)
    for name, its_stager in (("default", stager(background=False)), ("blocking", BlockingAsyncStager())):
        future = save({"w": weight}, tmp_path / name, async_stager=its_stager)
        assert isinstance(future, Future)
        weight.add_(1)
        future.result(60)
        weight.sub_(1)
        assert loaded(tmp_path / name, w=torch.zeros(3))["w"].tolist() == [1] * 3


def test_without_a_stager_it_is_as_ever(tmp_path: Path, environment: Environment) -> None:
    weight = torch.ones(3)
    future = save({"w": weight}, tmp_path)
    weight.add_(1)
    future.result(60)
    assert loaded(tmp_path, w=torch.zeros(3))["w"].tolist() == [1] * 3
    assert environment.report.decisions == () or not lacking


def test_a_stager_of_the_users_own_is_asked_to_synchronize(tmp_path: Path) -> None:
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    class Own(BlockingAsyncStager):
        _synchronize_after_execute = True
        calls: ClassVar[list[str]] = []

        def stage(self, state_dict: dict[str, Any]) -> Any:
            self.calls.append("stage")
            return super().stage(state_dict)

        def synchronize_staging(self) -> None:
            self.calls.append("synchronize")

    save({"w": torch.ones(2)}, tmp_path, async_stager=Own()).result(60)
    assert Own.calls == ["stage", "synchronize"]


class Failing:
    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        raise RuntimeError("it cannot be copied")


def test_errors_arrive_in_the_futures(tmp_path: Path) -> None:
    from torch.distributed.checkpoint import CheckpointException

    gate, its_stager = Gate(), stager()
    response = save({"gate": gate, "it": Failing()}, tmp_path, async_stager=its_stager)
    gate.go.set()
    for future in (response.staging_completion, response.upload_completion):
        with pytest.raises(RuntimeError, match="it cannot be copied"):
            future.result(60)
    (tmp_path / "file").write_text("")
    response = save({"w": torch.ones(2)}, tmp_path / "file" / "below", async_stager=its_stager)
    response.staging_completion.result(60)
    with pytest.raises(CheckpointException, match="Not a directory"):
        response.upload_completion.result(60)
    save({"w": torch.ones(2)}, tmp_path / "good", async_stager=its_stager).upload_completion.result(60)
    its_stager.close()


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    its_stager = stager()
    save({"w": torch.ones(2)}, tmp_path, async_stager=its_stager).upload_completion.result(60)
    its_stager.close()
    for thread in set(threading.enumerate()) - before:
        thread.join(10)
    assert set(threading.enumerate()) <= before


def test_safetensors_are_written_in_background(tmp_path: Path) -> None:
    from safetensors.torch import load_file
    from torch.distributed.checkpoint import HuggingFaceStorageWriter

    writer = HuggingFaceStorageWriter(path=str(tmp_path), save_distributed=True, enable_consolidation=True)
    weight, its_stager = torch.ones(3, dtype=torch.bfloat16), stager()
    response = save({"w": weight}, None, storage_writer=writer, async_stager=its_stager, no_dist=True)
    response.staging_completion.result(60)
    weight.zero_()
    response.upload_completion.result(60)
    its_stager.close()
    assert load_file(tmp_path / "model-00001-of-00001.safetensors")["w"].tolist() == [1] * 3


def test_the_signature_is_upstreams_and_both_names_are_one() -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save

    assert dcp.async_save is async_save
    parameters = inspect.signature(async_save).parameters
    new = ["async_stager", "no_dist", "use_collectives"]
    old = ["state_dict", "checkpoint_id", "storage_writer", "planner", "process_group", "async_checkpointer_type"]
    assert list(parameters) == old + new
    assert [parameters[name].default for name in ["async_checkpointer_type", *new]] == [
        AsyncCheckpointerType.THREAD,
        None,
        False,
        True,
    ]


@pytest.mark.skipif(not lacking, reason="torch's own can")
def test_what_it_cannot_is_an_error_that_says_so(tmp_path: Path, environment: Environment) -> None:
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    with pytest.raises(UnsupportedError, match=r"use_collectives=False.*torch has it since 2\.9\.0; leave it out"):
        save({}, tmp_path, use_collectives=False)
    with pytest.raises(UnsupportedError, match=r"no_dist=True.*since 2\.9\.0; use AsyncCheckpointerType\.THREAD"):
        save({}, tmp_path, no_dist=True, async_checkpointer_type=AsyncCheckpointerType.PROCESS)
    save({"w": torch.ones(1)}, tmp_path, async_stager=stager(False)).result(60)
    assert "async_save(async_stager=…)" in [decision.subject for decision in environment.report.decisions]


def test_activation_before_the_import_is_undone_too(run_python) -> None:
    run_python(
        """
        import torch
        from torchspan.backports._base import REGISTRY, is_lacking
        from torchspan.environment.scope import Environment

        backport = REGISTRY.get("async_save").BACKPORT
        environment = Environment(backport.patches()).activate()
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse, async_save

        assert dcp.async_save is async_save
        environment.deactivate()
        assert dcp.async_save is dcp.state_dict_saver.async_save
        assert (dcp.async_save is async_save) == (not is_lacking(backport))
        assert dcp.async_save.__code__.co_filename.endswith("logger.py"), "torch's own decorator"
        """
    )


def test_a_process_saves_what_was_staged(run_python) -> None:
    run_python(
        """
        import tempfile
        import torch
        from torchspan.backports._base import all_backports
        from torchspan.environment.scope import Environment

        if __name__ == "__main__":
            Environment([patch for backport in all_backports() for patch in backport.patches()]).activate()
            import torch.distributed as dist
            import torch.distributed.checkpoint as dcp
            from safetensors.torch import load_file
            from torch.distributed.checkpoint import HuggingFaceStorageWriter
            from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
            from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

            with tempfile.TemporaryDirectory() as folder:
                dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
                weight = torch.ones(3)
                stager = DefaultStager(StagingOptions(False, True, True, False))
                writer = HuggingFaceStorageWriter(path=f"{folder}/hf", save_distributed=True, enable_consolidation=True)
                for place in ({"checkpoint_id": f"{folder}/dcp"}, {"storage_writer": writer}):
                    weight.fill_(1)
                    response = dcp.async_save(
                        {"w": weight}, async_checkpointer_type=AsyncCheckpointerType.PROCESS, async_stager=stager, **place
                    )
                    response.staging_completion.result(60)
                    weight.fill_(2)
                    response.upload_completion.result(120)
                stager.close()
                found = {"w": torch.zeros(3)}
                dcp.load(found, checkpoint_id=f"{folder}/dcp")
                assert found["w"].tolist() == [1.0] * 3, found
                assert load_file(f"{folder}/hf/model-00001-of-00001.safetensors")["w"].tolist() == [1.0] * 3
                dist.destroy_process_group()
        """,
        env={"MASTER_ADDR": "127.0.0.1", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"},
    )
