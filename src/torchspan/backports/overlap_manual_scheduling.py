"""``manual_overlap_bucketing``: FSDP's collectives move by module, as they are told, and overlap with the modules beside."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

from torch.fx import GraphModule, Node

from torchspan.backports import _graph_view, _overlap
from torchspan.backports._base import Backport, unavailable
from torchspan.core.collectives import GATHER, SCATTER, Collective
from torchspan.core.overlap import overlap, places_of

_PLACE = "torch._inductor.fx_passes.overlap_manual_scheduling"
_SINCE = "2.10.0"


def manual_overlap_bucketing(
    gm: GraphModule,
    module_bucket_plans: list[list[str] | str],
    insert_overlap_deps: bool = False,
    module_stack_fn: Callable[[Node], list[tuple[str, type[Any]]]] | None = None,
    bucket_mode: str | None = None,
) -> GraphModule:
    """Merge the parameter gathers and gradient scatters of each planned part, and overlap them with the parts beside it.

    A gather begins before the wait for the part before, a scatter is waited for after that of the part after has begun. Every
    number stays bitwise what it was.

    Args:
        gm: a forward or backward graph of AOTAutograd, changed in place.
        module_bucket_plans: the parts, each the name of a module or a list of names.
        insert_overlap_deps: asks that inductor keeps the order; old torch's has no means for that (a Decision says so).
        module_stack_fn: the modules that a node was traced in, outermost first; the metadata of the node by default.
        bucket_mode: how upstream copies into buckets; the copies are written as plain operators here.
    """
    if insert_overlap_deps:
        cause = "this torch's inductor has no control dependencies; it keeps the order of the graph where it does not fuse"
        _overlap.say(BACKPORT.name, "insert_overlap_deps=True", "the order is not enforced", cause)
    plans = [[plan] if isinstance(plan, str) else plan for plan in module_bucket_plans]
    places = places_of(gm.graph)
    buckets = {}
    for kind in (GATHER, SCATTER):
        members = _overlap.fsdp_collectives(gm.graph.nodes, kind)
        buckets[kind] = _overlap.merge(gm, _by_plan(members, plans, module_stack_fn), kind, places)
    overlap(buckets, places, limit_bytes=float("inf"))
    return _overlap.finish(gm, places)


manual_overlap_bucketing.__module__ = _PLACE


def _by_plan(members: list[Collective], plans: list[list[str]], module_stack: Any) -> list[list[Collective]]:
    """The members of each plan that move together; what is in no plan is left out."""
    groups: dict[Hashable, list[Collective]] = defaultdict(list)
    for member in members:
        for index, names in enumerate(plans):
            if _overlap.is_inside(member.node, names, module_stack):
                groups[index, member.key].append(member)
                break
    return list(groups.values())


_VIEWS = {
    "GraphView": lambda: _graph_view.GraphView,
    "make_graph_view": lambda: _graph_view.make_graph_view,
    "get_subgraph_by_path": lambda: _graph_view.get_subgraph_by_path,
}

BACKPORT = Backport(
    name="overlap_manual_scheduling",
    summary="bucket FSDP's collectives by module and overlap them: manual_overlap_bucketing",
    target=_PLACE,
    since=_SINCE,
    first_forms={"2.10": "asks for a process group, whatever the graph"},
    upstream="https://github.com/pytorch/pytorch/pull/165487",
    differs=(
        "insert_overlap_deps does not make inductor keep the order; buckets are copied with plain operators; "
        "the classes of torch's pass are not there"
    ),
    names={
        "manual_overlap_bucketing": lambda: manual_overlap_bucketing,
        **_VIEWS,
        "ManualOverlapScheduler": lambda: unavailable(
            f"{_PLACE}.ManualOverlapScheduler",
            "torchspan has the pass as a function",
            _SINCE,
            "call manual_overlap_bucketing",
        ),
        "ManualOverlapPreservingBucketer": lambda: unavailable(
            f"{_PLACE}.ManualOverlapPreservingBucketer",
            "torchspan has the pass as a function",
            _SINCE,
            "call manual_overlap_bucketing",
        ),
    },
    elsewhere={
        "torch._inductor.fx_passes.graph_view": _VIEWS,
        "torch._inductor.fx_passes.control_dependencies": {
            "preserve_node_ordering": lambda: unavailable(
                "torch._inductor.fx_passes.control_dependencies.preserve_node_ordering",
                "this torch's inductor has no operator that orders others",
                _SINCE,
            )
        },
    },
    is_module=True,
)
