"""regional_inductor: annotated parts are compiled, forward and backward; the rest runs as it is; eager's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import traceback
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.backports._base import REGISTRY, is_lacking

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # inductor's imports, from 2.13 on
]


class Model(torch.nn.Module):
    """Two annotated parts with something else between and after them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with traceback.annotate({"compile_with_inductor": "attention"}):
            x = self.first(x).softmax(dim=-1)
        x = x.sin()
        with traceback.annotate({"compile_with_inductor": {"inductor_configs": {"fallback_random": True}}}):
            x = self.second(x).relu()
        return x * 2


@pytest.fixture
def compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[bool]]:
    """One entry for each part that inductor compiles: the option that the annotation of the second part sets."""
    import torch._inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    values: list[bool] = []
    compile_part = torch._inductor.standalone_compile

    def counted(*args: Any, **kwargs: Any) -> Any:
        values.append(torch._inductor.config.fallback_random)
        return compile_part(*args, **kwargs)

    monkeypatch.setattr(torch._inductor, "standalone_compile", counted)
    return values


def backend() -> Any:
    from torch._dynamo.backends.common import aot_autograd
    from torch.fx.passes.regional_inductor import regional_inductor

    return aot_autograd(fw_compiler=regional_inductor, bw_compiler=regional_inductor)


def test_two_parts_are_compiled_forward_and_backward_with_eagers_gradients(compiles: list[bool]) -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 4)
    compiled = torch.compile(model, backend=backend(), fullgraph=True)
    actual = compiled(x)
    assert compiles == [False, True]
    actual.sum().backward()
    assert len(compiles) == 4 and compiles[2]  # upstream gives the fourth a node of the second part, and so its option
    gradients = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    expected = model(x)
    expected.sum().backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients, [parameter.grad for parameter in model.parameters()])


def test_a_part_of_a_graph_that_is_called_twice_is_compiled_once(compiles: list[bool]) -> None:
    @torch.compiler.nested_compile_region
    def nested(x: torch.Tensor) -> torch.Tensor:
        with traceback.annotate({"compile_with_inductor": 0}):
            return x.sin()

    def program(x: torch.Tensor) -> torch.Tensor:
        return nested(nested(x + 1) + 1)

    x = torch.randn(3)
    torch.testing.assert_close(torch.compile(program, backend=backend(), fullgraph=True)(x), program(x))
    assert len(compiles) == 1


@pytest.mark.slow
def test_a_part_with_dynamic_shapes_is_compiled_once(compiles: list[bool]) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with traceback.annotate({"compile_with_inductor": "part"}):
            y = x.reshape(-1) * x.shape[0]
        return y.sin()

    compiled = torch.compile(program, backend=backend(), fullgraph=True, dynamic=True)
    for size in (3, 5, 8):
        torch.testing.assert_close(compiled(torch.ones(size, 2)), program(torch.ones(size, 2)))
    assert len(compiles) == 1


@pytest.mark.parametrize("mode", ["real", "symbolic"])
def test_a_traced_graph_is_compiled_outside_of_torch_compile_too(compiles: list[bool], mode: str) -> None:
    if not is_lacking(REGISTRY.get("regional_inductor").BACKPORT):
        pytest.skip("torch's own needs the context of a torch.compile")
    from torch.fx.passes.regional_inductor import regional_inductor

    def program(x: torch.Tensor) -> torch.Tensor:
        return (x.sin() + x.shape[0]).cos()

    gm = make_fx(program, tracing_mode=mode)(torch.ones(3, 2))
    for node in gm.graph.nodes:
        if node.name.startswith("add"):
            node.meta["custom"] = {"compile_with_inductor": "part"}
    compiled = regional_inductor(gm, torch.ones(3, 2))
    for size in (3, 5) if mode == "symbolic" else (3,):
        boxed = [torch.ones(size, 2)]
        torch.testing.assert_close(compiled(boxed), program(torch.ones(size, 2)))
        assert boxed == [], "the inputs are freed"
    assert len(compiles) == 1


def test_a_graph_without_annotations_runs_as_it_is(compiles: list[bool]) -> None:
    from torch.fx.passes.regional_inductor import regional_inductor

    gm = make_fx(lambda x: x.sin() + 1)(torch.ones(2))
    assert torch.equal(regional_inductor(gm, torch.ones(2))(torch.ones(2)), torch.ones(2).sin() + 1)
    assert compiles == []


def test_an_option_that_inductor_does_not_have_is_named(compiles: list[bool]) -> None:
    from torch.fx.passes.regional_inductor import regional_inductor

    gm = make_fx(lambda x: x.sin() + 1, tracing_mode="fake")(torch.ones(2))
    for node in gm.graph.nodes:
        if node.op == "call_function":
            node.meta["custom"] = {"compile_with_inductor": {"inductor_configs": {"no_such_option": 1}}}
    with pytest.raises(ValueError, match="Invalid inductor config key 'no_such_option'"):
        regional_inductor(gm, torch.ones(2))
    assert compiles == []
