"""Capture a training step as AOTAutograd's joint graph, forward and backward in one; torch 2.10 and later."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph as FxGraph
from torch.fx import Node
from torch.fx.graph import CodeGen

from torchspan.capture._clean import clean
from torchspan.capture._origins import stamped_with_module_paths
from torchspan.capture._state import check_loss, check_program, slots
from torchspan.core.errors import CaptureError, UnsupportedError
from torchspan.core.graph import Graph, InputSpec, OutputSpec, output_node
from torchspan.core.program import Program


def is_supported() -> bool:
    """Whether this torch can capture joint graphs."""
    from torchspan.capture import _torch

    return _torch.joint_export() is not None


def capture_joint(program: Program) -> Graph:
    """The joint graph of a module whose forward gives a scalar loss.

    The Graph takes the parameters and buffers (of a DTensor: this rank's part), the inputs, and a tangent, which is one for the
    gradients of the loss itself; it gives the loss, then the gradients. UnsupportedError where torch has no joint export.
    """
    from torchspan.capture import _torch

    module = check_program(program)
    export = _torch.joint_export()
    if export is None:
        raise UnsupportedError(
            f"torch {torch.__version__} cannot export a joint graph with descriptors (2.10 and later can); "
            "capture with train_step, which every supported torch can"
        )
    with ExitStack() as stack, torch.fx.traceback.preserve_node_meta(), stamped_with_module_paths(module):
        joint = export(stack, _Flat(module), program.args)
    _check_placements(module, _torch.joint_gradient_placements(joint))
    names = {f"_{index}": slot.spec.name for index, slot in enumerate(slots(module))}
    inputs, outputs = _input_specs(joint.graph_module.graph, names), _output_specs(joint.graph_module.graph, names)
    _drop_meshes(joint.graph_module.graph)
    joint.graph_module.graph.set_codegen(CodeGen())  # flat arguments, and not a list of primals and one of tangents
    clean(joint.graph_module)
    graph = Graph(joint.graph_module, inputs, outputs, kind="joint")
    graph.verify()
    return graph


class _Flat(nn.Module):
    """A module with all of its state on one level, each tensor once, under its index in `slots`.

    AOTAutograd would make two inputs, with a gradient each, of a parameter that is tied.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._module = (module,)  # in a tuple, so that it is no submodule
        self._names = [slot.spec.name for slot in slots(module)]
        parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
        for index, name in enumerate(self._names):
            if name in parameters:
                self.register_parameter(f"_{index}", parameters[name])
            else:
                self.register_buffer(f"_{index}", buffers[name])

    def forward(self, *inputs: Tensor) -> Tensor:
        state = {name: getattr(self, f"_{index}") for index, name in enumerate(self._names)}
        module = self._module[0]
        return check_loss(torch.func.functional_call(module, state, inputs), type(module).__name__)


def _check_placements(module: nn.Module, found: list[Any] | None) -> None:
    """A gradient that is laid out otherwise than its parameter would be added up wrongly: refuse it."""
    if found is None:
        return  # no parameter is a DTensor, or this torch does not say
    state = [slot for slot in slots(module) if slot.spec.kind == "parameter"]
    for slot, placements in zip(state, found):
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


def _input_specs(graph: FxGraph, names: dict[str, str]) -> tuple[InputSpec, ...]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and not _is_mesh(node.meta["desc"])]
    return tuple(_input_spec(_plain(node.meta["desc"]), names) for node in placeholders)


def _input_spec(descriptor: Any, names: dict[str, str]) -> InputSpec:
    kind = type(descriptor).__name__
    if kind == "ParamAOTInput":
        return InputSpec("parameter", names[descriptor.target])
    if kind == "BufferAOTInput":
        return InputSpec("buffer", names[descriptor.target])
    if kind == "PlainAOTInput":
        return InputSpec("input", str(descriptor.idx))
    if kind == "TangentAOTInput":
        return InputSpec("tangent", "loss")
    raise CaptureError(f"the joint graph takes {descriptor}, which a training step has not; capture with train_step")


def _output_specs(graph: FxGraph, names: dict[str, str]) -> tuple[OutputSpec, ...]:
    descriptors, values = _outputs(graph)
    kept = [(d, value) for d, value in zip(descriptors, values) if not _is_mesh(d) and value is not None]
    return tuple(_output_spec(_plain(descriptor), names) for descriptor, _ in kept)


def _output_spec(descriptor: Any, names: dict[str, str]) -> OutputSpec:
    kind = type(descriptor).__name__
    if kind == "PlainAOTOutput":
        return OutputSpec("loss", "loss")
    if kind == "GradAOTOutput":
        return OutputSpec("gradient", names[_plain(descriptor.grad_of).target])
    if kind == "InputMutationAOTOutput":
        return OutputSpec("mutation", names[_plain(descriptor.mutated_input).target])
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
