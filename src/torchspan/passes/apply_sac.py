"""Selective activation checkpointing: compute again in the backward what is cheaper to compute than to keep."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from torchspan.core.collectives import origin_of
from torchspan.core.errors import InputError, PassError
from torchspan.core.graph import Graph
from torchspan.core.text import format_bytes, parse_bytes
from torchspan.passes._again import Anew
from torchspan.passes._base import Pass, PassContext, Stage, editable, refuse_writes
from torchspan.passes._blocks import block_of, part_of, patterns_of
from torchspan.passes._costs import EXPENSIVE, answers, cost_of, why_not_again
from torchspan.passes._offload import Offloading, is_on_host, other_device
from torchspan.passes._phases import Phase, phases_of
from torchspan.passes._storages import (
    kept_for_backward,
    num_bytes_of,
    owner_of,
    producer_of,
    returned_by,
    total_bytes,
    viewed_by,
)


@dataclass(frozen=True)
class ApplySAC(Pass):
    """Recomputes activations of the forward in the backward, right before they are first read; every bit stays.

    It works on parts of the model: its blocks, or the submodules that answer to `modules` (``*.feed_forward``, several by
    ``|``). With `every`, on every second (2), third (3) … of them. What a part takes from outside and what it gives is kept;
    inside,

    - results of operators that answer to `save` are kept (``mm``, ``*scaled_dot_product*`` or ``aten.mm.default``), the others
      are recomputed: ``save=""`` recomputes all; `recompute` are exceptions from `save`;
    - with a `budget`, what is kept is chosen instead: the results that take longest to compute for each byte, until what is
      kept comes to the budget: a share of what is kept without the pass (``0.4``) or bytes (``300MiB``);
    - what answers to `offload` and is kept waits on the CPU meanwhile, where the graph is on a GPU.

    Never recomputed are random operators, sizes that depend on data, and collectives. With `collectives`, these are too, but
    for the gathering of parameters, which is not this pass's to repeat.
    """

    name: ClassVar[str] = "apply_sac"
    summary: ClassVar[str] = "recomputes activations in the backward: by operator, by module, or within a budget of memory"
    stage: ClassVar[Stage] = "memory"

    save: str = EXPENSIVE
    recompute: str = ""
    offload: str = ""
    budget: str = ""
    modules: str = ""
    every: int = 1
    collectives: bool = False

    def __post_init__(self) -> None:
        if self.budget and self.save != EXPENSIVE:
            raise InputError(
                f"apply_sac has budget {self.budget} and save {self.save!r}, which are two ways to choose; give one"
            )
        if self.every < 1:
            raise InputError(f"option 'every' of apply_sac is {self.every}; expected 1 or more")
        self.limit(0)

    def limit(self, num_bytes: int) -> int:
        """The bytes that `budget` allows where `num_bytes` are kept without the pass."""
        try:
            share = float(self.budget)
        except ValueError:
            return parse_bytes(self.budget) if self.budget else num_bytes
        if not 0 <= share <= 1:
            raise InputError(
                f"option 'budget' of apply_sac is {self.budget}; expected a share from 0 to 1, or bytes such as 2GiB"
            )
        return int(share * num_bytes)

    def require(self, graph: Graph) -> None:
        refuse_writes(self.name, graph)

    def run(self, graph: Graph, context: PassContext) -> Graph:
        module = editable(graph)
        result = graph.with_module(module, str(self))
        phases = phases_of(module.graph)
        kept = kept_for_backward(module.graph, phases)
        choice = _choose(self, result, phases, kept)
        offloading = Offloading(module.graph, phases, self._offloaded(choice, context))
        anew = Anew(module.graph, phases, choice.recomputed, offloading.bring_back(), self.name)
        anew.rewrite()
        offloading.finish()
        module.graph.eliminate_dead_code()
        module.recompile()
        _record(self, kept, kept_for_backward(module.graph, phases_of(module.graph)), anew.num_recomputed, choice, context)
        return result

    def _offloaded(self, choice: _Choice, context: PassContext) -> list[Node]:
        """The kept values that answer to `offload`."""
        if not self.offload:
            return []
        patterns = patterns_of(self.offload)
        owners = [owner for owner in choice.kept if answers(producer_of(owner).target, patterns)]
        movable = [owner for owner in owners if other_device(owner)]
        if len(movable) < len(owners):
            reason = f"{len(owners) - len(movable)} values that answer to {self.offload!r} are on the CPU already"
            if context.strict:
                raise PassError(f"{self.name} cannot offload: {reason}; leave offload out, or run on a GPU")
            context.report.decide("pass", self.name, "not offloaded", reason)
        return movable

    def ensure(self, before: Graph, after: Graph) -> None:
        """No more is kept than was, and the forward computes what it did: new nodes are the backward's."""
        if not self.collectives and before.num_collectives() != after.num_collectives():
            actual, expected = dict(after.num_collectives()), dict(before.num_collectives())
            raise PassError(f"{self.name} changed the collectives: {expected} before, {actual} after")
        old, new = (_bytes_on_device(graph) for graph in (before, after))
        if new > old:
            raise PassError(f"{self.name} keeps {new} bytes for the backward, {old} before; expected no more")


@dataclass(frozen=True)
class _Choice:
    """What is recomputed, what is kept, and the limit if there was one."""

    recomputed: frozenset[Node]
    kept: tuple[Node, ...]
    limit: int | None = None


def _choose(options: ApplySAC, graph: Graph, phases: Mapping[Node, Phase], kept: list[Node]) -> _Choice:
    """The plan; nothing is changed."""
    parts = _Parts(options, graph, phases)
    save, recompute = patterns_of("" if options.budget else options.save), patterns_of(options.recompute)
    chosen = {node for node in parts.free if answers(node.target, save) and not answers(node.target, recompute)}
    others = [owner for owner in kept if owner in parts.returned]
    parts.leave_what_does_not_pay(chosen, others)
    limit = None
    if options.budget:
        limit = min(options.limit(total_bytes(kept)[0]), total_bytes(kept)[0])
        chosen = _within(limit, parts, others, recompute)
    recomputed, needed = parts.reach(parts.all_starts(), chosen)
    return _Choice(frozenset(recomputed), tuple(needed), limit)


class _Tally:
    """The bytes that are kept: what each part has kept, and what is kept anyway; what several keep counts once."""

    def __init__(self, held: dict[str | None, set[Node]], others: Iterable[Node]) -> None:
        self._held = held
        self._count = Counter(owner for owners in held.values() for owner in owners)
        self._count.update(others)
        self.total = _sum(self._count)

    def change(self, part: str | None, owners: set[Node]) -> int:
        """How many bytes more are kept if `part` has `owners` kept instead."""
        less, more = self._held[part] - owners, owners - self._held[part]
        return _sum(node for node in more if not self._count[node]) - _sum(node for node in less if self._count[node] == 1)

    def replace(self, part: str | None, owners: set[Node]) -> None:
        """Have `part` keep `owners` instead."""
        self.total += self.change(part, owners)
        self._count.subtract(self._held[part] - owners)
        self._count.update(owners - self._held[part])
        self._held[part] = owners


class _Parts:
    """The parts of a model that are worked on: which nodes each has, and what its backward reads."""

    def __init__(self, options: ApplySAC, graph: Graph, phases: Mapping[Node, Phase]) -> None:
        self._phases = phases
        self.returned = returned_by(graph.module.graph)
        self._part = _parts(options, graph, phases)
        parameters = {node for node, spec in zip(graph.placeholders(), graph.inputs) if spec.kind == "parameter"}
        self.free = frozenset(
            node for node in self._part if self._may_again(node, options.collectives, parameters) and not self._leaves(node)
        )
        """Producers that may be recomputed."""
        reads = (
            read
            for node in graph.module.graph.nodes
            if phases[node] != "forward" and node.op == "call_function"
            for read in node.all_input_nodes
            if phases[read] == "forward" and read.op == "call_function"
        )
        self.starts: dict[str | None, list[Node]] = defaultdict(list)
        """What the backward reads of each part, and, under None, of the rest of the forward."""
        for node in dict.fromkeys(reads):
            self.starts[self.part_of(node)].append(node)

    def all_starts(self) -> list[Node]:
        """What the backward reads of the forward."""
        return [node for nodes in self.starts.values() for node in nodes]

    def part_of(self, node: Node) -> str | None:
        """The part that computes the value of `node`."""
        return self._part.get(producer_of(owner_of(node)))

    def leave_what_does_not_pay(self, saved: Collection[Node], others: Iterable[Node]) -> None:
        """Take parts out that would keep more than now: of which what they are given is more than what they compute."""
        held = {
            part: {owner for owner in map(owner_of, nodes) if owner.op == "call_function"}
            for part, nodes in self.starts.items()
        }
        tally, left = _Tally(dict(held), others), set[str | None]()
        for part, nodes in self.starts.items():
            owners = set(self.reach(nodes, saved)[1])
            change, freed = tally.change(part, owners), held[part] - owners
            if change < 0 or (change == 0 and None in map(num_bytes_of, freed)):
                tally.replace(part, owners)
            else:
                left.add(part)
        self.free = frozenset(node for node in self.free if self._part[node] not in left)

    def reach(self, starts: Iterable[Node], saved: Collection[Node]) -> tuple[dict[Node, None], dict[Node, None]]:
        """What is recomputed and what is kept, so that `starts` are there in the backward while `saved` is kept."""
        recomputed: dict[Node, None] = {}
        kept: dict[Node, None] = {}
        stack, seen = [*starts], set[Node]()
        while stack:
            node = stack.pop()
            if node in seen or node.op != "call_function":
                continue
            seen.add(node)
            owner = owner_of(node)
            if owner.op != "call_function":
                continue  # a view of an input
            producer = producer_of(owner)
            if producer in self.free and producer not in saved:
                recomputed[producer] = None
                stack.extend(node.all_input_nodes)  # of a view: what it views
                stack.extend(producer.all_input_nodes)
            else:
                kept[owner] = None
        return recomputed, kept

    def _may_again(self, node: Node, collectives: bool, parameters: set[Node]) -> bool:
        reason = why_not_again(node)
        if reason == "collective":
            return collectives and origin_of(node.args[0]) not in parameters
        return reason is None

    def _leaves(self, producer: Node) -> bool:
        """Whether a part gives this to others, or the graph returns it."""
        stack, part = [producer], self._part[producer]
        while stack:
            node = stack.pop()
            if node in self.returned:
                return True
            for user in node.users:
                if user.op == "call_function" and self._phases[user] == "forward":
                    if viewed_by(user) is not None or producer_of(user) is not user:
                        stack.append(user)
                    elif self._part.get(user) != part:
                        return True
        return False


def _parts(options: ApplySAC, graph: Graph, phases: Mapping[Node, Phase]) -> dict[Node, str]:
    """The part of each node of the forward that makes memory of its own."""
    patterns = patterns_of(options.modules)
    parts: dict[Node, str] = {}
    for node in graph.module.graph.nodes:
        if phases[node] == "forward" and node.op == "call_function" and viewed_by(node) is None and producer_of(node) is node:
            path = (node.meta.get("custom") or {}).get("module")
            part = (part_of(path, patterns) if patterns else block_of(path)) if isinstance(path, str) else None
            if part is not None:
                parts[node] = part
    selection = set(list(dict.fromkeys(parts.values()))[options.every - 1 :: options.every])
    return {node: part for node, part in parts.items() if part in selection}


def _within(limit: int, parts: _Parts, others: Iterable[Node], again: list[str]) -> set[Node]:
    """What to keep of what may be recomputed, so that all that is kept comes to `limit` at most: a greedy knapsack.

    Results that take longest to compute for each byte come first. Whether one fits is told by what is then really kept: a
    value that is kept makes others needless that were kept to compute it. Operators that answer to `again` are left out.
    """
    tally = _Tally({part: set(parts.reach(nodes, ())[1]) for part, nodes in parts.starts.items()}, others)
    saved: set[Node] = set()
    left = [node for node in _by_worth(parts.reach(parts.all_starts(), ())[0]) if not answers(node.target, again)]
    while left:
        refused: list[Node] = []
        for node in left:
            part = parts.part_of(node)
            owners = set(parts.reach(parts.starts[part], {*saved, node})[1])
            if tally.total + tally.change(part, owners) > limit:
                refused.append(node)
            else:
                saved.add(node)
                tally.replace(part, owners)
        if len(refused) == len(left):
            break
        left = refused  # what has become needless may have made room
    return saved


def _by_worth(producers: Iterable[Node]) -> list[Node]:
    """Those whose size is known, with what takes longest to compute for each byte first; the forward's order among equals."""
    order = sorted(producers)
    sizes = {node: _bytes_of_results(node) for node in order}
    worth = {node: cost_of(node) / max(1, size) for node in order if (size := sizes[node]) is not None}
    return sorted(worth, key=lambda node: -worth[node])


def _bytes_of_results(producer: Node) -> int | None:
    owners = {owner_of(user) for user in producer.users if producer_of(user) is producer and user is not producer} or {producer}
    sizes = [num_bytes_of(owner) for owner in owners]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _sum(owners: Iterable[Node]) -> int:
    return sum(num_bytes_of(owner) or 0 for owner in owners)


def _bytes_on_device(graph: Graph) -> int:
    """The bytes that a graph keeps for its backward, but for what waits on the CPU."""
    kept = kept_for_backward(graph.module.graph, phases_of(graph.module.graph))
    return total_bytes([owner for owner in kept if not is_on_host(owner)])[0]


def _record(
    options: ApplySAC, before: list[Node], after: list[Node], num_recomputed: int, choice: _Choice, context: PassContext
) -> None:
    (old, uncounted), (new, _) = total_bytes(before), total_bytes([owner for owner in after if not is_on_host(owner)])
    waiting = total_bytes([owner for owner in after if is_on_host(owner)])[0]
    context.report.figure("sac_kept_before_bytes", old)
    context.report.figure("sac_kept_after_bytes", new)
    share = math.nan if not old else new / old
    if not num_recomputed and new == old:
        nowhere = "there is no block, or module of those named, that would keep less by recomputing"
        reason = nowhere if choice.limit is None else "it fits the budget, or nothing can be recomputed"
        context.report.decide("pass", options.name, "nothing changed", f"{reason}: {format_bytes(old)} are kept")
        return
    known = f", besides {uncounted} of a size that depends on data" if uncounted else ""
    known += f", and {waiting} bytes wait on the CPU" if waiting else ""
    outcome = (
        f"kept for the backward {format_bytes(old)} → {format_bytes(new)} ({share:.0%}), {num_recomputed} nodes recomputed"
    )
    context.report.decide("pass", options.name, outcome, f"predicted from shapes: {old} → {new} bytes{known}")
    if choice.limit and new > choice.limit:
        reason = f"{new} bytes is the least that is kept with all recomputed that may be; the budget is {choice.limit}"
        if context.strict:
            raise PassError(f"{options.name} cannot keep to its budget: {reason}; raise it")
        context.report.decide("pass", options.name, "budget not reached", reason)


PASS = ApplySAC
