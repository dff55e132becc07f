"""Capture a training step as AOTAutograd's joint graph, forward and backward in one; torch 2.10 and later."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen
from torch.optim import Optimizer

from torchspan.capture._clean import clean, keep_checks
from torchspan.capture._inputs import Inputs, keep_inputs
from torchspan.capture._optimizer import with_optimizer
from torchspan.capture._origins import stamped_with_module_paths
from torchspan.capture._state import call_for_loss, check_program, check_written, slots, tensors_of, values_told
from torchspan.core.errors import CaptureError, UnsupportedError
from torchspan.core.graph import Graph, InputSpec, OutputSpec, output_node
from torchspan.core.program import Program
from torchspan.private import aot, fx


def is_supported() -> bool:
    """Whether this torch can capture joint graphs."""

    return aot.joint_export() is not None


def capture_joint(program: Program, *, optimizer: Optimizer | None = None) -> Graph:
    """The joint graph of a module whose forward gives a scalar loss.

    The Graph takes the parameters and buffers (of a DTensor: this rank's part), the tensors among the inputs, and a tangent,
    which is one for the gradients of the loss itself; it gives the new value of each buffer that the step changes, the loss,
    then the gradients. Inputs, sizes that depend on data, buffers, tied parameters and the `optimizer` are treated as
    `capture_train_step` does.
    UnsupportedError where torch has no joint export; InputError and CaptureError as there.

    >>> class Loss(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.norm = nn.BatchNorm1d(2, affine=False)
    ...         self.weight = nn.Parameter(torch.ones(2))
    ...     def forward(self, x, *, target=None):
    ...         return (self.norm(x) * self.weight - target).square().sum()
    >>> if is_supported():
    ...     graph = capture_joint(Program(Loss(), (torch.ones(3, 2),), {"target": torch.ones(3, 2)}))
    ...     assert [f"{spec.kind} {spec.name}" for spec in graph.inputs[-3:]] == ["input 0", "input target", "tangent loss"]
    ...     assert [spec.name for spec in graph.outputs if spec.kind == "mutation"] == [
    ...         "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"
    ...     ]
    """

    module = check_program(program)
    export = aot.joint_export()
    if export is None:
        raise UnsupportedError(
            f"torch {torch.__version__} cannot export a joint graph with descriptors (2.10 and later can); "
            "capture with train_step, which every supported torch can"
        )
    if any(slot.layout is not None and tensor.is_meta for slot, tensor in zip(slots(module), tensors_of(module).values())):
        raise CaptureError(
            f"{program.name} has DTensors on the meta device, of which torch {torch.__version__} exports no joint graph; "
            "capture with train_step"
        )
    inputs = Inputs.of(program)
    example_inputs = tuple(inputs.wrap(inputs.tensors(program.args, program.kwargs)))
    with values_told(program.name), ExitStack() as stack:
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        stack.enter_context(stamped_with_module_paths(module))
        stack.enter_context(fx.sizes_may_depend_on_data())
        joint = export(stack, _Flat(module, inputs), example_inputs, ignore_shape_env=True)  # sizes of inputs are fixed
    _check_placements(module, aot.joint_gradient_placements(joint))
    graph = _signed(joint.graph_module, module, inputs)
    graph.verify()
    return graph if optimizer is None else with_optimizer(graph, module, optimizer)


def _signed(traced: GraphModule, module: nn.Module, inputs: Inputs) -> Graph:
    """The Graph of a traced module: flat, without meshes, and with names for what it takes and gives."""
    named = _Names({f"_{index}": slot.spec for index, slot in enumerate(slots(module))}, inputs.specs, type(module).__name__)
    input_specs = _input_specs(traced.graph, named)
    returned = _output_specs(traced.graph, named)
    _drop_meshes(traced.graph)
    traced.graph.set_codegen(CodeGen())  # flat arguments, and not a list of primals and one of tangents
    clean(traced)
    keep_checks(traced)
    keep_inputs(traced, inputs)
    return Graph(traced, input_specs, returned, kind="joint")


class _Flat(nn.Module):
    """A module with all of its state on one level, each tensor once, under its index in `slots`; called with flat tensors.

    AOTAutograd would make two inputs, with a gradient each, of a parameter that is tied.
    """

    def __init__(self, module: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is no submodule
        self._inputs = inputs
        self._names = [slot.spec.name for slot in slots(module)]
        tensors = tensors_of(module)
        for index, name in enumerate(self._names):
            tensor = tensors[name]
            if isinstance(tensor, nn.Parameter):
                self.register_parameter(f"_{index}", tensor)
            else:
                self.register_buffer(f"_{index}", tensor)

    def forward(self, *tensors: Tensor) -> Tensor:
        state = {name: getattr(self, f"_{index}") for index, name in enumerate(self._names)}
        return call_for_loss(self._module[0], state, *self._inputs.unflatten(tensors))


@dataclass(frozen=True)
class _Names:
    """What the descriptors of a joint graph mean: the state by the name it has in `_Flat`, the inputs by their index."""

    state: dict[str, InputSpec]
    inputs: tuple[InputSpec, ...]
    program: str

    def spec(self, descriptor: Any) -> InputSpec:
        """What a descriptor of an input stands for."""
        kind = type(descriptor).__name__
        if kind in ("ParamAOTInput", "BufferAOTInput"):
            return self.state[descriptor.target]
        if kind == "PlainAOTInput":
            return self.inputs[descriptor.idx]
        if kind == "TangentAOTInput":
            return InputSpec("tangent", "loss")
        raise CaptureError(f"the joint graph takes {descriptor}, which a training step has not; capture with train_step")


def _check_placements(module: nn.Module, all_placements: list[Any] | None) -> None:
    """Refuse a gradient that is laid out otherwise than its parameter: it would be added up wrongly."""
    if all_placements is None:
        return  # no parameter is a DTensor, or this torch does not say
    state = [slot for slot in slots(module) if slot.spec.kind == "parameter"]
    for slot, placements in zip(state, all_placements):
        if slot.layout is not None and placements is not None and tuple(placements) != slot.layout.placements:
            raise CaptureError(
                f"the gradient of {slot.spec.name} is laid out as {placements}, the parameter as {slot.layout.placements}; "
                "gather it with apply_simple_fsdp, or capture with train_step"
            )


def _is_mesh(descriptor: Any) -> bool:
    """Whether this stands for a DTensor's mesh, which torch since 2.13 passes through the graph beside its tensor."""
    return getattr(descriptor, "attr", "_local_tensor") != "_local_tensor"


def _plain(descriptor: Any) -> Any:
    """What a descriptor of a DTensor's local tensor belongs to."""
    while hasattr(descriptor, "base"):
        descriptor = descriptor.base
    return descriptor


def _input_specs(graph: FxGraph, names: _Names) -> tuple[InputSpec, ...]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and not _is_mesh(node.meta["desc"])]
    return tuple(names.spec(_plain(node.meta["desc"])) for node in placeholders)


def _output_specs(graph: FxGraph, names: _Names) -> tuple[OutputSpec, ...]:
    descriptors, values = _outputs(graph)
    kept = [(d, value) for d, value in zip(descriptors, values) if not _is_mesh(d) and value is not None]
    return tuple(_output_spec(_plain(descriptor), names) for descriptor, _ in kept)


def _output_spec(descriptor: Any, names: _Names) -> OutputSpec:
    kind = type(descriptor).__name__
    if kind == "PlainAOTOutput":
        return OutputSpec("loss", "loss")
    if kind == "GradAOTOutput":
        return OutputSpec("gradient", names.spec(_plain(descriptor.grad_of)).name)
    if kind == "InputMutationAOTOutput":
        return OutputSpec("mutation", check_written(names.spec(_plain(descriptor.mutated_input)), names.program))
    raise CaptureError(f"the joint graph gives {descriptor}, which a training step has not; capture with train_step")


def _outputs(graph: FxGraph) -> tuple[list[Any], list[Any]]:
    output = output_node(graph)
    return list(output.meta["desc"]), list(output.args[0])


def _drop_meshes(graph: FxGraph) -> None:
    """Take meshes, and gradients that are None, out of the signature: a Graph takes and gives tensors."""
    descriptors, values = _outputs(graph)
    output = output_node(graph)
    kept = [(d, value) for d, value in zip(descriptors, values) if not _is_mesh(d) and value is not None]
    output.args = ([value for _, value in kept],)
    output.meta["desc"] = [descriptor for descriptor, _ in kept]
    for node in _meshes(graph):
        if node.users:
            raise CaptureError(f"{next(iter(node.users))} computes with a mesh ({node.meta['desc']}); capture with train_step")
        graph.erase_node(node)


def _meshes(graph: FxGraph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder" and _is_mesh(node.meta["desc"])]
