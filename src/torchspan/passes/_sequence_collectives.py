"""Finds tensor parallelism's gathers and scatters of the sequence, with the products beside them.

Shapes, as suffixes of names, are those of :mod:`.async_tensor_parallel`.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.core.collectives import GATHER, SCATTER, Collective, is_call, value_of, wait_for
from torchspan.passes._writer import is_aten, is_pointwise, tensor_of


@dataclass(frozen=True)
class Gather(Collective):
    """A gather of the sequence, each rank's `source` (B, s, D): the `gathered` (B, S, D), and the products (T, F) that read it.

    `cat` puts the ranks' parts, which `split` takes apart, one after the other: it is what is gathered.
    """

    gathered: Node
    products: tuple[Node, ...]

    @property
    def num_ranks(self) -> int:
        """R."""
        return int(self.node.args[1])  # type: ignore[arg-type]

    @property
    def sequence(self) -> int:
        """s."""
        return value_of(self.source).shape[1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return value_of(self.gathered).shape[0] * value_of(self.gathered).shape[1]


@dataclass(frozen=True)
class Scatter(Collective):
    """A scatter of the sequence: `node`, its `wait` (B, s, D), and the `summed` (B, S, D), made of products."""

    summed: Node

    @property
    def num_ranks(self) -> int:
        """R."""
        return int(self.node.args[2])  # type: ignore[arg-type]

    @property
    def sequence(self) -> int:
        """s."""
        return value_of(self.wait).shape[1]

    @property
    def num_tokens(self) -> int:
        """T."""
        return value_of(self.summed).shape[0] * value_of(self.summed).shape[1]


def gathers(graph: FxGraph) -> Iterator[Gather]:
    """The gathers of the sequence in `graph` that feed a product."""
    for node in graph.nodes:
        wait = wait_for(node) if is_call(node, GATHER) else None
        split = next(iter(wait.users)) if wait is not None and len(wait.users) == 1 else None
        if wait is None or not is_aten(split, "split.Tensor") or not isinstance(split, Node) or len(split.args) != 2:
            continue
        gathered = _rejoined(split, int(node.args[1]), 1)
        source = tensor_of(node.args[0])
        if gathered is None or source is None or source.ndim != 3 or split.args[1] != source.shape[0]:
            continue
        flat = [user for user in gathered.users if is_flat_view(user)]
        products = [user for view in flat for user in view.users if is_product(user) and user.args[0] is view]
        products = [product for product in products if light_ancestors(product.args[1], node) is not None]
        if products:
            yield Gather(node, wait, gathered, tuple(products))


def scatters(graph: FxGraph) -> Iterator[Scatter]:
    """The scatters of the sequence in `graph` whose sums are made of products."""
    for node in graph.nodes:
        wait = wait_for(node) if is_call(node, SCATTER) else None
        cat = node.args[0] if wait is not None else None
        if wait is None or not is_aten(cat, "cat.default") or not isinstance(cat, Node) or node.args[1] != "sum":
            continue
        parts = cat.args[0]
        split = parts[0].args[0] if isinstance(parts, (list, tuple)) and parts and isinstance(parts[0], Node) else None
        if not is_aten(split, "split.Tensor") or not isinstance(split, Node) or split.args[2:] != (1,) or len(cat.users) != 1:
            continue
        summed, whole = split.args[0], tensor_of(split.args[0])
        if (
            not isinstance(summed, Node)
            or whole is None
            or whole.ndim != 3
            or _rejoined(split, int(node.args[2]), 0) is not cat
        ):
            continue
        if split.args[1] == value_of(wait).shape[1] and has_product(summed, tuple(whole.shape)):
            yield Scatter(node, wait, summed)


def _rejoined(split: Node, num_parts: int, dim: int) -> Node | None:
    """The one node that joins all parts of `split`, in their order, along `dim`; each has no other user."""
    parts = sorted(split.users, key=lambda part: int(part.args[1]) if part.target is operator.getitem else -1)  # type: ignore[arg-type]
    if [part.args[1] if part.target is operator.getitem else None for part in parts] != list(range(num_parts)):
        return None
    joined = {user for part in parts for user in part.users}
    cat = next(iter(joined)) if len(joined) == 1 else None
    if cat is None or not is_aten(cat, "cat.default") or list(cat.args[0]) != parts or (*cat.args, 0)[1] != dim:  # type: ignore[arg-type]
        return None
    return cat


def erase(gather: Gather) -> None:
    """Erase a gather, of which what put it together is gone already."""
    graph = gather.node.graph
    split = next(iter(gather.wait.users))
    for node in (*split.users, split, gather.wait, gather.node):
        graph.erase_node(node)


def is_flat_view(node: Node) -> bool:
    """Whether `node` views (B, S, F) as (T, F), or the other way."""
    if not is_aten(node, "view.default") and not is_aten(node, "_unsafe_view.default"):
        return False
    before, after = tensor_of(node.args[0]), tensor_of(node)
    if before is None or after is None or {before.ndim, after.ndim} != {2, 3}:
        return False
    wide, flat = (before, after) if before.ndim == 3 else (after, before)
    return tuple(flat.shape) == (wide.shape[0] * wide.shape[1], wide.shape[2])


def is_product(node: Node) -> bool:
    """Whether `node` is a matrix product."""
    return is_aten(node, "mm.default")


def has_product(node: Node, shape: tuple[int, ...]) -> bool:
    """Whether `node`, with a value for each token, is a product, or is made of one token by token; `shape` is (B, S, F)."""
    value = tensor_of(node)
    if value is None or tuple(value.shape) not in (shape, (shape[0] * shape[1], shape[2])):
        return False
    if is_product(node):
        return True
    if is_flat_view(node):
        return has_product(node.args[0], shape)  # type: ignore[arg-type]
    if is_pointwise(node):
        inputs = node.all_input_nodes
        alike = all(tensor_of(source) is not None and value_of(source).shape == value.shape for source in inputs)
        return alike and any(has_product(source, shape) for source in inputs)
    return False


def light_ancestors(node: Any, after: Node) -> list[Node] | None:
    """What `node` is made of that stands after `after`, in order; None where there is a product among it, or `after` itself."""
    if not isinstance(node, Node):
        return None
    waiting, ancestors = [node], set[Node]()
    while waiting:
        source = waiting.pop()
        if source is after or (is_product(source) and after < source):
            return None
        if source not in ancestors and after < source:
            ancestors.add(source)
            waiting += source.all_input_nodes
    return sorted(ancestors)
