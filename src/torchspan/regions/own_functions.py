"""Makes the backward of a program's own autograd.Function differentiable where a graph that holds it is run.

Dynamo makes one operator of the function (``autograd_function_apply``) with a graph for each direction. When torch runs that
operator, its backward computes without gradients, on tensors that were saved outside of autograd: a second derivative is
silently lost. Here the forward saves its tensors with autograd, and the backward runs in the grad mode of its caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

_OPERATOR = "autograd_function_apply"


def differentiable(graph: GraphModule) -> GraphModule:
    """`graph`, or a copy in which each such operator works as it does in eager."""
    inner = {name: child for name, child in graph.named_children() if isinstance(child, GraphModule)}
    changed = {name: copied for name, child in inner.items() if (copied := differentiable(child)) is not child}
    backwards = [str(node.args[1].target) for node in graph.graph.nodes if _is_operator(node)]
    if not changed and not backwards:
        return graph
    changed |= {name: _in_any_grad_mode(changed.get(name, inner[name])) for name in backwards}
    own = _copied(graph)
    for node in own.graph.nodes:
        if _is_operator(node):
            node.target = apply
    own.recompile()
    for name, child in changed.items():
        setattr(own, name, child)
    return own


def _copied(graph: GraphModule) -> GraphModule:
    body = Graph()
    body.output(body.graph_copy(graph.graph, {}))
    return GraphModule(graph, body)


def _is_operator(node: Node) -> bool:
    return node.op == "call_function" and getattr(node.target, "_name", None) == _OPERATOR


def apply(forward: GraphModule, backward: GraphModule, *args: Any, **settings: Any) -> Any:
    """The replacement of torch's operator, with the graphs of a function and the operator's settings."""
    has_context = "args_tensor_mask" in settings  # torch 2.8: the graphs take a context, and more than the function's arguments
    leading = (None,) if has_context else ()
    num_own = sum(settings["args_tensor_mask"]) if has_context else len(args)
    without_gradients = set(settings["non_differentiable_idx"])
    written = set(settings.get("dirty_idx", ()))
    with_autograd = settings.get("saved_for_backward_idx")  # of what is saved; others are attributes of the context

    class Applied(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *own: Any) -> Any:
            outputs, saved = forward(*leading, *own, *args[num_own:])
            listed = outputs if isinstance(outputs, (tuple, list)) else [outputs]
            ctx.mark_non_differentiable(*(output for i, output in enumerate(listed) if i in without_gradients))
            ctx.mark_dirty(*(output for i, output in enumerate(listed) if i in written))
            ctx.is_saved = [
                isinstance(value, torch.Tensor) and (with_autograd is None or i in with_autograd)
                for i, value in enumerate(saved)
            ]
            ctx.save_for_backward(*(value for value, is_saved in zip(saved, ctx.is_saved, strict=True) if is_saved))
            ctx.others = [value for value, is_saved in zip(saved, ctx.is_saved, strict=True) if not is_saved]
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return backward(*leading, *gradients, *_merged(ctx.is_saved, ctx.saved_tensors, ctx.others))

    return Applied.apply(*args[:num_own])


def _merged(is_first: Sequence[bool], first: Sequence[Any], second: Sequence[Any]) -> list[Any]:
    """Two sequences merged into one; `is_first` says of each place which sequence it comes from."""
    both = iter(first), iter(second)
    return [next(both[0] if is_it else both[1]) for is_it in is_first]


def _in_any_grad_mode(backward: GraphModule) -> GraphModule:
    """The graph of a backward without the switch of the grad mode that dynamo puts around it."""
    own = _copied(backward)
    body = [node for node in own.graph.nodes if node.op not in ("placeholder", "output")]
    if len(body) > 1 and _switches(body[0], False) and _switches(body[-1], True):
        for node in (body[0], body[-1]):
            own.graph.erase_node(node)
        own.recompile()
    return own


def _switches(node: Node, value: bool) -> bool:
    return node.target is torch._C._set_grad_enabled and node.args == (value,)
