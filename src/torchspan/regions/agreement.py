"""All ranks swap to compiled code in the same call, or none does: what they write to each other in the job's store.

The collectives of a call pair up across ranks, so that the number of collectives that a group has issued is a clock that all
its ranks read alike at the beginning of a call. Ranks that have compiled say so; then the lowest one proposes a time S on that
clock which lies ahead, and each rank that has not passed S takes part. The first rank whose call begins at S or later settles,
by one atomic write, whether it is the call in which all take over (all have taken part) or whether they try again; the others
read what was settled. No collective is issued, and no call waits for another rank: a thread in the background does, for a
limited time; a call reads and writes a few keys of the store when the proposed time has come.

The keys, under the name and the number of the agreement::

    code/RANK      the collectives of the rank's code, or why it runs eagerly
    at/N           the time on the clock that is proposed in round N
    in/N/RANK      the rank takes part in round N
    verdict/N      what was settled: all take over, another round, or an end with its reason
    ran/RANK       how the call went in which the rank took over
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch.distributed as dist

from torchspan.private import distributed
from torchspan.regions.collectives import Collectives

POLL_S = 0.05
MAX_POLL_S = 0.5
_GO, _AGAIN, _END = "go", "again", "end: "
_opened: Counter[str] = Counter()  # how many agreements of each name were begun: the n-th here is the n-th of every rank


class Agreement:
    """This `rank`'s side of the agreement on one generation, through a `store`; `clocks` gives each group's clock, by name."""

    def __init__(self, store: Any, rank: int, clocks: Callable[[], Mapping[str, int]]) -> None:
        self._store = store
        self._rank = rank
        self._clocks = clocks
        self._lock = threading.Lock()
        self._seen: Mapping[str, int] = {}  # each group's clock at the beginning of the last call that ran eagerly
        self._clock = ""
        self._proposed: tuple[int, int] | None = None  # the round that this rank takes part in, and its S
        self._ranks: tuple[int, ...] = ()
        self._began = time.monotonic()
        self.collectives = Collectives()

    # in the thread that has compiled

    def tell(self, collectives: Collectives) -> None:
        """Tell the others which collectives this rank's code issues."""
        self.collectives = collectives
        self._store.set(f"code/{self._rank}", f"code {collectives.kinds}")

    def refuse(self, why: str) -> None:
        """Tell the others that this rank goes on eagerly."""
        if self._store is not None:
            self._store.set(f"code/{self._rank}", f"{_END}{why}")

    def reach(self, is_cancelled: Callable[[], bool], timeout_s: float, may_wait: Callable[[], None]) -> str | None:
        """Wait until the ranks have settled in which call they take over (None), or why they do not.

        `may_wait` is called once a call that waits for the compile may go on.
        """
        self._ranks = self.collectives.participants
        self._clock = max(self.collectives.ranks, key=lambda name: len(self.collectives.ranks[name]))
        self._began = time.monotonic()
        deadline = self._began + timeout_s
        why_not = self._wait_for_code(is_cancelled, deadline)
        if why_not is not None:
            return self._ended(0, why_not).removeprefix(_END)
        number = 0
        while True:
            verdict = self._round(number, is_cancelled, deadline, may_wait)
            if verdict == _GO:
                return None
            if verdict != _AGAIN:
                return verdict.removeprefix(_END)
            number += 1

    def _wait_for_code(self, is_cancelled: Callable[[], bool], deadline: float) -> str | None:
        """Wait until every rank has announced its code; gives why they cannot take over together, or None."""
        missing = list(self._ranks)
        while missing:
            for rank in tuple(missing):
                message = self._read(f"code/{rank}")
                if message is None:
                    continue
                if message.startswith(_END):
                    return f"rank {rank} runs eagerly: {message.removeprefix(_END)}"
                if message != f"code {self.collectives.kinds}":
                    return f"the code of rank {rank} issues other collectives than that of rank {self._rank}"
                missing.remove(rank)
            why_not = self._pause(is_cancelled, deadline, f"rank {missing[0]} has not compiled it" if missing else "")
            if missing and why_not is not None:
                return why_not
        return None

    def _round(self, number: int, is_cancelled: Callable[[], bool], deadline: float, may_wait: Callable[[], None]) -> str:
        """Make one proposal and wait for its verdict."""
        if self._rank == self._ranks[0]:
            self._store.set(f"at/{number}", str(self._ahead(number)))
        is_in, is_complete = False, False
        while (verdict := self._read(f"verdict/{number}")) is None:
            proposed = self._read(f"at/{number}")
            if proposed is not None and not is_in:
                is_in = True
                self._take_part(number, int(proposed))
            if not is_complete and is_in and self._is_complete(number):
                is_complete = True
                may_wait()
            why_not = self._pause(is_cancelled, deadline, "the ranks do not call it any more, or not in step")
            if why_not is not None:
                return self._ended(number, why_not)
        return verdict

    def _ended(self, number: int, why_not: str) -> str:
        """Settle that the ranks do not take over, in the first open round from `number` on; gives the verdict that holds."""
        while (verdict := self._settled(number, f"{_END}{why_not}")) == _AGAIN:
            number += 1
        return verdict

    def close(self) -> None:
        """Release the store: it lives as long as anything references it, and the next job would read this one's keys."""
        self._store = None

    def _ahead(self, number: int) -> int:
        """A time on the clock that no rank should have reached, by this rank's own pace; further ahead in each round."""
        before = self._now()
        if before < 0:
            return 0  # a call waits for this
        began = time.monotonic()
        time.sleep(POLL_S)
        passed_per_s = (self._now() - before) / (time.monotonic() - began)
        return self._now() + 1 + int(passed_per_s * 3 * POLL_S * 2**number)

    def _take_part(self, number: int, when: int) -> None:
        with self._lock:
            if self._seen.get(self._clock, -1) >= when:
                return  # too late: the round goes on without this rank
            self._proposed = number, when
        self._store.set(f"in/{number}/{self._rank}", "")

    def _is_complete(self, number: int) -> bool:
        return bool(self._store.check([f"in/{number}/{rank}" for rank in self._ranks]))

    def _pause(self, is_cancelled: Callable[[], bool], deadline: float, what: str) -> str | None:
        """Wait a moment; gives why to stop waiting, or None."""
        if is_cancelled():
            return "its compile was cancelled, or the process group destroyed"
        if time.monotonic() > deadline:
            return f"{what}, and the time to wait is over"
        time.sleep(min(MAX_POLL_S, POLL_S + (time.monotonic() - self._began) / 50))
        return None

    def confirm(self, why_not: str | None, is_cancelled: Callable[[], bool], timeout_s: float) -> str | None:
        """Tell the others how the call went in which all took over; gives why this rank must go back to eager, or None."""
        self._store.set(f"ran/{self._rank}", f"{_END}{why_not}" if why_not else _GO)
        self._began = time.monotonic()
        missing = list(self._ranks)
        while missing:
            message = self._read(f"ran/{missing[0]}")
            if message is not None and message.startswith(_END):
                return f"rank {missing[0]} runs eagerly: {message.removeprefix(_END)}"
            if message is not None:
                del missing[0]
            elif self._pause(is_cancelled, self._began + timeout_s, "") is not None:
                return None  # that rank has ended, or has no such call: no reason to drop this rank's code
        return None

    # in calls

    def is_now(self) -> bool:
        """Whether the call that now begins is the one in which all ranks take over; asked before the call runs."""
        clocks = self._clocks()
        with self._lock:
            self._seen = clocks
            proposed = self._proposed
            if proposed is None or clocks.get(self._clock, -1) < proposed[1]:
                return False
            self._proposed = None
        number = proposed[0]
        return self._settled(number, _GO if self._is_complete(number) else _AGAIN) == _GO

    def position(self) -> int:
        """How many collectives its groups have issued."""
        clocks = self._clocks()
        return sum(clocks.get(name, 0) for name in self.collectives.ranks)

    def _now(self) -> int:
        with self._lock:
            return self._seen.get(self._clock, -1)

    def _settled(self, number: int, verdict: str) -> str:
        """Settle a round with `verdict`, unless another rank was first; gives the verdict that holds."""
        return self._store.compare_set(f"verdict/{number}", "", verdict).decode()

    def _read(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None


def agreement_here(name: str) -> Agreement:
    """A new agreement with the other ranks: the n-th of one `name` here is the n-th of that name on every rank."""
    number = _opened[name]
    _opened[name] += 1
    world = distributed.world()
    store = dist.distributed_c10d.PrefixStore(f"torchspan/{name}/{number}", world.pg_map[world.default_pg][1])
    return Agreement(store, dist.get_rank(), clocks_here)


def clocks_here() -> Mapping[str, int]:
    """How many collectives each group of this process has issued, by name; without groups whose backend does not count."""
    world = distributed.world()
    clocks = {}
    for group, name in list(world.pg_names.items()):
        with suppress(RuntimeError):
            clocks[str(name)] = group._get_sequence_number_for_group()
    return clocks
