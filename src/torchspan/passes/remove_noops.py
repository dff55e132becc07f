"""Remove operators without effect: views of the same geometry, copies whose removal no output shows, idle waits."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import Node

from torchspan.core.collectives import is_call
from torchspan.core.errors import PassError
from torchspan.core.graph import GRADIENT_OF, Graph, is_async_collective
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
from torchspan.private import fx

_aten = torch.ops.aten
_COPIES = (_aten.clone.default, _aten._to_copy.default)
# they say that they make something new, and give what they are given
_VIEWS_IN_FACT = (_aten._unsafe_view.default, torch.ops._c10d_functional.wait_tensor.default)


@dataclass(frozen=True)
class RemoveNoops(Pass):
    """Removes what changes nothing; every number stays bitwise what it was.

    Those are views that have the shape, strides and beginning of what they are a view of (also after several steps, such as two
    transposes that undo each other), copies of the same dtype and strides, and waits for what is no collective. A copy stays
    where its result would become an output that shares memory with an input or another output, and where what it copies is an
    input or begins inside of other memory: how a matrix product rounds may depend on where its operand begins. Adding zero
    stays, as it makes 0.0 of -0.0.
    """

    name: ClassVar[str] = "remove_noops"
    summary: ClassVar[str] = "removes views, copies and waits that change nothing"
    stage: ClassVar[Stage] = "operators"

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        for node in list(module.graph.nodes):
            if node.op == "call_function" and GRADIENT_OF not in node.meta:
                same = _same(node, result)
                if same is not None:
                    node.replace_all_uses_with(same)
                    module.graph.erase_node(node)
        module.graph.eliminate_dead_code()
        module.recompile()
        removed = graph.count_targets() - result.count_targets()
        counts = ", ".join(f"{count} {target}" for target, count in removed.most_common())
        reason = "they change nothing that can be seen" if counts else "no operator is without effect"
        context.report.decide("pass", self.name, f"removed {counts}" if counts else "nothing changed", reason)
        return result

    def ensure(self, before: Graph, after: Graph) -> None:
        """Nothing was added, collectives are as they were, and no output shares memory that it did not share."""
        added = after.count_targets() - before.count_targets()
        if added:
            raise PassError(f"{self.name} added {dict(added)}; expected to remove only")
        if before.num_collectives() != after.num_collectives():
            raise PassError(
                f"{self.name} changed the collectives: {dict(before.num_collectives())} before, "
                f"{dict(after.num_collectives())} after"
            )
        shared = _sharing(after) - _sharing(before)
        if shared:
            raise PassError(
                f"{self.name} made outputs share memory: {', '.join(' and '.join(pair) for pair in sorted(shared))}"
            )


def _same(node: Node, graph: Graph) -> Node | None:
    """A node whose value may be read in place of that of `node`, or None."""
    if is_call(node, "wait_tensor"):
        waited = node.args[0]
        return waited if isinstance(waited, Node) and not _may_be_pending(waited) else None
    if _is_view(node):
        return next((source for source in _viewed(node) if _is_same_geometry(source, node)), None)
    if node.target in _COPIES:
        copied = node.args[0]
        if isinstance(copied, Node) and _is_same_geometry(copied, node) and _begins_alone(copied) and _is_unseen(node, graph):
            return copied
    return None


def _may_be_pending(node: Node) -> bool:
    """Whether a wait for `node` may have something to wait for: a collective, one of its results, what comes from outside."""
    while node.target is operator.getitem and isinstance(node.args[0], Node):
        node = node.args[0]
    return is_async_collective(node) or node.op != "call_function"


# views


def _is_view(node: Node) -> bool:
    """Whether a node gives a view of its first argument, by what its schema says, and nothing else."""
    schema = getattr(node.target, "_schema", None)
    if node.target is _aten._unsafe_view.default:
        return True
    if node.op != "call_function" or schema is None or schema.is_mutable or len(schema.returns) != 1:
        return False
    return schema.returns[0].alias_info is not None


def _viewed(node: Node) -> Iterator[Node]:
    """What `node` is a view of, then what that is a view of, and so on."""
    while _is_view(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
        yield node


def _is_same_geometry(first: Node, second: Node) -> bool:
    """Whether two values are laid out alike in their memory, for every batch, and read alike."""
    a, b = first.meta.get("val"), second.meta.get("val")
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or type(a) is not type(b) or a.layout is not torch.strided:
        return False
    kinds = [(t.dtype, t.device, t.layout, t.is_conj(), t.is_neg(), t.ndim) for t in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    numbers = zip((*a.shape, *a.stride(), a.storage_offset()), (*b.shape, *b.stride(), b.storage_offset()))
    return all(fx.statically_known_true(left == right) for left, right in numbers)


# copies


def _begins_alone(node: Node) -> bool:
    """Whether a value is at the beginning of memory that the graph itself made."""
    is_own = all(root.op == "call_function" for root in _roots(node))
    return is_own and fx.statically_known_true(node.meta["val"].storage_offset() == 0)


def _is_unseen(copy: Node, graph: Graph) -> bool:
    """Whether no output would share memory that it does not share now, if `copy` were what it copies."""
    roots = [_roots(value) if isinstance(value, Node) else frozenset() for value in graph.output_values()]
    if not any(copy in memories for memories in roots):
        return True
    copied = _roots(copy.args[0])  # type: ignore[arg-type]
    return not any(copied & memories for memories in roots)


def _roots(node: Node) -> frozenset[Node]:
    """The nodes that made the memory in which the value of `node` may lie."""
    roots, todo, seen = set[Node](), [node], set[Node]()
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        if source.op == "placeholder":
            roots.add(source)
        elif _is_view(source) or source.target in _VIEWS_IN_FACT or not isinstance(source.target, torch._ops.OpOverload):
            todo += source.all_input_nodes  # what is no plain operator may give back anything that it is given
            if not source.all_input_nodes or (source.target is not operator.getitem and not _is_view(source)):
                roots.add(source)
        elif any(returned.alias_info is not None for returned in source.target._schema.returns):
            todo += source.all_input_nodes  # several views
        else:
            roots.add(source)
    return frozenset(roots)


def _sharing(graph: Graph) -> set[tuple[str, str]]:
    """Pairs of inputs and outputs, at least one of them an output, that may share memory."""
    outputs = [
        (f"output {index} ({spec.kind} {spec.name})", _roots(value))
        for index, (value, spec) in enumerate(zip(graph.output_values(), graph.outputs))
        if isinstance(value, Node)
    ]
    inputs = [
        (f"input {index} ({spec.kind} {spec.name})", frozenset([node]))
        for index, (node, spec) in enumerate(zip(graph.placeholders(), graph.inputs))
    ]
    pairs = [*combinations(outputs, 2), *((output, input_) for output in outputs for input_ in inputs)]
    return {(first, second) for (first, roots), (second, others) in pairs if roots & others}


PASS = RemoveNoops
