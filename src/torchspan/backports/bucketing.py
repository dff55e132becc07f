"""``torch._inductor.fx_passes.bucketing``: FSDP's collectives merged by size, and what tells collectives apart."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch.fx import GraphModule, Node

from torchspan.backports import _options, _overlap
from torchspan.backports._base import Backport, Change, has_module
from torchspan.core.collectives import GATHER, SCATTER, Collective, is_call, wait_for
from torchspan.core.overlap import places_of, size_of
from torchspan.private import inductor

_PLACE = "torch._inductor.fx_passes.bucketing"

# inductor's options that ask for it, and their defaults
_OPTIONS: dict[str, Any] = {
    "bucket_all_gathers_fx": "none",
    "bucket_all_gathers_fx_bucket_size_determinator": None,
    "bucket_reduce_scatters_fx": "none",
    "bucket_reduce_scatters_fx_bucket_size_determinator": None,
}

BucketMode = Literal["default", "custom_ops", "custom_ops_multidtype", "coalesced"]


def is_all_gather_into_tensor(node: Node) -> bool:
    """Whether `node` begins an all-gather."""
    return is_call(node, GATHER)


def is_reduce_scatter_tensor(node: Node) -> bool:
    """Whether `node` begins a reduce-scatter."""
    return is_call(node, SCATTER)


def is_all_reduce_tensor(node: Node) -> bool:
    """Whether `node` begins an all-reduce."""
    return is_call(node, "all_reduce")


def is_all_to_all_tensor(node: Node) -> bool:
    """Whether `node` begins an all-to-all."""
    return is_call(node, "all_to_all_single")


def is_wait_tensor(node: Node) -> bool:
    """Whether `node` waits for a collective."""
    return is_call(node, "wait_tensor")


def is_wait_tensor_from_all_gather_into_tensor(node: Node) -> bool:
    """Whether `node` waits for an all-gather."""
    return is_wait_tensor(node) and is_call(node.args[0], GATHER)


def is_fsdp_all_gather(node: Node, *ancestors: Any) -> bool:
    """Whether `node` gathers what is made of one graph input alone, as FSDP gathers a parameter."""
    return _overlap.is_fsdp_gather(node)


def is_fsdp_reduce_scatter(node: Node) -> bool:
    """Whether `node` scatters what then only becomes graph outputs, as FSDP scatters a gradient."""
    return _overlap.is_fsdp_scatter(node)


def bucket_cap_mb_by_bucket_idx_default(bucket_id: int) -> float:
    """The size of the bucket number `bucket_id`, in MB, unless another is asked for: two gigabytes."""
    return 2000.0


def bucket_all_gather(
    gm: GraphModule, bucket_cap_mb_by_bucket_idx: Callable[[int], float] | None = None, mode: str | None = None
) -> None:
    """Merge FSDP's parameter gathers, in the order of the graph, in place; every number stays bitwise what it was.

    Args:
        gm: a graph of AOTAutograd.
        bucket_cap_mb_by_bucket_idx: how large each bucket may become.
        mode: how upstream copies into buckets; the copies are plain operators here.
    """
    _bucket(gm, GATHER, bucket_cap_mb_by_bucket_idx or bucket_cap_mb_by_bucket_idx_default)


def bucket_reduce_scatter(
    gm: GraphModule, bucket_cap_mb_by_bucket_idx: Callable[[int], float] | None = None, mode: str | None = None
) -> None:
    """Merge FSDP's gradient scatters; as `bucket_all_gather`."""
    _bucket(gm, SCATTER, bucket_cap_mb_by_bucket_idx or bucket_cap_mb_by_bucket_idx_default)


def merge_all_gather(gm: GraphModule, ag_buckets: Sequence[Sequence[Node]], mode: str | None = None) -> None:
    """Merge the all-gathers of each bucket, all of parameters, in place."""
    _merge(gm, ag_buckets, GATHER)


def merge_reduce_scatter(gm: GraphModule, rs_buckets: Sequence[Sequence[Node]], mode: str | None = None) -> None:
    """Merge the reduce-scatters of each bucket, none made of another's result, in place."""
    _merge(gm, rs_buckets, SCATTER)


def _bucket(gm: GraphModule, kind: str, cap_mb: Callable[[int], float]) -> None:
    members = _overlap.fsdp_collectives(gm.graph.nodes, kind)
    open_buckets: dict[Any, list[Collective]] = {}
    buckets: list[list[Collective]] = []
    for member in members:
        bucket = open_buckets.get(member.key)
        if bucket is None or size_of([*bucket, member]) > cap_mb(buckets.index(bucket)) * 2**20:
            bucket = open_buckets[member.key] = []
            buckets.append(bucket)
        bucket.append(member)
    _write(gm, buckets, kind)


def _merge(gm: GraphModule, buckets: Sequence[Sequence[Node]], kind: str) -> None:
    groups = []
    for bucket in buckets:
        waits = [wait_for(node) for node in bucket]
        assert all(wait is not None for wait in waits), f"a collective of {list(bucket)} has not exactly one wait"
        groups.append([Collective(node, wait) for node, wait in zip(bucket, waits) if wait is not None])
    _write(gm, groups, kind)


def _write(gm: GraphModule, groups: Sequence[Sequence[Collective]], kind: str) -> None:
    places = places_of(gm.graph)
    _overlap.merge(gm, groups, kind, places)
    _overlap.finish(gm, places)


def _as_options_say(reinplace: Callable[[Any], None]) -> Callable[[Any], None]:
    """Inductor's last step on a graph that changes no tensor in place; before it, collectives are merged if options say so."""
    if has_module(_PLACE):
        return reinplace  # torch merges them itself

    @functools.wraps(reinplace)
    def then(graph: Any) -> None:
        merges = {"bucket_all_gathers_fx": bucket_all_gather, "bucket_reduce_scatters_fx": bucket_reduce_scatter}
        for name, merge in merges.items():
            if getattr(inductor.config, name) != "none":
                BACKPORT.record_use(f"torch._inductor.config.{name}")
                merge(graph.owning_module, getattr(inductor.config, f"{name}_bucket_size_determinator"))
        reinplace(graph)

    return then


_FUNCTIONS = (
    is_all_gather_into_tensor,
    is_reduce_scatter_tensor,
    is_all_reduce_tensor,
    is_all_to_all_tensor,
    is_wait_tensor,
    is_wait_tensor_from_all_gather_into_tensor,
    is_fsdp_all_gather,
    is_fsdp_reduce_scatter,
    bucket_cap_mb_by_bucket_idx_default,
    bucket_all_gather,
    bucket_reduce_scatter,
    merge_all_gather,
    merge_reduce_scatter,
)
for _public in _FUNCTIONS:
    _public.__module__ = _PLACE

BACKPORT = Backport(
    name="bucketing",
    summary="merge FSDP's collectives by size, also by inductor's options: torch._inductor.fx_passes.bucketing",
    target=_PLACE,
    since="2.9.0",
    came={
        "2.10.0": (
            "BucketMode",
            "is_all_reduce_tensor",
            "is_all_to_all_tensor",
        ),
        "2.11.0": (
            "is_fsdp_all_gather",
            "is_fsdp_reduce_scatter",
        ),
    },
    upstream="https://github.com/pytorch/pytorch/pull/158663",
    differs="buckets are copied with plain operators, whatever the mode; only gathers of parameters are merged",
    names={
        "BucketMode": lambda: BucketMode,
        **{function.__name__: partial(globals().__getitem__, function.__name__) for function in _FUNCTIONS},
    },
    is_module=True,
    also=(
        Change("torch._inductor.config", "_config", _options.with_options(_OPTIONS, left_out_by=None)),
        Change("torch._inductor.fx_passes.post_grad", "reinplace_inplaceable_ops", _as_options_say),
    ),
)
