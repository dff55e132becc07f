"""Graphs to run passes on: a training step of one process, and one of eight ranks of which this process is the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from torchspan.capture._state import BoundGraph
from torchspan.capture.train_step import capture_train_step
from torchspan.core.graph import Graph
from torchspan.core.program import Program
from torchspan.models.llama3 import FLAVOURS, MODEL, Llama3
from torchspan.parallel.mesh import TP, Degrees, build_meshes, submesh
from torchspan.parallel.reshard import Resharding
from torchspan.parallel.simple_fsdp import MixedPrecision, apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel
from torchspan.passes._base import editable
from torchspan.private import distributed


class Loss(nn.Module):
    """Cross-entropy of a model's logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).flatten(0, 1), labels.flatten())


@pytest.fixture
def tokens() -> tuple[Tensor, Tensor]:
    """Tokens and labels, (2, 8)."""
    draw = torch.Generator().manual_seed(1)
    return torch.randint(256, (2, 8), generator=draw), torch.randint(256, (2, 8), generator=draw)


@pytest.fixture
def program(tokens: tuple[Tensor, Tensor]) -> Program:
    """The step of a tiny Llama 3 in one process."""
    return Program(Loss(Llama3(FLAVOURS["tiny"]).init_weights(0)), tokens)


class Captures:
    """Each step is captured once for all tests; a test has a copy of its own, in a job that has the groups of the first."""

    def __init__(self) -> None:
        self._made: dict[Any, tuple[Graph, dict[str, list[int]]]] = {}

    def get(self, key: Any, capture: Callable[[], Graph]) -> Graph:
        """What `capture` gave when it was called for `key`."""
        if key not in self._made:
            graph = capture()
            texts = {arg for node in graph.module.graph.nodes for arg in node.args if isinstance(arg, str)}
            self._made[key] = graph, {name: distributed.group_ranks(name) for name in texts if distributed.find_group(name)}
        graph, groups = self._made[key]
        distributed.add_groups((name, ranks) for name, ranks in groups.items() if not distributed.find_group(name))
        assert groups == {name: distributed.group_ranks(name) for name in groups}
        return replace(graph, module=editable(graph))


@pytest.fixture(scope="session")
def captures() -> Captures:
    """The steps that tests have asked for."""
    return Captures()


@pytest.fixture
def graph(program: Program, captures: Captures) -> Graph:
    """Its training step."""
    return captures.get("one process", lambda: capture_train_step(program))


@pytest.fixture
def eight_ranks() -> Iterator[None]:
    """A job of eight ranks of which this process is the first; nothing is sent, so only shapes and counts are real."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=8, store=FakeStore())
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def sharded(tokens: tuple[Tensor, Tensor], eight_ranks: None, captures: Captures) -> Callable[..., Graph]:
    """The training step of the same model on a mesh of eight ranks."""

    def capture(dp_shard: int, tp: int, capture: Any, reshard: bool, **precision: Any) -> Graph:
        mesh = build_meshes(Degrees(dp_shard, tp), 8).dense
        assert mesh is not None
        model = Llama3(FLAVOURS["tiny"]).init_weights(0)
        tp_mesh = submesh(mesh, TP)
        if tp_mesh is not None:
            apply_tensor_parallel(model, tp_mesh, MODEL.tensor_parallel)
        resharding = Resharding(model) if reshard else None
        graph: Graph = capture(Program(Loss(apply_simple_fsdp(model, mesh, MixedPrecision(**precision), resharding)), tokens))
        return graph

    def get(dp_shard: int = 4, tp: int = 2, how: Any = capture_train_step, reshard: bool = False, **precision: Any) -> Graph:
        key = (dp_shard, tp, how, reshard, *sorted(precision.items(), key=str))
        return captures.get(key, lambda: capture(dp_shard, tp, how, reshard, **precision))

    return get


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operators have made and that something still holds."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        keys = {x.untyped_storage()._cdata for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in torch.utils._pytree.tree_leaves(result):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in keys:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, self.now())
        return result

    def now(self) -> int:
        """The bytes that are held."""
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        return sum(num_bytes for _, num_bytes in self._made.values())


@pytest.fixture
def measured() -> Callable[[Graph, Program], tuple[int, int]]:
    """Runs the step of a graph; the bytes that are held when its backward begins, and the most that ever are.

    The backward begins with the first node that knows nothing of the forward but the loss.
    """

    def measure(graph: Graph, program: Program) -> tuple[int, int]:
        counted, at_border = LiveBytes(), list[int]()
        loss = next(value for spec, value in zip(graph.outputs, graph.output_values()) if spec.kind == "loss")
        tangents = [node for spec, node in zip(graph.inputs, graph.placeholders()) if spec.kind == "tangent"]
        first = min(
            (user for node in (tangents or [loss]) for user in node.users if user.op != "output"), key=attrgetter("_sort_key")
        )
        module = torch.fx.GraphModule(graph.module, torch.fx.Graph(owning_module=graph.module))
        copies: dict[Any, Any] = {}
        for node in graph.module.graph.nodes:
            if node is first:
                module.graph.call_function(lambda: at_border.append(counted.now()))
            copies[node] = module.graph.node_copy(node, copies.__getitem__)
        module.graph.set_codegen(graph.module.graph._codegen)
        module.meta = dict(graph.module.meta)
        module.recompile()
        step = BoundGraph(graph.with_module(module, "probe"), program.target)
        with counted:
            step(*program.args)
        return at_border[0], counted.peak

    return measure


@pytest.fixture
def experts(tokens: tuple[Tensor, Tensor], eight_ranks: None, captures: Captures) -> Callable[..., Graph]:
    """The training step of a tiny DeepSeek V3 on eight ranks, of the degrees that are given."""
    from torchspan.models import deepseek_v3
    from torchspan.train.parallelize import parallelize

    def capture(**degrees: int) -> Graph:
        model = deepseek_v3.DeepSeekV3(deepseek_v3.FLAVOURS["tiny"]).init_weights(0)
        parallelize(model, deepseek_v3.MODEL, build_meshes(Degrees(**degrees), 8))
        return capture_train_step(Program(Loss(model), tokens))

    return lambda **degrees: captures.get(("experts", *sorted(degrees.items())), lambda: capture(**degrees))
