"""Metadata of nodes: each has the value that its operator gives, told by calling the operator on fake tensors.

Only what a pass wrote or changed is called: a node that calls the same as before, on the same values, was checked before.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchspan.core.errors import GraphError
from torchspan.core.graph import Graph
from torchspan.passes._values import shown_node, shown_value
from torchspan.private import fx

_ADVICE = 'give each node that a pass writes meta["val"]'


class Unknown:
    """What a node gives cannot be told without running it."""


_UNKNOWN = Unknown()


def check_metadata(before: Graph, after: Graph) -> None:
    """Raise GraphError unless each node of `after` has an example value of the kind, shape, dtype and device that it gives.

    Nothing is told of a graph whose inputs had no example values before.
    """
    if not all("val" in node.meta for node in before.placeholders()):
        return
    known = {node.name: node for node in before.module.graph.nodes}
    propagation = Propagation(after.module)
    for node in after.module.graph.nodes:
        old = known.get(node.name)
        if node.op in ("output", "get_attr") or (old is not None and _is_same_call(old, node)):
            continue
        _check_is_there(node)
        value = propagation.value(node)
        if not isinstance(value, Unknown):
            _check_agrees(node, value, node.meta.get("val"))


def complete_metadata(module: GraphModule) -> None:
    """Give each node of `module` without an example value the one that its operator gives, where that can be told; in place."""
    propagation = Propagation(module)
    for node in module.graph.nodes:
        if node.op.startswith("call_") and "val" not in node.meta:
            value = propagation.value(node)
            if not isinstance(value, Unknown):
                node.meta["val"] = value


class Propagation:
    """What nodes of `module` give by the example values of what they are given; equal calls are made once."""

    def __init__(self, module: GraphModule) -> None:
        values = (node.meta.get("val") for node in module.graph.nodes)
        self._mode = next((value.fake_mode for value in values if hasattr(value, "fake_mode")), None)
        self._known: dict[Hashable, Any] = {}

    def value(self, node: Node) -> Any:
        """What `node` gives; Unknown for what depends on data, writes in place, or is no operator.

        GraphError where the operator refuses what it is given.
        """
        if node.op != "call_function" or any("val" not in source.meta for source in node.all_input_nodes):
            return _UNKNOWN
        arguments: Any = map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        args, kwargs = arguments
        if node.target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else _UNKNOWN
        if not _is_plain(node.target) or not all(map(_is_example, _leaves((args, kwargs)))):
            return _UNKNOWN
        key = _key(node.target, args, kwargs)
        if key is None or key not in self._known:
            value = self._call(node, args, kwargs)
            if key is None:
                return value
            self._known[key] = value
        return self._known[key]

    def _call(self, node: Node, args: Any, kwargs: Any) -> Any:

        try:
            with torch.no_grad(), self._mode or nullcontext():
                return node.target(*args, **kwargs)  # type: ignore[operator]
        except fx.unknown_values():
            return _UNKNOWN
        except (RuntimeError, TypeError, ValueError, IndexError, AssertionError) as cause:
            inputs = ", ".join(shown_value(source.meta["val"]) for source in node.all_input_nodes)
            reason = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
            raise GraphError(f"{shown_node(node)} does not take what it is given, {inputs or 'nothing'}: {reason}") from cause


def _is_plain(target: Any) -> bool:
    """Whether an operator gives, on fake tensors, what it will give: it writes nothing, and no size depends on data."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return torch.Tag.data_dependent_output not in target.tags and torch.Tag.dynamic_output_shape not in target.tags


def _is_example(value: Any) -> bool:
    """Whether calling an operator on `value` computes nothing."""
    return not isinstance(value, torch.Tensor) or hasattr(value, "fake_mode") or value.is_meta


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    else:
        yield value


def _key(target: Any, args: Any, kwargs: Any) -> Hashable | None:
    """A key that is equal for two calls with the same result; None where a size is a symbol."""
    described = [_described(leaf) for leaf in _leaves((args, kwargs))]
    if any(isinstance(leaf, Unknown) for leaf in described):
        return None
    return target, repr((args, kwargs)) if not any(isinstance(o, tuple) for o in described) else _nested(args, kwargs)


def _nested(args: Any, kwargs: Any) -> str:
    return repr(torch.utils._pytree.tree_map(_described, (args, dict(kwargs))))


def _described(value: Any) -> Any:
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return _UNKNOWN
    if not isinstance(value, torch.Tensor):
        return value
    sizes = (*value.shape, *value.stride())
    if not all(type(size) is int for size in sizes):
        return _UNKNOWN
    return (*sizes, value.ndim, str(value.dtype), str(value.device))


# what is compared


def _is_same_call(old: Node, node: Node) -> bool:
    """Whether `node` calls what `old` did, on the same values, and has the same value itself."""
    if (old.op, old.target) != (node.op, node.target) or old.meta.get("val", old) is not node.meta.get("val", old):
        return False
    inputs, old_inputs = node.all_input_nodes, old.all_input_nodes
    if len(inputs) != len(old_inputs):
        return False
    if any(
        new_input.name != old_input.name or new_input.meta.get("val") is not old_input.meta.get("val")
        for new_input, old_input in zip(inputs, old_inputs)
    ):
        return False
    return bool(_by_name(old) == _by_name(node))


def _by_name(node: Node) -> Any:
    return map_arg((node.args, node.kwargs), lambda source: source.name)


def _check_is_there(node: Node) -> None:
    """Raise GraphError where a node that gives a tensor has no example value, or one that is none."""
    value = node.meta.get("val")
    if "val" not in node.meta and (node.op == "placeholder" or node.users):
        raise GraphError(f"{shown_node(node)} has no example value; {_ADVICE}, a fake tensor of what it gives")
    if not isinstance(node.target, torch._ops.OpOverload):
        return
    returns = node.target._schema.returns
    if len(returns) == 1 and str(returns[0].type) == "Tensor" and "val" in node.meta and not isinstance(value, torch.Tensor):
        raise GraphError(f"{shown_node(node)} gives a tensor, and its example value is a {type(value).__name__}; {_ADVICE}")


def _check_agrees(node: Node, actual: Any, claimed: Any) -> None:
    if isinstance(actual, (tuple, list)) and isinstance(claimed, (tuple, list)) and len(actual) == len(claimed):
        for actual_part, claimed_part in zip(actual, claimed):
            _check_agrees(node, actual_part, claimed_part)
    elif isinstance(actual, torch.Tensor) and not (isinstance(claimed, torch.Tensor) and _is_alike(actual, claimed)):
        device = f" on {actual.device}" if isinstance(claimed, torch.Tensor) and claimed.device != actual.device else ""
        raise GraphError(
            f"{shown_node(node)} gives {shown_value(actual)}{device}, and its example value says {shown_value(claimed)}; "
            f"{_ADVICE} anew when what it reads changes"
        )


def _is_alike(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether shape, dtype and device are equal; sizes that cannot be compared count as equal."""
    if (first.dtype, first.device, first.ndim) != (second.dtype, second.device, second.ndim):
        return False
    return all(map(_may_be_equal, first.shape, second.shape))


def _may_be_equal(first: Any, second: Any) -> bool:
    if type(first) is int and type(second) is int:
        return first == second

    return not fx.statically_known_true(first != second)
