"""Refuse a graph with FlexAttention that no region holds: nothing would compile it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import Pass, PassContext, Stage
from torchspan.passes._flex import is_flex

_KEY = "compile_with_inductor"


@dataclass(frozen=True)
class ValidateFlexAttnAnnotation(Pass):
    """Changes nothing; a node of FlexAttention, or of its backward, that is annotated with no region is a PassError."""

    name: ClassVar[str] = "validate_flex_attn_annotation"
    summary: ClassVar[str] = "checks that FlexAttention is in regions that regional_inductor compiles; changes nothing"
    stage: ClassVar[Stage] = "operators"
    reads_annotations: ClassVar[bool] = True

    def require(self, graph: Graph) -> None:
        bare = [node for node in graph.module.graph.nodes if is_flex(node) and _KEY not in _custom(node)]
        if bare:
            others = f" ({len(bare)} in all)" if len(bare) > 1 else ""
            raise PassError(
                f"{bare[0].name} in {_module_of(bare[0])}{others} is in no region that is compiled; put its call under "
                'torch.fx.traceback.annotate({"compile_with_inductor": "flex_attention"}), or build the model with '
                "annotate_regions=True, as torchspan train does where regional_inductor is among the passes"
            )

    def run(self, graph: Graph, context: PassContext) -> Graph:
        nodes = [node for node in graph.module.graph.nodes if is_flex(node)]
        reason = "each is in a region that regional_inductor compiles" if nodes else "the graph has no FlexAttention"
        context.report.decide("pass", self.name, f"{len(nodes)} nodes checked", reason)
        return graph.with_module(graph.module, str(self))


def _custom(node: Node) -> dict[str, object]:
    return node.meta.get("custom") or {}


def _module_of(node: Node) -> str:
    return f"the module {_custom(node)['module']!r}" if "module" in _custom(node) else "a module of no name"


PASS = ValidateFlexAttnAnnotation
