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
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.core.program import Program

SUMMARY = "AOTAutograd's joint graph: functional, with a tangent; torch 2.10 and later"


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
        joint = export(stack, _Checked(module), program.args)
    _check_placements(module, _torch.joint_gradient_placements(joint))
    inputs = _input_specs(joint.graph_module.graph)
    outputs = _output_specs(joint.graph_module.graph)
    _drop_meshes(joint.graph_module.graph)
    joint.graph_module.graph.set_codegen(CodeGen())  # flat arguments, and not a list of primals and one of tangents
    clean(joint.graph_module)
    graph = Graph(joint.graph_module, inputs, outputs, kind="joint")
    graph.verify()
    return graph


class _Checked(nn.Module):
    """A module whose loss is checked while it is traced."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Tensor:
        return check_loss(self.module(*inputs), type(self.module).__name__)


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


def _input_specs(graph: FxGraph) -> tuple[InputSpec, ...]:
    placeholders = [node for node in graph.nodes if node.op == "placeholder" and not _is_mesh(node.meta["desc"])]
    return tuple(_input_spec(_plain(node.meta["desc"])) for node in placeholders)


def _input_spec(descriptor: Any) -> InputSpec:
    kind = type(descriptor).__name__
    if kind == "ParamAOTInput":
        return InputSpec("parameter", _name(descriptor))
    if kind == "BufferAOTInput":
        return InputSpec("buffer", _name(descriptor))
    if kind == "PlainAOTInput":
        return InputSpec("input", str(descriptor.idx))
    if kind == "TangentAOTInput":
        return InputSpec("tangent", "loss")
    raise CaptureError(f"the joint graph takes {descriptor}, which a training step has not; capture with train_step")


def _name(descriptor: Any) -> str:
    return str(descriptor.target).removeprefix("module.")  # of _Checked


def _output_specs(graph: FxGraph) -> tuple[OutputSpec, ...]:
    descriptors, values = _outputs(graph)
    kept = [(d, value) for d, value in zip(descriptors, values) if not _is_mesh(d) and value is not None]
    return tuple(_output_spec(_plain(descriptor)) for descriptor, _ in kept)


def _output_spec(descriptor: Any) -> OutputSpec:
    kind = type(descriptor).__name__
    if kind == "PlainAOTOutput":
        return OutputSpec("loss", "loss")
    if kind == "GradAOTOutput":
        return OutputSpec("gradient", _name(_plain(descriptor.grad_of)))
    if kind == "InputMutationAOTOutput":
        return OutputSpec("mutation", _name(_plain(descriptor.mutated_input)))
    raise CaptureError(f"the joint graph gives {descriptor}, which a training step has not; capture with train_step")


def _outputs(graph: FxGraph) -> tuple[list[Any], list[Any]]:
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    return list(output.meta["desc"]), list(output.args[0])


def _drop_meshes(graph: FxGraph) -> None:
    """Take meshes, and gradients that are None, out of the signature: a Graph takes and gives tensors."""
    descriptors, values = _outputs(graph)
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    kept = [(d, value) for d, value in zip(descriptors, values) if not _is_mesh(d) and value is not None]
    output.args = ([value for _, value in kept],)
    output.meta["desc"] = [descriptor for descriptor, _ in kept]
    for node in _meshes(graph):
        if node.users:
            raise CaptureError(f"{next(iter(node.users))} computes with a mesh ({node.meta['desc']}); capture with train_step")
        graph.erase_node(node)


def _meshes(graph: FxGraph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder" and _is_mesh(node.meta["desc"])]
