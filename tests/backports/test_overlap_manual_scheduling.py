"""The overlap passes: fewer collectives, which overlap, and every number bitwise what it was, on real ranks."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking

OURS = is_lacking(REGISTRY.get("overlap_manual_scheduling").BACKPORT)

PROGRAM = """
import json, sys
import torch, torchspan
torchspan.activate(device="off")
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed._functional_collectives import all_gather_tensor_autograd


class Sharded(nn.Module):
    # a linear layer whose weight and bias are cut over the ranks, as FSDP does
    def __init__(self, dim, rank, size):
        super().__init__()
        whole = torch.randn(dim, dim), torch.randn(dim)
        self.weight, self.bias = (nn.Parameter(x.chunk(size)[rank].clone()) for x in whole)

    def forward(self, x):
        group = dist.group.WORLD.group_name
        return nn.functional.linear(x, *(all_gather_tensor_autograd(p, 0, group) for p in (self.weight, self.bias)))


class Block(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.first, self.second = Sharded(*args), Sharded(*args)

    def forward(self, x):
        return x + self.second(self.first(x).sin()) / 4


class Model(nn.Module):
    def __init__(self, *args):
        super().__init__()
        self.layers = nn.ModuleDict({str(index): Block(*args) for index in range(3)})
        self.output = Sharded(*args)

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x)
        return self.output(x).square().mean()


def names(gm):
    # collectives in the order of the graph
    found = []
    for node in gm.graph.nodes:
        text = str(node.target)
        kind = next((kind for kind in ("all_gather_into_tensor", "reduce_scatter_tensor", "wait_tensor") if kind in text), None)
        if kind is not None:
            found.append({"a": "gather", "r": "scatter", "w": "wait"}[kind[0]])
    return found


def passes(kind):
    from torch._inductor.fx_passes.overlap_manual_scheduling import manual_overlap_bucketing
    from torch._inductor.fx_passes.overlap_scheduling import schedule_overlap_bucketing
    plan = ["layers.0", "layers.1", ["layers.2", "output"]]
    return {
        "manual": lambda gm: manual_overlap_bucketing(gm, plan, insert_overlap_deps=False),
        "auto": lambda gm: schedule_overlap_bucketing(gm, collective_bucketing=True),
        "order": lambda gm: schedule_overlap_bucketing(gm),
    }[kind]


def work(rank, port, kinds):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model, x = Model(8, rank, 2), torch.randn(4, 8)
    expected = model(x)
    expected.backward()
    gradients = [p.grad for p in model.parameters()]
    report = {}
    for kind in kinds:
        model.zero_grad()
        seen = []

        def compiler(gm, inputs):
            before = names(gm)
            passes(kind)(gm)
            seen.append({"before": before, "after": names(gm)})
            return gm.forward

        torch._dynamo.reset()
        found = torch.compile(model, backend=aot_autograd(fw_compiler=compiler, bw_compiler=compiler), fullgraph=True)(x)
        found.backward()
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close([p.grad for p in model.parameters()], gradients, rtol=0, atol=0)
        report[kind] = seen
    if rank == 0:
        print(json.dumps(report))
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, args=(int(sys.argv[1]), sys.argv[2:]), nprocs=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not OURS, reason="torch's own asks a GPU how fast it is")
def test_collectives_are_merged_and_overlap_and_no_number_changes(run_python: Any) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    answer = json.loads(run_python(PROGRAM, port, "manual", "auto", "order").stdout.strip().splitlines()[-1])
    forward, backward = answer["manual"]
    assert forward["before"].count("gather") == 14 and backward["before"].count("scatter") == 14
    assert forward["after"].count("gather") == 3, "one for each part of the plan"
    assert backward["after"].count("scatter") == 3
    assert forward["after"][:3] == ["gather", "gather", "wait"], "the second begins before the wait for the first"
    scatters = [name for name in backward["after"] if name != "gather"]
    assert scatters[-1] == "wait" and ["scatter", "scatter"] in [scatters[at : at + 2] for at in range(len(scatters))]
    forward, backward = answer["auto"]
    assert forward["after"].count("gather") == 1 and backward["after"].count("scatter") == 1
    forward, backward = answer["order"]
    assert forward["after"].count("gather") == 14
    assert forward["after"][:4] == ["gather", "gather", "wait", "gather"]


def test_a_graph_without_collectives_stays_as_it_is(environment: Any) -> None:
    from torch._inductor.fx_passes.overlap_scheduling import schedule_overlap_bucketing
    from torch.fx.experimental.proxy_tensor import make_fx

    gm = make_fx(lambda x: x.sin() + 1)(torch.ones(2))
    before = str(gm.graph)
    assert schedule_overlap_bucketing(gm) is gm and str(gm.graph) == before


@pytest.mark.skipif(not OURS, reason="torch's own has them")
def test_what_is_not_there_says_so_when_it_is_used(environment: Any) -> None:
    from torch._inductor.fx_passes.overlap_manual_scheduling import ManualOverlapScheduler
    from torch._inductor.fx_passes.overlap_scheduling import CollectiveInfo, OverlapScheduler, schedule_overlap_bucketing

    from torchspan.core.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match=r"since 2\.10\.0; call manual_overlap_bucketing"):
        ManualOverlapScheduler(torch.fx.GraphModule({}, torch.fx.Graph()), [], False)
    with pytest.raises(UnsupportedError, match=r"since 2\.10\.0; call schedule_overlap_bucketing"):
        OverlapScheduler(torch.fx.GraphModule({}, torch.fx.Graph()))
    with pytest.raises(UnsupportedError, match=r"CollectiveInfo: .* estimates no times"):
        CollectiveInfo(None, None, 0, 0.0, 0.0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'max_flights'"):
        schedule_overlap_bucketing(torch.fx.GraphModule({}, torch.fx.Graph()), max_flights=3)


def test_a_view_of_a_graph_has_the_nodes_of_each_module(environment: Any) -> None:
    from torch._inductor.fx_passes.overlap_manual_scheduling import get_subgraph_by_path, make_graph_view

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    nodes = {name: graph.call_function(torch.sin, (x,)) for name in ("wq", "wk", "norm")}
    layer, inner = ("L['self']._modules['layers']['0']", torch.nn.ModuleList), torch.nn.Linear
    for name in ("wq", "wk"):
        nodes[name].meta["nn_module_stack"] = {"a": layer, "b": (f"{layer[0]}._modules['{name}']", inner)}
    nodes["norm"].meta["fwd_nn_module_stack"] = {"a": ("L['self']._modules['norm']", torch.nn.LayerNorm)}
    view = make_graph_view(graph)
    assert view is not None and list(view.children) == ["layers", "norm"]
    assert get_subgraph_by_path(view, "layers.0") == [nodes["wq"], nodes["wk"]]
    assert get_subgraph_by_path(view, ["norm", "layers.0.wk", "layers.7"]) == [nodes["norm"], nodes["wk"]]
    assert view["layers"]["0"].wk.klass is inner and nodes["wk"] in view.layers.unique_nodes
    assert repr(view.norm) == "LayerNorm()" and "(wk): Linear()" in repr(view)
    graph_view = make_graph_view(graph, lambda node: [("a.b", torch.nn.Module)] if node.name == "x" else [])
    assert graph_view is not None and get_subgraph_by_path(graph_view, "a.b") == [x]
    assert make_graph_view(torch.fx.Graph()) is None
