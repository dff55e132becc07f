"""DefaultStager: a copy of a state that nothing changes any more, made in background if asked."""

from __future__ import annotations

import io
import pickle
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")

OFF = {"use_pinned_memory": False, "use_shared_memory": False, "use_async_staging": False, "use_non_blocking_copy": False}
Pair = namedtuple("Pair", ["first", "second"])


def stager(**options: bool) -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    return DefaultStager(StagingOptions(**{**OFF, **options}))


class Waiting:
    """Something in a state whose copy begins, then waits until it is let go."""

    def __init__(self) -> None:
        self.begun, self.go = threading.Event(), threading.Event()

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        self.begun.set()
        assert self.go.wait(60)
        return "copied"


class Failing:
    """Something in a state that cannot be copied."""

    def __deepcopy__(self, memo: dict[int, Any]) -> str:
        raise RuntimeError("it cannot be copied")


def test_options_and_stager_look_as_upstreams() -> None:
    from torch.distributed.checkpoint import staging

    options = staging.StagingOptions()
    assert options == staging.StagingOptions(True, True, True, True) == pickle.loads(pickle.dumps(options))
    assert repr(staging.StagingOptions(False)) == (
        "StagingOptions(use_pinned_memory=False, use_shared_memory=True, use_async_staging=True, use_non_blocking_copy=True)"
    )
    assert isinstance(stager(), staging.AsyncStager) and stager().should_synchronize_after_execute
    assert staging.DefaultStager.__module__ == staging.StagingOptions.__module__ == staging.__name__


def test_a_copy_is_not_changed_by_updates_in_place_and_is_on_the_cpu() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "names": ("a", ["b"])}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    staged = stager().stage(state)
    moments = [entry["exp_avg"].clone() for entry in staged["optimizer"]["state"].values()]
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
        for entry in optimizer.state.values():
            entry["exp_avg"].add_(1)
    assert all(torch.equal(staged["model"][name], tensor) for name, tensor in before.items())
    assert all(torch.equal(e["exp_avg"], m) for e, m in zip(staged["optimizer"]["state"].values(), moments, strict=True))
    assert type(staged["model"]) is OrderedDict and staged["model"]._metadata == model.state_dict()._metadata
    assert staged["optimizer"]["param_groups"] == optimizer.state_dict()["param_groups"]
    assert (staged["step"], staged["names"]) == (3, ("a", ["b"]))
    assert not any(tensor.requires_grad or tensor.device.type != "cpu" for tensor in staged["model"].values())


def test_what_is_shared_stays_shared_and_views_stay_views() -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state: dict[str, Any] = {"base": base, "again": base, "row": base[1], "turned": base.t(), "tied": [base.view(-1)]}
    state["itself"] = state
    staged = stager().stage(state)
    assert staged["again"] is staged["base"] and staged["itself"] is staged
    assert torch.equal(staged["turned"], base.t()) and staged["turned"].stride() == (1, 4)
    staged["base"][1] = -1.0
    assert staged["row"].tolist() == [-1.0] * 4 == staged["tied"][0][4:8].tolist()
    assert base[1].tolist() == [4.0, 5.0, 6.0, 7.0]


def test_every_kind_of_value_is_copied() -> None:
    class Config:
        def __init__(self) -> None:
            self.values = [1]

    config = Config()
    state = {
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(2, dtype=torch.int32),
        "empty": torch.empty(0, 3),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "bytes": io.BytesIO(b"text"),
        "config": config,
        "pair": Pair(torch.zeros(2), 1),
        "nothing": None,
        "dtype": torch.bfloat16,
        "size": torch.Size([2, 3]),
    }
    staged = stager().stage(state)
    config.values.append(2)
    state["pair"].first.add_(1)
    assert staged["parameter"].tolist() == [1, 1] and not staged["parameter"].requires_grad
    assert staged["scalar"].item() == 2 and staged["scalar"].dtype == torch.int32 and staged["scalar"].shape == ()
    assert staged["empty"].shape == (0, 3)
    assert staged["float8"].dtype == torch.float8_e4m3fn and staged["float8"].float().tolist() == [1, 1, 1]
    assert staged["bytes"].getvalue() == b"text" and staged["bytes"] is not state["bytes"]
    assert staged["config"].values == [1]
    assert type(staged["pair"]) is Pair and staged["pair"].first.tolist() == [0, 0] and staged["pair"].second == 1
    assert (staged["nothing"], staged["dtype"], staged["size"]) == (None, torch.bfloat16, torch.Size([2, 3]))


def test_a_second_copy_uses_the_memory_of_the_first() -> None:
    weight = torch.ones(1000)
    its_stager = stager()
    first = its_stager.stage({"w": weight})
    weight.fill_(2)
    second = its_stager.stage({"w": weight})
    assert second["w"].data_ptr() == first["w"].data_ptr() != weight.data_ptr()
    assert second["w"].tolist() == weight.tolist()
    its_stager.close()


def test_shared_memory_is_shared() -> None:
    staged = stager(use_shared_memory=True).stage({"w": torch.ones(4), "none": torch.empty(0)})
    assert staged["w"].is_shared() and staged["w"].tolist() == [1] * 4
    assert not stager().stage({"w": torch.ones(4)})["w"].is_shared()


def test_async_staging_returns_at_once_and_close_waits_and_ends_the_thread() -> None:
    threads = set(threading.enumerate())
    waiting = Waiting()
    its_stager = stager(use_async_staging=True)
    future = its_stager.stage({"w": torch.ones(3), "wait": waiting})
    assert isinstance(future, Future) and waiting.begun.wait(60)
    assert not future.done()
    later = its_stager.stage({"w": torch.zeros(3)})
    assert not later.done(), "one at a time, in order"
    threading.Timer(0.05, waiting.go.set).start()
    its_stager.synchronize_staging()
    assert future.done() and later.done()
    assert future.result()["wait"] == "copied" and later.result()["w"].tolist() == [0] * 3
    its_stager.close()
    assert not [thread for thread in set(threading.enumerate()) - threads if "ThreadPoolExecutor" in thread.name]
    with pytest.raises(RuntimeError, match="after shutdown"):
        its_stager.stage({})


def test_an_error_in_the_copy_is_the_callers() -> None:
    with pytest.raises(RuntimeError, match="it cannot be copied"):
        stager().stage({"it": Failing()})
    its_stager = stager(use_async_staging=True)
    future = its_stager.stage({"it": Failing()})
    with pytest.raises(RuntimeError, match="it cannot be copied"):
        future.result(60)
    assert its_stager.stage({"it": 1}).result(60) == {"it": 1}, "it goes on"
    its_stager.close()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_without_an_accelerator_pinning_is_left_out_with_a_warning_and_non_blocking_is_an_error() -> None:
    from torch.distributed.checkpoint.staging import DefaultStager

    with pytest.warns(UserWarning, match="CUDA"):
        staged = stager(use_pinned_memory=True).stage({"w": torch.ones(2)})
    assert not staged["w"].is_pinned()
    with pytest.raises(AssertionError, match="accelerator"):
        stager(use_non_blocking_copy=True)
    with pytest.warns(UserWarning, match="CUDA"), pytest.raises(AssertionError, match="accelerator"):
        DefaultStager()


@pytest.mark.gpu
@pytest.mark.parametrize("shared", [True, False])
def test_on_a_gpu_the_copy_is_pinned_and_comes_after_what_was_asked_before(shared: bool) -> None:
    weight = torch.zeros(1 << 24, device="cuda")
    its_stager = stager(use_pinned_memory=True, use_shared_memory=shared, use_async_staging=True, use_non_blocking_copy=True)
    for step in range(1, 4):
        torch.cuda._sleep(10_000_000)
        weight.add_(1)
        staged = its_stager.stage({"w": weight}).result(60)
        assert staged["w"].device.type == "cpu" and staged["w"].is_pinned() and staged["w"].is_shared() == shared
        assert staged["w"].min() == staged["w"].max() == step
    its_stager.close()


@pytest.fixture
def second_of_two_ranks() -> Iterator[None]:
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("shared", [True, False])
def test_a_dtensor_stays_sharded(second_of_two_ranks: None, shared: bool) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (2,))
    local = torch.arange(6.0).reshape(2, 3)
    parameter = torch.nn.Parameter(DTensor.from_local(local, mesh, [Shard(0)]))
    its_stager = stager(use_shared_memory=shared)
    for step in range(2):
        staged = its_stager.stage({"w": parameter})["w"]
        with torch.no_grad():
            parameter.add_(1)
        assert isinstance(staged, DTensor) and not staged.requires_grad
        assert (staged.shape, staged.placements, staged.device_mesh) == ((4, 3), (Shard(0),), mesh)
        assert torch.equal(staged.to_local(), torch.arange(6.0).reshape(2, 3) + step)
        assert staged.to_local().is_shared() == shared
