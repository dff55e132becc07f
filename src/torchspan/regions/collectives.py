"""Which collectives a run issues, in which order: compiled code has to issue the same ones as eager.

If it does, one rank may run a call compiled and another rank eagerly, as happens where guards fail on one rank only. If it did
not, ranks would wait for each other for ever, or take one result for another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from torchspan.jobs.groups import groups_here

_NAMESPACES = ("c10d", "_c10d_functional")
# names of the same collective, by which ranks pair up: with one tensor for all ranks, or a list of tensors
_SAME = {
    "all_reduce": "allreduce",
    "all_reduce_coalesced": "allreduce_coalesced",
    "all_gather_into_tensor": "allgather",
    "all_gather_into_tensor_out": "allgather",
    "_allgather_base": "allgather",
    "all_gather_into_tensor_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base": "reduce_scatter",
    "all_to_all_single": "alltoall",
    "alltoall_base": "alltoall",
}
_NO_COLLECTIVES = ("wait_tensor",)


@dataclass(frozen=True)
class Collectives:
    """What a run issued: (collective, name of its group) in order, and the global ranks of each group."""

    issued: tuple[tuple[str, str], ...] = ()
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.issued)

    def __str__(self) -> str:
        return ", ".join(name for name, _ in self.issued) or "none"

    @property
    def kinds(self) -> str:
        """The collectives as text that is equal on all ranks that issue the same ones, whatever their groups are called."""
        numbers: dict[str, int] = {}
        return " ".join(f"{name}:{numbers.setdefault(group, len(numbers))}" for name, group in self.issued)

    @property
    def participants(self) -> tuple[int, ...]:
        """The ranks that take part: those of the group that contains all others, or else of the whole job."""
        widest = max(self.ranks.values(), key=len)
        if all(set(ranks) <= set(widest) for ranks in self.ranks.values()):
            return tuple(sorted(widest))
        return tuple(range(dist.get_world_size()))


class _Recorder(TorchDispatchMode):
    """Records the collectives that are dispatched: a program's own, functional ones, and those of compiled code."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self.issued: list[tuple[str, str]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = dict(kwargs or {})
        if getattr(func, "namespace", "") in _NAMESPACES:
            name = func._schema.name.partition("::")[2].removesuffix("_")
            group = _group_name([*args, *keywords.values()])
            if name not in _NO_COLLECTIVES and group is not None:
                self.issued.append((_SAME.get(name, name), group))
        return func(*args, **keywords)


def _group_name(values: Sequence[Any]) -> str | None:
    """The group among the arguments of a collective: an object, or, last of all texts, its name."""
    for value in values:
        group = _unboxed(value)
        if group is not None:
            return str(group.group_name)
    names = [value for value in values if isinstance(value, str)]
    return names[-1] if names else None


def _unboxed(value: Any) -> Any:
    if isinstance(value, dist.ProcessGroup):
        return value
    if type(value).__name__ != "ScriptObject":
        return None
    try:
        return dist.ProcessGroup.unbox(value)
    except (RuntimeError, TypeError):  # another object: the kind of a reduction
        return None


def collectives_of(run: Callable[[], Any]) -> Collectives:
    """The collectives that `run` issues, except inside higher-order operators; on torch 2.8 none if it has such an operator."""
    try:
        with _Recorder() as recorder:
            run()
    except NotImplementedError:  # torch 2.8 refuses such operators under a mode
        return Collectives()
    here = groups_here()
    ranks = dict(here.named) if here is not None else {}
    return Collectives(tuple(recorder.issued), {name: ranks[name] for _, name in recorder.issued})
