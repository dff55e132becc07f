"""Process groups whose names say what they are for and which ranks they have, so that any process of the job can make them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from torch.fx import Node

from torchspan.core.errors import PassError
from torchspan.core.graph import Graph, is_async_collective
from torchspan.private import distributed

_NAME = re.compile(r"torchspan\.(?P<purpose>\w+)\[(?P<ranks>[\d:,]+)\]")


def name_of(purpose: str, ranks: Sequence[int]) -> str:
    """The name of a group of `ranks` for a purpose.

    >>> name_of("parameters", [1, 3, 5, 7]), name_of("gradients", [0, 3, 4])
    ('torchspan.parameters[1:8:2]', 'torchspan.gradients[0,3,4]')
    """
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    evenly = range(ranks[0], ranks[-1] + 1, max(step, 1))
    text = f"{evenly.start}:{evenly.stop}:{evenly.step}" if list(evenly) == list(ranks) else ",".join(map(str, ranks))
    return f"torchspan.{purpose}[{text}]"


def ranks_of(name: str) -> list[int] | None:
    """The ranks that a name of `name_of` says, or None for any other name.

    >>> ranks_of("torchspan.parameters[1:8:2]"), ranks_of("7")
    ([1, 3, 5, 7], None)
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if ":" in match["ranks"]:
        return list(range(*map(int, match["ranks"].split(":"))))
    return [int(rank) for rank in match["ranks"].split(",")]


def create_named_groups(graph: Graph) -> list[str]:
    """Make the process groups that `graph` names by `name_of` and that are not there yet; their names, on this rank.

    Every rank of the job calls this at the same time, with its own graph: the ranks tell each other what they lack, and make
    all of it in one order. So a graph that was saved runs in a new job of as many ranks.
    """

    named = dict.fromkeys(group for group in _groups(graph.module.graph.nodes) if ranks_of(group) is not None)
    lacking = [group for group in named if distributed.find_group(group) is None]
    _create(lacking)
    return lacking


def _groups(nodes: Iterable[Node]) -> Iterator[str]:
    """The group of each collective."""
    return (node.args[-1] for node in nodes if is_async_collective(node) and isinstance(node.args[-1], str))


def _create(names: list[str]) -> None:
    """Make the groups of these names, with all that other ranks lack, in one order on every rank."""
    import torch.distributed as dist

    if not dist.is_initialized():
        if names:
            raise PassError(f"the graph talks in the group {names[0]}, and this process is of no job; start it by a launcher")
        return
    names_of_ranks: list[list[str]] = [names] * dist.get_world_size()
    if dist.get_backend() != "fake":  # which says nothing of other ranks, and of which no rank is there
        dist.all_gather_object(names_of_ranks, names)
    for name in sorted({name for of_rank in names_of_ranks for name in of_rank}):
        ranks = ranks_of(name)
        if ranks is None or ranks[-1] >= dist.get_world_size():
            raise PassError(f"the group {name} is not one of {dist.get_world_size()} ranks, which this job has")
        group = dist.new_group(ranks, group_desc=name)
        if dist.get_rank() in ranks and name in names:
            distributed.name_group(group, name)
