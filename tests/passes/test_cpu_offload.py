"""Activations that wait on the CPU: where copies stand in a graph of fake GPU tensors, and the bits of those that run here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Node
from torch.utils._pytree import tree_map

from torchspan.capture._state import BoundGraph
from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.passes import _offload
from torchspan.passes._base import PassContext, editable
from torchspan.passes._phases import phases_of
from torchspan.passes._pipeline import Pipeline
from torchspan.passes._storages import kept_for_backward


@pytest.fixture
def on_gpu(graph: Graph) -> Graph:
    """The step of a tiny Llama 3, as if it had been captured on a GPU: its fake tensors say so."""
    mode, gpu = FakeTensorMode(), torch.device("cuda:0")

    def moved(value: Any) -> Any:
        return (
            torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=gpu)
            if isinstance(value, Tensor)
            else value
        )

    module = editable(graph)
    with mode:
        for node in module.graph.nodes:
            node.meta = {**node.meta, "val": tree_map(moved, node.meta.get("val"))}
    return graph.with_module(module, "moved")


def run(text: str, graph: Graph, **context: Any) -> tuple[Graph, Report]:
    report = Report()
    return Pipeline.parse(text).run(graph, PassContext(report, **context)), report


def called(graph: Graph, name: str) -> list[Node]:
    return [node for node in graph.module.graph.nodes if str(node.target) == f"torchspan.{name}.default"]


def test_each_activation_goes_after_its_last_use_and_comes_back_before_it_is_read(on_gpu: Graph) -> None:
    after, report = run("cpu_offload{min_mb=0}", on_gpu)
    place = {node: index for index, node in enumerate(after.module.graph.nodes)}
    phases = phases_of(after.module.graph)
    copies = called(after, "copy_to_host")
    assert len(copies) == len(called(after, "wait_for_copy")) > 20
    for copy in copies:
        source = copy.args[0]
        assert isinstance(source, Node)
        assert copy.meta["val"].device.type == "cpu" and source.meta["val"].device.type == "cuda"
        assert all(place[user] <= place[copy] and phases[user] == "forward" for user in source.users)
        (back,) = copy.users
        (wait,) = back.users
        assert wait.meta["val"].device.type == "cuda" and wait.meta["val"].stride() == source.meta["val"].stride()
        assert place[copy] < place[back] < place[wait] < min(place[user] for user in wait.users)
    held = kept_for_backward(after.module.graph, phases)
    assert {node.meta["val"].device.type for node in held if node not in after.output_values()} == {"cpu"}
    assert report.decisions[0].choice.startswith(f"{len(copies)} activations, ")


@pytest.mark.parametrize("ahead", [1, 2])
def test_a_copy_back_begins_while_the_values_ahead_of_it_are_waited_for(on_gpu: Graph, ahead: int) -> None:
    after, _ = run(f"cpu_offload{{min_mb=0,ahead={ahead}}}", on_gpu)
    place = {node: index for index, node in enumerate(after.module.graph.nodes)}
    waits = called(after, "wait_for_copy")
    begins = [place[wait.args[0]] for wait in waits]  # type: ignore[index]
    assert begins == sorted(begins)
    assert all(begin < place[wait] for begin, wait in zip(begins[ahead:], waits))
    assert all(begin > place[wait] for begin, wait in zip(begins[ahead + 1 :], waits))


def test_small_activations_stay(on_gpu: Graph) -> None:
    after, report = run("cpu_offload{min_mb=0.05}", on_gpu)
    assert not called(after, "copy_to_host") and report.decisions[0].choice == "nothing changed"
    assert "no activation of 0.05 MB or more" in report.decisions[0].reason


def test_a_graph_on_the_cpu_stays_as_it_is_and_says_so(graph: Graph) -> None:
    after, report = run("cpu_offload{min_mb=0}", graph)
    assert after.module.code == graph.module.code
    assert "there is nowhere to move activations to" in report.decisions[0].reason
    with pytest.raises(PassError, match="this graph runs there; leave it out, or run on a GPU"):
        run("cpu_offload{min_mb=0}", graph, strict=True)


def test_what_was_moved_has_the_bits_that_it_had(graph: Graph, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where the three operators copy: what reads them is right."""
    monkeypatch.setattr("torchspan.passes.cpu_offload.other_device", lambda owner: owner.meta["val"].device)
    after, _ = run("cpu_offload{min_mb=0}", graph)
    assert len(called(after, "copy_to_host")) > 20
    gradients = []
    for version in (graph, after):
        BoundGraph(version, program.target)(*program.args)  # type: ignore[arg-type]
        gradients.append([parameter.grad for parameter in program.target.parameters()])  # type: ignore[union-attr]
    assert all(torch.equal(actual, other) for actual, other in zip(*gradients, strict=True))


def test_copies_keep_the_layout_of_what_they_copy() -> None:
    x = torch.randn(4, 6).t()[:, 1:3]
    host = torch.ops.torchspan.copy_to_host(x)
    back = torch.ops.torchspan.wait_for_copy(torch.ops.torchspan.copy_to_device(host, torch.device("cpu")))
    assert torch.equal(back, x) and back.stride() == host.stride() == x.stride()
    assert back.untyped_storage().data_ptr() != x.untyped_storage().data_ptr() and not _offload._arrivals


@pytest.mark.gpu
def test_on_a_gpu_copies_are_pinned_and_have_the_bits() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: copies run on a stream of their own")
    x = torch.randn(1 << 20, device="cuda")
    host = torch.ops.torchspan.copy_to_host(x.sin())
    back = torch.ops.torchspan.wait_for_copy(torch.ops.torchspan.copy_to_device(host, x.device))
    assert host.is_pinned() and torch.equal(back, x.sin())


def test_sac_and_offloading_stand_in_one_pipeline_in_their_order() -> None:
    assert str(Pipeline.parse("apply_sac,cpu_offload")) == "apply_sac,cpu_offload"
    with pytest.raises(InputError, match="write apply_sac,cpu_offload"):
        Pipeline.parse("cpu_offload,apply_sac")


@pytest.mark.parametrize(("option", "message"), [("min_mb=-1", "expected 0 or more"), ("ahead=0", "expected 1 or more")])
def test_options_that_cannot_be_are_refused(option: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Pipeline.parse(f"cpu_offload{{{option}}}")


def test_a_copy_that_is_read_before_it_is_waited_for_is_refused(on_gpu: Graph) -> None:
    after, _ = run("cpu_offload{min_mb=0}", on_gpu)
    wait = called(after, "wait_for_copy")[0]
    reader = next(iter(wait.users))
    reader.replace_input_with(wait, wait.args[0])  # type: ignore[arg-type]
    with pytest.raises(PassError, match="before it is waited for"):
        Pipeline.parse("cpu_offload").passes[0].ensure(after, after)
