"""Turns: which jobs may have a child process now. As many at once as the machine can run, short ones first.

A job's place in the queue is the time at which it came plus the seconds that it is expected to take: a short one goes before a
long one that came a little earlier, and no job is overtaken for ever. A job that runs longer than expected (it hangs, most
likely) keeps no other job waiting: it goes on, and another job gets its place, as long as memory lasts.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from torchspan.jobs.machine import Machine, this_machine

POLL_S = 0.1
YOUNG_S = 5.0  # what a child takes after that shows in the machine's free memory
YOUNG_BYTES = 2 << 30  # what a child is thought to take before
SLOW_FACTOR = 2.0  # a job that takes more than this many times what was thought is slow, but never in its first SLOW_S
SLOW_S = 10.0
MAX_CROWD = 3  # children at once for each place, slow ones included: they may be slow because there are so many


@dataclass(frozen=True)
class Wish:
    """A job that wants a turn: its `owner` (who has one turn at a time), and the seconds and bytes that it may take."""

    owner: object
    seconds: float = 1.0
    limit_bytes: int | None = None

    @property
    def bytes(self) -> int:
        """What it is thought to take while it is young."""
        return YOUNG_BYTES if self.limit_bytes is None else min(self.limit_bytes, YOUNG_BYTES)


@dataclass(eq=False)
class Turn:
    """A job that waits, or has had its turn since `began`."""

    wish: Wish
    came: float
    began: float = 0.0
    is_ended: bool = False

    def is_young(self, now: float) -> bool:
        """Whether it has just begun."""
        return now - self.began < YOUNG_S

    def is_slow(self, now: float) -> bool:
        """Whether it runs for longer than was thought."""
        return now - self.began > max(SLOW_S, SLOW_FACTOR * self.wish.seconds)


def next_turn(waiting: Sequence[Turn], running: Sequence[Turn], machine: Machine, now: float) -> Turn | None:
    """Whose turn it is; None while the machine can run no more.

    >>> short, long = Turn(Wish("a", seconds=1), came=2), Turn(Wish("b", seconds=60), came=0)
    >>> next_turn([long, short], [], Machine(2, lambda: 8 << 30), now=2) is short
    True
    """
    owners = {id(turn.wish.owner) for turn in running}
    may_go = [turn for turn in waiting if id(turn.wish.owner) not in owners]
    if not may_go:
        return None
    first = min(may_go, key=lambda turn: turn.came + turn.wish.seconds)
    return first if not running or _bears(first.wish, running, machine, now) else None


def _bears(wish: Wish, running: Sequence[Turn], machine: Machine, now: float) -> bool:
    num_working = sum(not turn.is_slow(now) for turn in running)
    if num_working >= machine.num_children or len(running) >= MAX_CROWD * machine.num_children:
        return False
    promised = sum(turn.wish.bytes for turn in running if turn.is_young(now))
    return promised + wish.bytes <= machine.free_bytes()


@dataclass(eq=False)
class Turns:
    """The queue of a process: the jobs that wait, and those that run."""

    machine: Machine
    _changed: threading.Condition = field(default_factory=threading.Condition)
    _waiting: list[Turn] = field(default_factory=list)
    _running: list[Turn] = field(default_factory=list)

    @contextmanager
    def turn(self, wish: Wish, is_cancelled: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Wait for a turn and have it; gives False, at once, where the job is cancelled or the queue ended before it came."""
        turn = Turn(wish, time.monotonic())
        with self._changed:
            self._waiting.append(turn)
        try:
            yield self._has_come(turn, is_cancelled)
        finally:
            with self._changed:
                for turns in (self._waiting, self._running):
                    turns[:] = [other for other in turns if other is not turn]
                self._changed.notify_all()

    def _has_come(self, turn: Turn, is_cancelled: Callable[[], bool]) -> bool:
        with self._changed:
            while not (turn.is_ended or is_cancelled()):
                now = time.monotonic()
                if next_turn(self._waiting, self._running, self.machine, now) is turn:
                    turn.began = now
                    self._waiting.remove(turn)
                    self._running.append(turn)
                    self._changed.notify_all()
                    return True
                self._changed.wait(POLL_S)
        return False

    def end(self) -> None:
        """Cancel all jobs that wait."""
        with self._changed:
            for turn in self._waiting:
                turn.is_ended = True
            self._changed.notify_all()

    @property
    def num_waiting(self) -> int:
        """How many jobs wait."""
        return len(self._waiting)


turns = Turns(this_machine())


def _renew() -> None:
    """In a fork: the threads that wait or run belong to the process that forked."""
    turns._changed, turns._waiting, turns._running = threading.Condition(), [], []


os.register_at_fork(after_in_child=_renew)
