"""Whose turn it is to have a child process: as many as the machine bears, short jobs first, none kept waiting for ever."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from torchspan.jobs.machine import Machine, free_bytes, num_cores, num_ranks
from torchspan.jobs.turns import MAX_CROWD, YOUNG_BYTES, Turn, Turns, Wish, next_turn

pytestmark = pytest.mark.once
GIB = 1 << 30


def machine(cores: int = 4, free: int = 64 * GIB) -> Machine:
    return Machine(cores, lambda: free)


def turn(seconds: float = 1.0, came: float = 0.0, began: float = 0.0, owner: object = None, limit: int | None = None) -> Turn:
    return Turn(Wish(owner or object(), seconds, limit), came, began)


def test_a_short_job_goes_before_a_long_one_which_is_not_overtaken_for_ever() -> None:
    long = turn(seconds=60, came=0)
    soon, later = turn(seconds=1, came=30), turn(seconds=1, came=61)
    assert next_turn([long, soon], [], machine(), now=30) is soon
    assert next_turn([long, later], [], machine(), now=61) is long


@pytest.mark.parametrize(("cores", "places"), [(1, 2), (2, 2), (8, 4), (64, 32)])
def test_half_of_the_cores_work_on_compiles_and_two_at_least(cores: int, places: int) -> None:
    running = [turn(began=100) for _ in range(places)]
    assert next_turn([turn()], running[1:], machine(cores), now=101) is not None
    assert next_turn([turn()], running, machine(cores), now=101) is None


@pytest.mark.parametrize(("variable", "places"), [("4", 4), ("64", 1), ("1", 16), ("", 16), ("many", 16)])
def test_ranks_on_one_machine_divide_its_cores(variable: str, places: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", variable)
    assert Machine(32, lambda: 64 * GIB, num_ranks).num_children == places


def test_jobs_that_hang_keep_no_other_waiting_as_long_as_memory_lasts() -> None:
    hanging = [turn(seconds=1, began=0) for _ in range(2)]
    slow_but_known = [turn(seconds=100, began=0) for _ in range(2)]
    assert next_turn([turn()], hanging, machine(cores=2), now=60) is not None
    assert next_turn([turn()], slow_but_known, machine(cores=2), now=60) is None
    assert next_turn([turn()], hanging, machine(cores=2, free=GIB), now=60) is None
    crowd = [turn(seconds=1, began=0) for _ in range(2 * MAX_CROWD)]
    assert next_turn([turn()], crowd, machine(cores=2), now=60) is None


def test_memory_decides_how_many_run_and_one_always_may() -> None:
    waiting, young = turn(), turn(began=100)
    assert next_turn([waiting], [], machine(free=0), now=101) is waiting
    assert next_turn([waiting], [young], machine(free=2 * YOUNG_BYTES - 1), now=101) is None
    assert next_turn([waiting], [young], machine(free=2 * YOUNG_BYTES), now=101) is waiting
    assert next_turn([waiting], [young], machine(free=YOUNG_BYTES), now=107) is waiting  # what it takes is no longer free
    small = turn(limit=GIB // 2)
    assert next_turn([small], [turn(began=100, limit=GIB // 2)], machine(free=GIB), now=101) is small


def test_an_owner_has_one_turn_at_a_time() -> None:
    first, second, other = turn(owner="a", began=1), turn(owner="a"), turn(owner="b", seconds=9)
    assert next_turn([second, other], [first], machine(), now=2) is other
    assert next_turn([second], [first], machine(), now=2) is None


def wait_in_thread(turns: Turns, seconds: float, order: list[float], is_cancelled: Callable[[], bool]) -> threading.Thread:
    def wait() -> None:
        with turns.turn(Wish(object(), seconds), is_cancelled) as has_come:
            order.append(seconds if has_come else -seconds)

    before = turns.num_waiting
    thread = threading.Thread(target=wait)
    thread.start()
    while turns.num_waiting == before:
        pass
    return thread


def test_those_that_wait_are_called_in_order_and_one_that_is_cancelled_goes() -> None:
    turns, order, cancel = Turns(machine(cores=1)), [], threading.Event()
    with ExitStack() as busy:
        assert all(busy.enter_context(turns.turn(Wish(object(), 1000))) for _ in range(2))
        threads = [wait_in_thread(turns, seconds, order, lambda: False) for seconds in (500, 300, 100)]
        cancelled = wait_in_thread(turns, 50, order, cancel.is_set)
        cancel.set()
        cancelled.join(10)
        assert order == [-50]
        busy.pop_all().close()
        for thread in threads:
            thread.join(10)
    assert sorted(order) == [-50, 100, 300, 500] and turns.num_waiting == 0


def test_when_the_queue_ends_all_that_wait_go_without_a_turn_and_later_jobs_have_one() -> None:
    turns, order = Turns(machine(cores=1)), []
    with turns.turn(Wish(object())), turns.turn(Wish(object())):
        threads = [wait_in_thread(turns, seconds, order, lambda: False) for seconds in (1, 2, 3)]
        turns.end()
        for thread in threads:
            thread.join(10)
    assert sorted(order) == [-3, -2, -1]
    with turns.turn(Wish(object())) as has_come:
        assert has_come


def test_a_container_has_the_cores_and_the_memory_of_its_limits(tmp_path: Path) -> None:
    assert num_cores(tmp_path) >= 1 and free_bytes(tmp_path) > 0  # no limits
    for name, text in {
        "cpu.max": "100000 100000\n",
        "memory.max": "3000\n",
        "memory.current": "2000\n",
        "memory.stat": "anon 1500\ninactive_file 400\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert num_cores(tmp_path) == 1 and free_bytes(tmp_path) == 1400
    (tmp_path / "cpu.max").write_text("max 100000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert num_cores(tmp_path) >= 1 and free_bytes(tmp_path) > 3000
