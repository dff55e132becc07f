"""AOTAutograd in two steps: the joint graph, what its inputs and outputs mean, and the function that is compiled from it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    pytest.mark.filterwarnings("ignore:Your compiler for AOTAutograd is returning a function that doesn't take boxed"),
]

OURS = is_lacking(REGISTRY.get("joint_with_descriptors").BACKPORT)


class Model(nn.Module):
    """Tied parameters, buffers that are written, outputs that share memory, one without a gradient, an argument by name."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("count", torch.ones(3))

    def forward(self, x: Tensor, mask: Tensor | None = None, *, scale: Tensor) -> dict[str, Any]:
        hidden = self.norm(self.first(x)).sin()
        self.count.add_(1)
        flat = hidden.view(-1)
        return {"out": self.second(hidden) * scale, "plain": hidden.detach(), "flat": flat, "part": flat[1:], "mask": mask}


def export(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    with ExitStack() as stack:
        return aot_export_joint_with_descriptors(stack, module, args, kwargs)


def compile_joint(joint: Any, **options: Any) -> Callable[..., Any]:
    from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors

    return aot_compile_joint_with_descriptors(joint, **options)


def meanings(joint: Any) -> tuple[list[str], list[str | None]]:
    """What each input and output of the joint graph means, as expressions."""
    graph = joint.graph_module.graph
    inputs = [node.meta["desc"].expr() for node in graph.find_nodes(op="placeholder")]
    return inputs, [descriptor and descriptor.expr() for descriptor in graph.output_node().meta["desc"]]


def state_of(joint: Any, module: nn.Module) -> list[Tensor]:
    parameters = dict(module.named_parameters(remove_duplicate=False))
    buffers = dict(module.named_buffers(remove_duplicate=False))
    return [*(parameters[name] for name in joint.params_spec), *(buffers[name] for name in joint.buffers_spec)]


def test_the_compiled_function_does_what_the_module_does_bitwise() -> None:
    torch.manual_seed(0)
    model, x, scale = Model(), torch.randn(4, 3), torch.tensor(2.0, requires_grad=True)
    reference = copy.deepcopy(model)
    joint = export(model, x, scale=scale)
    called: list[str] = []

    def compiler(which: str) -> Callable[..., Any]:
        def note(module: Any, inputs: Any) -> Any:
            called.append(which)
            return module.forward

        return note

    function = compile_joint(joint, fw_compiler=compiler("forward"), bw_compiler=compiler("backward"))
    assert called == ["forward", "backward"]
    for _ in range(2):  # the buffers are written each time
        actual = function(*state_of(joint, model), x, scale=scale)
        expected = reference(x, scale=scale)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    gradients = [
        torch.autograd.grad(result["out"].sum() + result["flat"].sin().sum(), [*module.parameters(), scale])
        for result, module in ((actual, model), (expected, reference))
    ]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), rtol=0, atol=0)


def test_descriptors_say_what_each_input_and_output_is() -> None:
    joint = export(Model(), torch.randn(4, 3), scale=torch.tensor(2.0, requires_grad=True))
    inputs, outputs = meanings(joint)
    parameters = [f"self.get_parameter({name!r})" for name in joint.params_spec]
    buffers = [f"self.get_buffer({name!r})" for name in joint.buffers_spec]
    tangents = ["__output_tangent(output[0])", "__output_tangent(__intermediate_base(output[2]))"]
    assert joint.params_spec[:3] == ["first.weight", "first.bias", "second.weight"]
    assert inputs == [*parameters, *buffers, "args[0]", "args[1]", *tangents]
    forward = [*(f"output[{index}]" for index in range(5)), "__intermediate_base(output[2])"]
    gradients = [f"__grad({name})" for name in parameters]
    nothing = [None] * (len(buffers) + 1)
    written = [f"__input_mutation({name})" for name in buffers]
    assert outputs == [*written, *forward, *gradients, *nothing, "__grad(args[1])"]
    assert joint.out_spec.num_leaves == 5


def test_the_descriptors_of_dtensors_are_of_their_parts(run_python: Any) -> None:
    process = run_python(
        """
        import torch, torchspan
        torchspan.activate(device="off")
        from contextlib import ExitStack
        from torch.testing._internal.distributed.fake_pg import FakeStore
        from torch.distributed.tensor import DTensor, Replicate, Shard, init_device_mesh
        torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
        mesh = init_device_mesh("cpu", (2,))
        model = torch.nn.Linear(4, 4, bias=False)
        model.weight = torch.nn.Parameter(DTensor.from_local(torch.randn(2, 4), mesh, [Shard(0)]))
        x = DTensor.from_local(torch.randn(2, 4), mesh, [Replicate()])
        from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors, aot_export_joint_with_descriptors
        with ExitStack() as stack:
            joint = aot_export_joint_with_descriptors(stack, model, (x,))
        graph = joint.graph_module.graph
        names = [node.meta["desc"].expr() for node in graph.find_nodes(op="placeholder")]
        names += [desc.expr() for desc in graph.output_node().meta["desc"] if desc is not None]
        print([name for name in names if "_local_tensor" in name])  # newer ones pass meshes beside them
        out = aot_compile_joint_with_descriptors(joint)(model.weight, x)
        out.sum().backward()
        assert out.placements == (Shard(1),) and model.weight.grad.placements == (Shard(0),)
        torch.testing.assert_close(out.to_local(), x.to_local() @ model.weight.to_local().T)
        torch.distributed.destroy_process_group()
        """
    )
    expected = [
        "self.get_parameter('weight')._local_tensor",
        "args[0]._local_tensor",
        "__output_tangent(output[0])._local_tensor",
        "output[0]._local_tensor",
        "__grad(self.get_parameter('weight'))._local_tensor",
    ]
    assert process.stdout.strip().splitlines()[-1] == str(expected)


def test_a_pass_may_change_the_joint_graph_before_it_is_compiled() -> None:
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    joint = export(model, x)
    graph = joint.graph_module.graph
    output = graph.output_node()
    values = list(pytree.arg_tree_leaves(*output.args))
    with graph.inserting_after(values[0]):
        doubled = graph.call_function(torch.ops.aten.mul.Tensor, (values[0], 2))
        doubled.meta = {**values[0].meta}
    output.args = ([doubled, *values[1:]],)
    joint.graph_module.recompile()
    torch.testing.assert_close(compile_joint(joint)(*model.parameters(), x), model(x) * 2)


def test_without_gradients_the_graph_is_a_forward() -> None:
    model, x = nn.BatchNorm1d(3), torch.randn(4, 3)
    with torch.no_grad():
        joint = export(model, x)
        inputs, outputs = meanings(joint)
        result = compile_joint(joint)(*state_of(joint, model), x)
    assert "args[0]" in inputs and outputs[-1] == "output[0]" and not any("grad" in name for name in outputs if name)
    model.reset_running_stats()
    torch.testing.assert_close(result, model(x))


def test_decompositions_replace_operators_and_compilers_may_compile_themselves() -> None:
    from torch._decomp import get_decompositions

    model, x = nn.Sequential(nn.Linear(3, 3), nn.GELU()), torch.randn(4, 3)
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    table = get_decompositions([torch.ops.aten.gelu, torch.ops.aten.gelu_backward])
    with ExitStack() as stack:
        joint = aot_export_joint_with_descriptors(stack, model, (x,), decompositions=table)
    assert not any("gelu" in str(node.target) for node in joint.graph_module.graph.nodes)

    def compiler(module: Any, inputs: Any) -> Any:
        from functorch.compile import make_boxed_func, nop
        from torch._functorch.aot_autograd import aot_function

        with torch._subclasses.fake_tensor.unset_fake_temporarily():  # what is traced inside is not the joint graph
            inner = aot_function(lambda x: (x.sin(), x), nop)
            torch.testing.assert_close(inner(torch.ones(2))[0], torch.ones(2).sin())
        return make_boxed_func(module.forward)

    result = compile_joint(joint, fw_compiler=compiler, bw_compiler=compiler)(*model.parameters(), x)
    torch.testing.assert_close(result, model(x))


def test_capture_export_and_compile_in_a_row_as_torchtitan_does() -> None:
    from torch._dynamo.functional_export import dynamo_graph_capture_for_export
    from torch._guards import tracing
    from torch.fx.traceback import annotate_fn, preserve_node_meta

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm = nn.Linear(4, 4), nn.RMSNorm(4)

        @annotate_fn({"part": "block"})
        def forward(self, x: Tensor) -> Tensor:
            return x + self.layer(self.norm(x)).relu()

    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({str(index): Block() for index in range(2)})

        def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
            for block in self.layers.values():
                x = block(x)
            return x if mask is None else x * mask

    model, x, mask = Stack(), torch.randn(5, 4), torch.rand(4)
    with torch._dynamo.config.patch(fake_tensor_cache_enabled=False), preserve_node_meta():
        captured = dynamo_graph_capture_for_export(model)(x, mask=mask)
    with tracing(captured.meta["tracing_context"]):
        joint = export(captured, x, mask=mask)
    relu = next(node for node in joint.graph_module.graph.nodes if "relu" in str(node.target))
    assert relu.meta["custom"] == {"part": "block"} and "self.layer(self.norm(x))" in relu.meta["stack_trace"]
    assert "layers" in str(relu.meta["nn_module_stack"])
    backward = [node for node in joint.graph_module.graph.nodes if "threshold_backward" in str(node.target)]
    assert len(backward) == 2 and all(node.meta["custom"] == {"part": "block"} for node in backward)
    with tracing(captured.meta["tracing_context"]):
        function = compile_joint(joint)
    actual, expected = function(*model.parameters(), x, mask=mask), model(x, mask=mask)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    gradients = [torch.autograd.grad(out.sum(), [*model.parameters()]) for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_an_outer_trace_goes_through_the_compiled_function() -> None:
    model, x = nn.Linear(3, 3), torch.randn(4, 3)
    function = compile_joint(export(model, x))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def outer(weight: Tensor, bias: Tensor, x: Tensor) -> Tensor:
        return function(weight, bias, x) + 1

    torch.testing.assert_close(outer(*model.parameters(), x), model(x) + 1)


@pytest.mark.skipif(not OURS, reason="torch's own can, or raises errors of its own")
def test_what_old_torch_cannot_is_an_error() -> None:
    from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors, aot_export_joint_with_descriptors

    joint = export(nn.Linear(3, 3), torch.randn(4, 3))
    with pytest.raises(UnsupportedError, match=r"disable_functionalization: .*since 2\.11\.0"):
        aot_export_joint_with_descriptors(ExitStack(), nn.Linear(1, 1), (torch.ones(1, 1),), disable_functionalization=True)
    with pytest.raises(UnsupportedError, match=r"serializable=True.*since 2\.11\.0.*torchspan\.precompile"):
        aot_compile_joint_with_descriptors(joint, serializable=True)


def test_joint_graphs_and_descriptors_are_found_where_upstream_has_them() -> None:
    from torch._functorch._aot_autograd import descriptors
    from torch._functorch.aot_autograd import JointWithDescriptors

    joint = export(nn.Linear(3, 3), torch.randn(4, 3))
    assert isinstance(joint, JointWithDescriptors) and isinstance(joint.graph_module, torch.fx.GraphModule)
    weight = joint.graph_module.graph.find_nodes(op="placeholder")[0].meta["desc"]
    assert weight == descriptors.ParamAOTInput("weight") and weight.is_param() and not weight.is_buffer()
    gradient = joint.graph_module.graph.output_node().meta["desc"][1]
    assert gradient == descriptors.GradAOTOutput(weight) and gradient.is_grad()
    assert hash(gradient) == hash(descriptors.GradAOTOutput(descriptors.ParamAOTInput("weight")))
    assert descriptors.SubclassGetAttrAOTInput(weight, "_local_tensor").is_param()
