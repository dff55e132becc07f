"""``schedule_overlap_bucketing``: FSDP's collectives move together as far as memory allows, and overlap with compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import GraphModule, Node

from torchspan.backports import _options, _overlap
from torchspan.backports._base import Backport, Change, unavailable
from torchspan.core.collectives import GATHER, SCATTER, Collective
from torchspan.core.overlap import overlap, places_of, sink_waits, size_of
from torchspan.private import inductor

_PLACE = "torch._inductor.fx_passes.overlap_scheduling"
_SINCE = "2.10.0"
_OPTIONS = "aten_distributed_optimizations"
_BUCKET_MB = 100.0  # large enough to use a network well, small enough that several blocks are not one bucket

# upstream's options, and the defaults of its function
_DEFAULTS: dict[str, Any] = {
    "collective_bucketing": None,
    "insert_overlap_deps": None,
    "max_compute_pre_fetch": None,
    "compute_overlap_multipler": None,
    "custom_runtime_estimation": None,
    "collective_estimator": "analytical",
    "compute_estimator": "benchmark",
    "max_memory_increase_gb": None,
    "max_memory_increase_ratio": None,
    "max_in_flight_gb": None,
    "max_coll_distance": None,
    "log_final_collectives_estimations": False,
    "bucket_exposed_first": None,
    "bucket_only_internode_comms": False,
    "enable_fusion_regions": False,
    "bucket_mode": None,
    "prioritize_bucketing_during_scheduling": True,
    "pre_bucketing_fsdp_collectives": True,
    "pre_bucketing_fsdp_collectives_bucket_cap_mb": None,
}
_NAMED = {f"{_OPTIONS}.{name}": default for name, default in _DEFAULTS.items()}


def schedule_overlap_bucketing(
    gm: GraphModule,
    max_in_flight_gb: float = 5,
    max_compute_pre_fetch: int = 200,
    collective_bucketing: bool = False,
    insert_overlap_deps: bool = False,
    compute_overlap_multipler: float = 1.0,
    max_coll_distance: int = 200,
    custom_runtime_estimation: Callable[[Node, int | None], float | None] | None = None,
    pre_bucketing_fsdp_collectives_bucket_cap_mb: float | None = None,
    **estimation: Any,
) -> GraphModule:
    """Begin FSDP's collectives early and wait for them late; with `collective_bucketing`, equal neighbours become one.

    A gather begins before the wait for the one before it, a scatter is waited for after the next has begun, every other
    collective just before what needs it. Every number stays bitwise what it was. Nothing is measured or estimated: arguments
    for that change nothing, and a Decision says so.

    Args:
        gm: a forward or backward graph of AOTAutograd, changed in place.
        max_in_flight_gb: of two collectives that would run at once together.
        collective_bucketing: whether collectives of one group and dtype, one after another in the graph, are merged.
        insert_overlap_deps: asks that inductor keeps the order; old torch's has no means for that (a Decision says so).
        max_coll_distance: the most collectives in one bucket.
        pre_bucketing_fsdp_collectives_bucket_cap_mb: the size of a bucket; 100 by default.

    Raises:
        TypeError: an argument that upstream does not have either.
    """
    if unknown := sorted(set(estimation) - set(_DEFAULTS)):
        raise TypeError(f"schedule_overlap_bucketing() got an unexpected keyword argument {unknown[0]!r}")
    if not _overlap.has_waits(gm):
        return gm
    ignored = {"custom_runtime_estimation": custom_runtime_estimation, **estimation}
    if ignored_names := [name for name, value in ignored.items() if value != _DEFAULTS.get(name, value)]:
        _overlap.say(BACKPORT.name, ", ".join(sorted(ignored_names)), "nothing is estimated", "the order is set by fixed rules")
    if insert_overlap_deps:
        cause = "this torch's inductor has no control dependencies; it keeps the order of the graph where it does not fuse"
        _overlap.say(BACKPORT.name, "insert_overlap_deps=True", "the order is not enforced", cause)
    limit_bytes = max_in_flight_gb * 2**30
    cap_bytes = min(limit_bytes / 2, (pre_bucketing_fsdp_collectives_bucket_cap_mb or _BUCKET_MB) * 2**20)
    places = places_of(gm.graph)
    buckets = {}
    for kind in (GATHER, SCATTER):
        members = _overlap.fsdp_collectives(gm.graph.nodes, kind)
        groups = (
            _neighbours(members, cap_bytes, max_coll_distance) if collective_bucketing else [[member] for member in members]
        )
        buckets[kind] = _overlap.merge(gm, groups, kind, places)
    sink_waits(gm.graph, places)
    overlap(buckets, places, limit_bytes)
    return _overlap.finish(gm, places)


def _neighbours(members: list[Collective], cap_bytes: float, max_members: int) -> list[list[Collective]]:
    """Members with equal keys, in the order of the graph, in groups of at most `cap_bytes`."""
    open_groups: dict[Any, list[Collective]] = {}
    groups: list[list[Collective]] = []
    for member in members:
        group = open_groups.get(member.key)
        if group is None or len(group) >= max_members or size_of([*group, member]) > cap_bytes:
            group = open_groups[member.key] = []
            groups.append(group)
        group.append(member)
    return groups


def schedule_overlap_bucketing_from_inductor_configs(gm: GraphModule) -> GraphModule:
    """`schedule_overlap_bucketing` with what ``torch._inductor.config.aten_distributed_optimizations`` says."""
    values = {name: getattr(inductor.config, f"{_OPTIONS}.{name}") for name in _DEFAULTS}
    return schedule_overlap_bucketing(gm, **{name: value for name, value in values.items() if value is not None})


def get_group_name(n: Node) -> str:
    """The process group of a collective."""
    return str(n.args[-1] if "group_name" not in n.kwargs else n.kwargs["group_name"])


def is_compute_node(n: Node) -> bool:
    """Whether a node is heavy compute: an operator whose floating-point operations torch can count."""
    from torch.utils.flop_counter import flop_registry

    return n.op == "call_function" and getattr(n.target, "overloadpacket", n.target) in flop_registry


for _public in (
    schedule_overlap_bucketing,
    schedule_overlap_bucketing_from_inductor_configs,
    get_group_name,
    is_compute_node,
):
    _public.__module__ = _PLACE

BACKPORT = Backport(
    name="overlap_scheduling",
    summary="overlap collectives with compute, and bucket them: schedule_overlap_bucketing",
    target=_PLACE,
    since=_SINCE,
    upstream="https://github.com/pytorch/pytorch/pull/163960",
    differs=(
        "the order follows fixed rules, nothing is measured or estimated; only FSDP's gathers and scatters are merged; "
        "insert_overlap_deps does not make inductor keep the order; OverlapScheduler itself is not there"
    ),
    names={
        "schedule_overlap_bucketing": lambda: schedule_overlap_bucketing,
        "schedule_overlap_bucketing_from_inductor_configs": lambda: schedule_overlap_bucketing_from_inductor_configs,
        "get_group_name": lambda: get_group_name,
        "is_compute_node": lambda: is_compute_node,
        "CollectiveInfo": lambda: unavailable(
            f"{_PLACE}.CollectiveInfo",
            "torchspan has the pass as a function, which estimates no times",
            _SINCE,
            "call schedule_overlap_bucketing",
        ),
        "OverlapScheduler": lambda: unavailable(
            f"{_PLACE}.OverlapScheduler",
            "torchspan has the pass as a function",
            _SINCE,
            "call schedule_overlap_bucketing",
        ),
    },
    is_module=True,
    also=(
        Change("torch._inductor.config", "_config", _options.with_options(_NAMED)),
        Change("torch._inductor.config", "_compile_ignored_keys", lambda keys: {*keys, *_NAMED}),
        Change("torch._inductor.config", _OPTIONS, _options.option_group(_OPTIONS), create=True),
    ),
)
