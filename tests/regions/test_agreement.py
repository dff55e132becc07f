"""Ranks that agree on a call, over one store: their calls go in step, and their clocks with them."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch.distributed as dist

from torchspan.regions.agreement import Agreement
from torchspan.regions.collectives import Collectives

pytestmark = pytest.mark.once

SUM = Collectives((("allreduce", "0"),), {"0": (0, 1)})
GATHER = Collectives((("allgather", "0"),), {"0": (0, 1)})


Pool = ThreadPoolExecutor


class Rank:
    """Each of its calls issues one collective; notes in which one it takes over."""

    def __init__(self, number: int, store: dist.Store) -> None:
        self.clock = 0
        self.took_over: int | None = None
        self.agreement = Agreement(store, number, lambda: {"0": self.clock})

    def call(self) -> None:
        if self.took_over is None and self.agreement.is_now():
            self.took_over = self.clock
        self.clock += 1

    def reach(self, code: Collectives, timeout_s: float = 10.0) -> str | None:
        self.agreement.tell(code)
        return self.agreement.reach(lambda: False, timeout_s, lambda: None)


@pytest.fixture
def ranks() -> list[Rank]:
    store = dist.HashStore()
    return [Rank(number, store) for number in (0, 1)]


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as executor:
        yield executor


def call_until(ranks: list[Rank], *futures: "Future[str | None]") -> None:
    """Both ranks call in step until something was found."""
    while not all(future.done() for future in futures):
        for rank in ranks:
            rank.call()
        time.sleep(0.001)


def test_ranks_that_are_ready_at_different_times_take_over_in_the_same_call(
    ranks: list[Rank], pool: ThreadPoolExecutor
) -> None:
    first = pool.submit(ranks[0].reach, SUM)
    for _ in range(100):
        call_until(ranks, pool.submit(time.sleep, 0.001))
    assert ranks[0].took_over is None
    ready_in = ranks[0].clock
    second = pool.submit(ranks[1].reach, SUM)
    call_until(ranks, first, second)
    assert (first.result(), second.result()) == (None, None)
    assert ranks[0].took_over == ranks[1].took_over
    assert ranks[0].took_over is not None and ranks[0].took_over >= ready_in


def test_calls_that_wait_for_the_compile_may_be_the_first_that_are_compiled(
    ranks: list[Rank], pool: ThreadPoolExecutor
) -> None:
    futures = [pool.submit(rank.reach, SUM) for rank in ranks]
    while not all(rank.agreement._proposed for rank in ranks):
        time.sleep(0.01)
    call_until(ranks, *futures)
    assert [rank.took_over for rank in ranks] == [0, 0]


def test_a_rank_that_has_passed_the_proposed_time_has_all_try_again(ranks: list[Rank], pool: Pool) -> None:
    store = ranks[0].agreement._store
    for _ in range(5):
        for rank in ranks:
            rank.call()
    store.set("at/0", "3")  # of a rank that did not know how far the others are
    futures = [pool.submit(rank.reach, SUM) for rank in ranks]
    call_until(ranks, *futures)
    assert ranks[0].took_over == ranks[1].took_over is not None
    assert store.get("verdict/0") in (b"again", b"go")


def test_one_that_refuses_keeps_all_eager(ranks: list[Rank]) -> None:
    ranks[1].agreement.refuse("its compile crashed")
    assert ranks[0].reach(SUM) == "rank 1 runs eagerly: its compile crashed"
    assert ranks[1].reach(SUM) == "rank 1 runs eagerly: its compile crashed", "what was settled is the same for all"


def test_other_collectives_keep_all_eager(ranks: list[Rank], pool: Pool) -> None:
    futures = [pool.submit(rank.reach, code) for rank, code in zip(ranks, (SUM, GATHER), strict=True)]
    reasons = {future.result() for future in futures}
    assert len(reasons) == 1 and "issues other collectives than that of rank" in str(reasons)


def test_a_rank_that_never_compiles_is_not_waited_for_for_ever(ranks: list[Rank]) -> None:
    assert ranks[0].reach(SUM, timeout_s=0.2) == "rank 1 has not compiled it, and the time to wait is over"
    assert ranks[1].reach(SUM) == "rank 1 has not compiled it, and the time to wait is over"


def test_ranks_that_call_no_more_end(ranks: list[Rank], pool: Pool) -> None:
    futures = [pool.submit(rank.reach, SUM, 0.5) for rank in ranks]
    assert {future.result() for future in futures} == {
        "the ranks do not call it any more, or not in step, and the time to wait is over"
    }


def test_a_rank_that_could_not_load_its_code_has_the_others_go_back(ranks: list[Rank], pool: Pool) -> None:
    futures = [pool.submit(rank.reach, SUM) for rank in ranks]
    call_until(ranks, *futures)
    whys = [
        pool.submit(rank.agreement.confirm, why, lambda: False, 5.0)
        for rank, why in zip(ranks, (None, "a cache miss"), strict=True)
    ]
    assert whys[0].result() == "rank 1 runs eagerly: a cache miss"
