"""annotate: in make_fx, in dynamo, and through AOTAutograd to the forward and the backward."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, traceback
from torch.fx.experimental.proxy_tensor import make_fx

pytestmark = pytest.mark.usefixtures("environment")


def customs(gm: GraphModule) -> list[tuple[str, Any]]:
    """Name and annotation of every call; not of detach, which some versions of torch write and others do not."""
    calls = [(node, str(node.target).removesuffix(".default").removeprefix("aten.")) for node in gm.graph.nodes]
    return [(name, node.meta.get("custom")) for node, name in calls if node.op.startswith("call_") and name != "detach"]


class Captured:
    """A backend that keeps dynamo's graph, the forward and the backward, and runs them as they are."""

    def __init__(self) -> None:
        self.dynamo: list[GraphModule] = []
        self.forward: list[GraphModule] = []
        self.backward: list[GraphModule] = []

    def __call__(self, gm: GraphModule, inputs: list[Any]) -> Any:
        from torch._dynamo.backends.common import aot_autograd

        self.dynamo.append(gm)
        return aot_autograd(fw_compiler=self._keep(self.forward), bw_compiler=self._keep(self.backward))(gm, inputs)

    @staticmethod
    def _keep(place: list[GraphModule]) -> Any:
        from torch._functorch.aot_autograd import make_boxed_func

        def compiler(gm: GraphModule, inputs: list[Any]) -> Any:
            place.append(gm)
            return make_boxed_func(gm.forward)

        return compiler


def train(function: Any, *inputs: torch.Tensor) -> Captured:
    """Compile, run forward and backward once, and compare with eager."""
    captured = Captured()
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    torch.compile(function, backend=captured, fullgraph=True)(*leaves).sum().backward()
    eager = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    function(*eager).sum().backward()
    for actual, reference in zip(leaves, eager, strict=True):
        assert torch.equal(actual.grad, reference.grad)
    return captured


def test_eager_code_is_unchanged_and_the_state_is_restored_after_an_error() -> None:
    before = dict(traceback.get_current_meta())
    with traceback.annotate({"a": 1}):
        assert torch.equal(torch.ones(2).sin(), torch.ones(2).sin())
    with pytest.raises(ZeroDivisionError), traceback.annotate({"a": 1}), traceback.annotate({"b": 1}):
        _ = 1 / 0
    assert traceback.get_current_meta() == before


def nested(x: torch.Tensor) -> torch.Tensor:
    with traceback.annotate({"a": 1, "n": "outer"}):
        x = x.sin()
        with traceback.annotate({"n": "inner", "b": 2}):
            x = x.cos()
        x = x.exp()
    return x.tanh()


NESTED = [
    ("sin", {"a": 1, "n": "outer"}),
    ("cos", {"a": 1, "n": "inner", "b": 2}),
    ("exp", {"a": 1, "n": "outer"}),
    ("tanh", None),
]


def test_make_fx_annotates_where_metadata_is_preserved() -> None:
    with traceback.preserve_node_meta():
        assert [(name, custom or None) for name, custom in customs(make_fx(nested)(torch.ones(2)))] == NESTED
    assert [custom for _, custom in customs(make_fx(nested)(torch.ones(2)))] == [None] * 4


def test_a_compiled_function_is_annotated_in_dynamo_forward_and_backward() -> None:
    captured = train(nested, torch.ones(2))
    assert customs(captured.dynamo[0]) == NESTED
    assert customs(captured.forward[0]) == NESTED
    backward = customs(captured.backward[0])
    assert [custom for name, custom in backward if name == "sin"] == [{"a": 1, "n": "inner", "b": 2}]
    assert [custom for name, custom in backward if name == "cos"] == [{"a": 1, "n": "outer"}]
    kinds = [None if custom is None else custom["n"] for _, custom in backward]
    assert [kind for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind] == [None, "outer", "inner", "outer"]


def test_a_module_with_parameters_is_annotated_forward_and_backward() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with traceback.annotate({"region": "first"}):
                x = self.first(x).sin()
            return self.second(x)

    captured = train(Model(), torch.ones(2, 4))
    assert [name for name, custom in customs(captured.forward[0]) if custom == {"region": "first"}] == ["t", "addmm", "sin"]
    backward = customs(captured.backward[0])
    assert backward[0][1] is None and backward[-1][1] == {"region": "first"}
    assert sum(custom == {"region": "first"} for name, custom in backward if name == "mm") == 2
    assert sum(custom is None for name, custom in backward if name == "mm") == 2


def test_annotate_fn_annotates_all_of_a_function() -> None:
    @traceback.annotate_fn({"stage": 3})
    def block(x: torch.Tensor, *, scale: float) -> torch.Tensor:
        """Its text."""
        return x.sin() * scale

    assert block.__name__ == "block" and block.__doc__ == "Its text."
    captured = train(lambda x: block(x, scale=2.0).cos(), torch.ones(2))
    assert customs(captured.forward[0]) == [("sin", {"stage": 3}), ("mul.Tensor", {"stage": 3}), ("cos", None)]


def test_as_a_decorator_it_annotates_each_call_of_a_method() -> None:
    class Model(torch.nn.Module):
        @traceback.annotate({"part": "inner"})
        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return x.sin()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with traceback.annotate({"stage": 0}):
                return self.inner(x) * self.inner(x + 1)

    captured = train(Model(), torch.ones(3))
    inner, outer = {"stage": 0, "part": "inner"}, {"stage": 0}
    assert customs(captured.forward[0]) == [("sin", inner), ("add.Tensor", outer), ("sin", inner), ("mul.Tensor", outer)]
    assert "custom" not in traceback.get_current_meta()


def test_a_sum_of_gradients_is_not_annotated() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with traceback.annotate({"a": 1}):
            return x.sin() * x.cos()

    backward = customs(train(program, torch.ones(2)).backward[0])
    assert [custom for name, custom in backward if name == "add.Tensor"] == [None]
    assert all(custom == {"a": 1} for name, custom in backward if name != "add.Tensor")


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_program_is_annotated(strict: bool) -> None:
    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with traceback.annotate({"stage": 0}):
                x = x.sin()
            return x.cos()

    with traceback.preserve_node_meta():
        exported = torch.export.export(Model(), (torch.ones(2),), strict=strict)
    stages = [(name, (custom or {}).get("stage")) for name, custom in customs(exported.graph_module)]
    assert stages == [("sin", 0), ("cos", None)]


def test_annotations_cross_a_checkpoint() -> None:
    from torch.utils.checkpoint import checkpoint

    def block(x: torch.Tensor) -> torch.Tensor:
        with traceback.annotate({"a": 1}):
            return x.sin().cos()

    captured = train(lambda x: checkpoint(block, x, use_reentrant=False).exp(), torch.ones(2))
    assert [name for name, custom in customs(captured.forward[0]) if custom == {"a": 1}] == ["sin", "cos"]
    assert sum(custom == {"a": 1} for _, custom in customs(captured.backward[0])) >= 3


def test_a_graph_break_inside_the_block_still_gives_eagers_numbers() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with traceback.annotate({"a": 1}):
            x = x.sin()
            torch._dynamo.graph_break()
            x = x.cos()
        return x + 1

    assert torch.equal(torch.compile(program, backend="eager")(torch.ones(2)), torch.ones(2).sin().cos() + 1)
    assert "custom" not in traceback.get_current_meta()


def test_a_trace_that_fails_leaves_no_annotation_behind() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with traceback.annotate({"a": 1}):
            print(x)
            return x.sin()

    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(program, backend="eager", fullgraph=True)(torch.ones(2))
    assert "custom" not in traceback.get_current_meta() and not traceback.has_preserved_node_meta()


@pytest.mark.parametrize("order", ["before", "after"])
def test_activation_before_or_after_dynamo_is_imported_and_undone_after_use(run_python, order: str) -> None:
    process = run_python(
        """
        import sys
        import torch
        from torchspan.backports._base import REGISTRY, is_lacking
        from torchspan.environment.scope import Environment

        backport = REGISTRY.get("annotate").BACKPORT
        assert "torch._dynamo" not in sys.modules
        if sys.argv[1] == "after":
            import torch._dynamo.variables.torch
        environment = Environment(backport.patches()).activate()
        assert ("torch._dynamo" in sys.modules) == (sys.argv[1] == "after")

        def program(x):
            with torch.fx.traceback.annotate({"a": 1}):
                x = x.sin()
            return x.cos()

        found = []
        def backend(gm, inputs):
            found.extend(node.meta.get("custom") for node in gm.graph.nodes if node.op == "call_method")
            return gm

        x = torch.ones(2)
        assert torch.equal(torch.compile(program, backend=backend, fullgraph=True)(x), x.sin().cos())
        assert found == [{"a": 1}, None], found
        environment.deactivate()

        from torch._dynamo.variables.torch import TorchCtxManagerClassVariable, supported_ctx_manager_classes
        assert TorchCtxManagerClassVariable.call_function.__module__ == "torch._dynamo.variables.torch"
        assert not hasattr(TorchCtxManagerClassVariable.call_function, "__wrapped__")
        if is_lacking(backport):
            assert not hasattr(torch.fx.traceback, "annotate")
            try:
                program(x)
            except AttributeError as error:
                assert "annotate" in str(error)
            else:
                raise AssertionError("annotate is still there")
        assert not any("torchspan" in str(getattr(key, "__code__", "")) for key in supported_ctx_manager_classes)
        print("held")
        """,
        order,
    )
    assert process.stdout.endswith("held\n"), sys.version


def test_the_annotated_nodes_of_a_graph_and_of_the_graphs_in_it_are_text() -> None:
    inner = torch.fx.symbolic_trace(lambda x: x.sin().cos())
    next(iter(inner.graph.find_nodes(op="call_method", target="sin"))).meta["custom"] = {"part": 1}
    outer = torch.fx.Graph()
    x = outer.placeholder("x")
    called = outer.get_attr("inner")
    result = outer.call_function(torch.neg, (x,))
    outer.output((called, result))
    x.meta["custom"] = result.meta["custom"] = {"stage": 0, "bucket": 2}
    text = traceback._get_custom_metadata(GraphModule({"inner": inner}, outer))
    assert text.splitlines() == [
        "('placeholder', 'x', {'stage': 0, 'bucket': 2})",
        "[('call_method', 'sin', {'part': 1})]",
        "('call_function', 'neg', {'stage': 0, 'bucket': 2})",
    ]
    assert traceback._get_custom_metadata(torch.fx.symbolic_trace(lambda x: x.sin())) == ""
