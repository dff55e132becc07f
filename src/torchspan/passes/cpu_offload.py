"""Keep activations on the CPU between the forward and the backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph
from torchspan.core.text import format_bytes
from torchspan.passes._again import Anew
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
from torchspan.passes._offload import Offloading, other_device
from torchspan.passes._phases import phases_of
from torchspan.passes._storages import kept_for_backward, num_bytes_of, returned_by, total_bytes


@dataclass(frozen=True)
class CPUOffload(Pass):
    """Moves what is kept for the backward to the CPU after its last use in the forward, and back before the backward reads it.

    Moved are activations of `min_mb` megabytes (10⁶ bytes) and more; not gathered parameters, what the graph returns, and what
    has a size that depends on data. Copies are asynchronous, on a stream of their own, and pinned on the CPU. Each way back
    begins when the graph waits for the value that is read `ahead` before: a larger number hides more of it, and holds more.
    """

    name: ClassVar[str] = "cpu_offload"
    summary: ClassVar[str] = "keeps large activations on the CPU between forward and backward; for graphs on a GPU"
    stage: ClassVar[Stage] = "memory"
    after: ClassVar[tuple[str, ...]] = ("apply_sac",)

    min_mb: float = 1.0
    ahead: int = 1

    def __post_init__(self) -> None:
        if not self.min_mb >= 0:
            raise InputError(f"option 'min_mb' of cpu_offload is {self.min_mb}; expected 0 or more")
        if self.ahead < 1:
            raise InputError(f"option 'ahead' of cpu_offload is {self.ahead}; expected 1 or more")

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        phases = phases_of(module.graph)
        kept = kept_for_backward(module.graph, phases)
        owners = self._movable(result, kept)
        if not owners:
            self._say_why(kept, context)
            return result
        offloading = Offloading(module.graph, phases, owners, self.ahead)
        Anew(module.graph, phases, (), offloading.bring_back(), self.name).rewrite()
        offloading.finish()
        module.recompile()
        moved, total = total_bytes(owners)[0], total_bytes(kept)[0]
        outcome = f"{len(owners)} activations, {format_bytes(moved)} of the {format_bytes(total)} kept for the backward"
        context.report.decide("pass", self.name, outcome, f"each has {self.min_mb:g} MB or more, and waits on the CPU")
        return result

    def _movable(self, graph: Graph, kept: list[Node]) -> list[Node]:
        """What is large enough, on another device than the CPU, and an activation."""
        returned = returned_by(graph.module.graph)
        parameters = {node for node, spec in zip(graph.placeholders(), graph.inputs) if spec.kind == "parameter"}
        return [
            owner
            for owner in kept
            if other_device(owner) is not None
            and (num_bytes_of(owner) or 0) >= max(1, self.min_mb * 1e6)
            and owner not in returned
            and not _is_parameter(owner, parameters)
        ]

    def _say_why(self, kept: list[Node], context: PassContext) -> None:
        """Record why nothing was moved; PassError, if strict, where the reason is that there is no GPU."""
        on_device = [owner for owner in kept if other_device(owner) is not None]
        if on_device or not kept:
            reason = f"no activation of {self.min_mb:g} MB or more is kept for the backward"
        elif context.strict:
            raise PassError(
                f"{self.name} moves activations to the CPU, and this graph runs there; leave it out, or run on a GPU"
            )
        else:
            reason = "the graph runs on the CPU: there is nowhere to move activations to"
        context.report.decide("pass", self.name, "nothing changed", reason)

    def ensure(self, before: Graph, after: Graph) -> None:
        """Whatever is copied to the CPU comes back, and is waited for before it is read."""
        counts = after.count_targets()
        there, back, waits = (
            counts[f"torchspan.{name}.default"] for name in ("copy_to_host", "copy_to_device", "wait_for_copy")
        )
        if not there == back == waits:
            raise PassError(
                f"{self.name} made {there} copies to the CPU, {back} back and {waits} waits; expected as many of each"
            )
        for node in after.module.graph.nodes:
            if str(node.target) == "torchspan.copy_to_device.default":
                early = [user.name for user in node.users if str(user.target) != "torchspan.wait_for_copy.default"]
                if early:
                    raise PassError(f"{early[0]} reads {node.name} before it is waited for")


def _is_parameter(owner: Node, parameters: set[Node]) -> bool:
    """Whether a value is a gathered or cast parameter."""
    while owner.op == "call_function" and len(owner.all_input_nodes) == 1:
        owner = owner.all_input_nodes[0]
    return owner in parameters


PASS = CPUOffload
