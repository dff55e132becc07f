"""``torch._functorch._aot_autograd.fx_utils``: the inputs and outputs of a joint graph, by what they mean."""

from __future__ import annotations

from typing import Any

from torchspan.backports import _descriptors
from torchspan.backports._base import Backport

_PLACE = "torch._functorch._aot_autograd.fx_utils"


def get_all_input_and_grad_nodes(g: Any) -> dict[Any, tuple[Any, Any]]:
    """Each input that may have a gradient, with the output that is its gradient (None where there is none).

    Raises RuntimeError where a tensor subclass was taken apart: its parts have no gradients one by one.
    """
    pairs: dict[Any, tuple[Any, Any]] = {}
    for node in g.find_nodes(op="placeholder"):
        desc = node.meta["desc"]
        _check(node, desc)
        if isinstance(desc, _descriptors.DifferentiableAOTInput):
            pairs[desc] = (node, None)
    for node, desc in _outputs(g):
        if isinstance(desc, _descriptors.GradAOTOutput):
            pairs[desc.grad_of] = (pairs[desc.grad_of][0], node)
    return pairs


def get_all_output_and_tangent_nodes(g: Any) -> dict[Any, tuple[Any, Any]]:
    """Each output that may have a gradient, with the input that is its tangent (None where there is none)."""
    pairs = {desc: (node, None) for node, desc in _outputs(g) if isinstance(desc, _descriptors.DifferentiableAOTOutput)}
    for node in g.find_nodes(op="placeholder"):
        desc = node.meta["desc"]
        _check(node, desc)
        if isinstance(desc, _descriptors.TangentAOTInput):
            pairs[desc.output] = (pairs[desc.output][0], node)
    return pairs


def _outputs(g: Any) -> list[tuple[Any, Any]]:
    (output,) = g.find_nodes(op="output")
    pairs = list(zip(output.args[0], output.meta["desc"]))
    for node, desc in pairs:
        _check(node, desc)
    return pairs


def _check(node: Any, desc: Any) -> None:
    if isinstance(desc, (_descriptors.SubclassGetAttrAOTInput, _descriptors.SubclassGetAttrAOTOutput)):
        raise RuntimeError(f"Subclasses are currently not supported by this function, but one was found at {node} ({desc})")


def get_plain_input_and_grad_nodes(graph: Any) -> dict[Any, tuple[Any, Any]]:
    """The same for inputs of the program, without parameters and buffers."""
    return _only(get_all_input_and_grad_nodes(graph), _descriptors.PlainAOTInput)


def get_param_and_grad_nodes(graph: Any) -> dict[Any, tuple[Any, Any]]:
    """The same for parameters."""
    return _only(get_all_input_and_grad_nodes(graph), _descriptors.ParamAOTInput)


def get_plain_output_and_tangent_nodes(graph: Any) -> dict[Any, tuple[Any, Any]]:
    """The outputs of the program, with their tangents."""
    return _only(get_all_output_and_tangent_nodes(graph), _descriptors.PlainAOTOutput)


def get_param_nodes(graph: Any) -> list[Any]:
    """The inputs that are parameters."""
    return [node for node, _ in get_param_and_grad_nodes(graph).values()]


def get_buffer_nodes(graph: Any) -> list[Any]:
    """The inputs that are buffers."""
    return list(get_named_buffer_nodes(graph).values())


def get_named_param_nodes(graph: Any) -> dict[str, Any]:
    """The inputs that are parameters, by their names."""
    return {desc.target: node for desc, (node, _) in get_param_and_grad_nodes(graph).items()}


def get_named_buffer_nodes(graph: Any) -> dict[str, Any]:
    """The inputs that are buffers, by their names."""
    return {
        desc.target: node for desc, (node, _) in _only(get_all_input_and_grad_nodes(graph), _descriptors.BufferAOTInput).items()
    }


def _only(pairs: dict[Any, tuple[Any, Any]], kind: type) -> dict[Any, tuple[Any, Any]]:
    return {desc: nodes for desc, nodes in pairs.items() if isinstance(desc, kind)}


BACKPORT = Backport(
    name="fx_utils",
    summary="inputs and outputs of a joint graph by what they mean: torch._functorch._aot_autograd.fx_utils",
    target=_PLACE,
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.9.0/torch/_functorch/_aot_autograd/fx_utils.py",
    is_module=True,
    names={
        "get_all_input_and_grad_nodes": lambda: get_all_input_and_grad_nodes,
        "get_all_output_and_tangent_nodes": lambda: get_all_output_and_tangent_nodes,
        "get_plain_input_and_grad_nodes": lambda: get_plain_input_and_grad_nodes,
        "get_plain_output_and_tangent_nodes": lambda: get_plain_output_and_tangent_nodes,
        "get_param_and_grad_nodes": lambda: get_param_and_grad_nodes,
        "get_param_nodes": lambda: get_param_nodes,
        "get_buffer_nodes": lambda: get_buffer_nodes,
        "get_named_param_nodes": lambda: get_named_param_nodes,
        "get_named_buffer_nodes": lambda: get_named_buffer_nodes,
    },
)
