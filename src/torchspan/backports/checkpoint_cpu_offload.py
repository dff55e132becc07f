"""``CheckpointPolicy.MUST_CPU_OFFLOAD`` and ``PREFER_CPU_OFFLOAD``: what a policy of selective checkpointing may answer."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport, Change

_PLACE = "torch.utils.checkpoint"
_NEW = {"MUST_CPU_OFFLOAD": 4, "PREFER_CPU_OFFLOAD": 5}


@functools.cache
def _members() -> dict[str, Any]:
    """The members that torch's enumeration lacks."""
    from torch.utils.checkpoint import CheckpointPolicy

    return {name: _member(CheckpointPolicy, name, value) for name, value in _NEW.items()}


def _member(enumeration: Any, name: str, value: int) -> Any:
    member = object.__new__(enumeration)
    member.__objclass__, member._name_, member._value_, member._sort_order_ = enumeration, name, value, value
    return member


def _with_members(table: str) -> Change:
    """One of the enumeration's own tables, with the new members."""
    build: Mapping[str, Callable[[Any], object]] = {
        "_member_map_": lambda old: {**old, **_members()},
        "_member_names_": lambda old: [*old, *_members()],
        "_value2member_map_": lambda old: {**old, **{member.value: member for member in _members().values()}},
    }
    return Change(_PLACE, f"CheckpointPolicy.{table}", build[table])


def _lacks(module: ModuleType | None) -> bool:
    members = {} if module is None else module.CheckpointPolicy.__members__
    member = members.get("MUST_CPU_OFFLOAD")
    return member is None or (_members.cache_info().currsize > 0 and member is _members()["MUST_CPU_OFFLOAD"])


BACKPORT = Backport(
    name="checkpoint_cpu_offload",
    summary="policies of selective checkpointing that ask for the CPU's memory: CheckpointPolicy.MUST_CPU_OFFLOAD",
    target=_PLACE,
    since="2.11.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.11.0/torch/utils/checkpoint.py",
    differs="nothing known: torch 2.15 too computes such values anew, until a pass over the graph offloads them",
    also=(
        Change(_PLACE, "CheckpointPolicy.MUST_CPU_OFFLOAD", lambda old: _members()["MUST_CPU_OFFLOAD"], create=True),
        Change(_PLACE, "CheckpointPolicy.PREFER_CPU_OFFLOAD", lambda old: _members()["PREFER_CPU_OFFLOAD"], create=True),
        _with_members("_member_map_"),  # after them: an enumeration lets no attribute be set that its table has
        _with_members("_member_names_"),
        _with_members("_value2member_map_"),
    ),
    lacks=_lacks,
)
