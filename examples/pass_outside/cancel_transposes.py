"""A pass outside torchspan: a matrix that is transposed twice is the matrix.

The backward of a linear layer transposes the gradient of its weight, and then transposes it back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes import Pass, PassContext, Stage, editable, refuse_writes


@dataclass(frozen=True)
class CancelTransposes(Pass):
    """Reads a matrix where it is transposed twice; `limit` is how many pairs at most, 0 is all."""

    name: ClassVar[str] = "cancel_transposes"
    summary: ClassVar[str] = "a matrix that is transposed twice is read as it is"
    stage: ClassVar[Stage] = "operators"

    limit: int = 0

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)  # a transposed matrix is a view: a write into one would be a write into the other

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        pairs = [node for node in module.graph.nodes if is_transpose(node) and is_transpose(node.args[0])]
        pairs = pairs[: self.limit or None]
        for second in pairs:
            second.replace_all_uses_with(second.args[0].args[0])
        module.graph.eliminate_dead_code()
        module.recompile()
        if pairs:
            context.report.decide("pass", self.name, f"{len(pairs)} pairs of transposes left out", "two of them cancel out")
        else:
            context.report.decide("pass", self.name, "nothing changed", "no matrix is transposed twice")
        return graph.with_module(module, str(self))

    def ensure(self, before: Graph, after: Graph) -> None:
        """The graph became no longer."""
        old, new = len(before.module.graph.nodes), len(after.module.graph.nodes)
        if new > old:
            raise PassError(f"{self.name} made {new} nodes of {old}; expected no more")


def is_transpose(node: object) -> bool:
    """Whether `node` transposes a matrix."""
    return isinstance(node, Node) and str(node.target) == "aten.t.default"


PASS = CancelTransposes
