"""``_extract_graph_with_inputs_outputs(…, ignore_must_be_in_fw_bw=)``: part of a joint graph, marked or not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport
from torchspan.core.replaced import replaced
from torchspan.private import aot

_PLACE = "torch._functorch.partitioners"


def _extracting(extract: Callable[..., Any]) -> Callable[..., Any]:
    """The extraction, with newer torch's arguments; a call as this torch's own (the fourth is `subgraph`) works too."""
    own = inspect.signature(extract).parameters

    @functools.wraps(extract)
    def extract_graph(
        joint_graph: Any,
        inputs: list[Any],
        outputs: list[Any],
        outputs_descs: Any = None,
        subgraph: str | None = None,
        ignore_must_be_in_fw_bw: bool = False,
    ) -> Any:
        module = aot.partitioners
        if isinstance(outputs_descs, str):
            outputs_descs, subgraph = None, outputs_descs
        is_bound = module._must_be_in_backward
        free: Callable[[Any], bool] = lambda node: not ignore_must_be_in_fw_bw and node not in inputs and is_bound(node)  # noqa: E731
        descs = (outputs_descs,) if "outputs_descs" in own else ()
        with replaced(module, "_must_be_in_backward", free):
            graph = extract(joint_graph, inputs, outputs, *descs, subgraph=subgraph)
        if outputs_descs is not None:
            (output,) = graph.find_nodes(op="output")
            output.meta["desc"] = outputs_descs
        return graph

    return extract_graph


def _lacks(module: ModuleType | None) -> bool:
    if module is None:
        return True
    parameters = inspect.signature(inspect.unwrap(module._extract_graph_with_inputs_outputs)).parameters
    return "ignore_must_be_in_fw_bw" not in parameters


BACKPORT = Backport(
    name="partitioner_extract",
    summary="_extract_graph_with_inputs_outputs(outputs_descs=, ignore_must_be_in_fw_bw=) of the partitioner",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/_functorch/partitioners.py",
    redefines={"_extract_graph_with_inputs_outputs": _extracting},
    lacks=_lacks,
)
