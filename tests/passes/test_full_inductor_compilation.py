"""The whole step as one call: what is compiled, what is refused by name, what is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline

PIPELINE = Pipeline.parse("full_inductor_compilation")


class Recorder:
    """Compiles nothing, and keeps what it was given."""

    def __init__(self) -> None:
        self.modules: list[torch.fx.GraphModule] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: Sequence[Any], name: str) -> Any:
        assert len(inputs) == sum(node.op == "placeholder" for node in module.graph.nodes)
        self.modules.append(module)
        return module


def _graph(step: Callable[..., Any], *inputs: Tensor) -> Graph:
    module = make_fx(step, tracing_mode="fake")(*inputs)
    specs = tuple(InputSpec("input", str(index)) for index in range(len(inputs)))
    return Graph(module, specs, (OutputSpec("output", "0"),))


@pytest.mark.skipif(torch.__version__ < "2.9", reason="torch 2.8 is refused it")
def test_all_of_the_step_is_one_unit_with_its_collectives(sharded: Any) -> None:
    recorder, report = Recorder(), Report()
    graph = sharded(4, 2)
    after = PIPELINE.run(graph, PassContext(report, recorder))
    (whole,) = recorder.modules
    assert len(whole.graph.nodes) == len(graph.module.graph.nodes)
    assert [node.op for node in after.module.graph.nodes].count("call_module") == 1
    assert after.num_collectives() == graph.num_collectives() and graph.num_collectives()["all_gather_into_tensor"]
    assert "all_gather_into_tensor" in report.decisions[0].choice
    assert "all_gather_into_tensor" not in str(after.count_targets()), "none is left outside"


def test_on_torch_2_8_a_step_with_collectives_is_refused_and_regional_inductor_named(
    sharded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "__version__", torch.torch_version.TorchVersion("2.8.0"))
    with pytest.raises(PassError, match=r"torch 2\.8\.0.*crash.*regional_inductor"):
        PIPELINE.run(sharded(4, 2), PassContext(compile_region=Recorder()))
    PIPELINE.run(_graph(torch.relu, torch.ones(3)), PassContext(compile_region=Recorder()))


def test_what_is_left_takes_and_gives_what_the_graph_did(program: Program, graph: Graph, tokens: Any) -> None:
    after = PIPELINE.run(graph, PassContext(compile_region=Recorder()))
    state = [*program.state().values()]
    with torch.no_grad():
        pairs = zip(graph.module(*state, *tokens), after.module(*state, *tokens), strict=True)
        assert all(torch.equal(actual, other) for actual, other in pairs)
    shapes = [node.meta["val"].shape for node in graph.output_values()]
    assert [node.meta["val"].shape for node in after.output_values()] == shapes


def test_random_numbers_are_refused_by_name() -> None:
    with pytest.raises(PassError, match=r"bernoulli.*draws random numbers.*regional_inductor"):
        PIPELINE.run(_graph(torch.bernoulli, torch.ones(3)), PassContext(compile_region=Recorder()))


def test_attention_without_dropout_draws_none() -> None:
    graph = _graph(lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x), torch.ones(1, 2, 4, 8))
    assert "attention" in str(graph.count_targets())
    PIPELINE.run(graph, PassContext(compile_region=Recorder()))


def test_sizes_that_depend_on_data_are_refused_by_name() -> None:
    def step(x: Tensor) -> Tensor:
        return torch.arange(x.sum().item()) + 1  # type: ignore[arg-type]

    module = make_fx(step, tracing_mode="symbolic")(torch.tensor([2]))
    graph = Graph(module, (InputSpec("input", "0"),), (OutputSpec("output", "0"),))
    with pytest.raises(PassError, match=r"_local_scalar_dense.*depends on data, becomes a size"):
        PIPELINE.run(graph, PassContext(compile_region=Recorder()))


def test_it_stands_for_regional_inductor_and_not_beside_it() -> None:
    with pytest.raises(InputError, match="same work in two ways"):
        Pipeline.parse("regional_inductor,full_inductor_compilation")


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_inductor_in_this_process_gives_the_numbers_of_the_graph(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    x, report = torch.randn(4, 8), Report()
    graph = _graph(lambda x: (x @ x.t()).relu().sum(1), x)
    after = PIPELINE.run(graph, PassContext(report))
    assert [(attempt.region, attempt.outcome) for attempt in report.attempts] == [("step", "compiled")]
    (result,) = after.module(x)
    assert torch.allclose(result, graph.module(x), rtol=1e-5)
