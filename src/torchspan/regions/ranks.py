"""What the life of a generation needs where its code issues collectives: all ranks take it over in one call, or none does."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

import torch

from torchspan.jobs.groups import groups_here
from torchspan.jobs.supervisor import Ending
from torchspan.regions import watch
from torchspan.regions.agreement import Agreement, agreement_here
from torchspan.regions.call import Call
from torchspan.regions.failure import described, failure
from torchspan.regions.generation import Generation
from torchspan.regions.host import Host
from torchspan.regions.part import Part

RANKS_S = 600.0  # how long one rank's code waits for the others'
WAITING_S = 120.0  # the same where calls wait for it, and another rank's call may wait for this one's collectives


class Life(Protocol):
    """The owner of a generation's stage."""

    def decide(self, choice: str, reason: str) -> None:
        """Write a Decision into the Report."""

    def give_up(self, generation: Generation, ending: Ending) -> None:
        """Give it up because its compile failed."""

    def reject(self, generation: Generation, cause: str, where: str) -> None:
        """Give it up because its code is wrong."""

    def retire(self, generation: Generation, why: str) -> None:
        """Run calls eagerly from now on, although the code is right."""


class Ranks:
    """The other ranks, for the generations of one region."""

    def __init__(self, part: Part, strategy: str, host: Host, life: Life) -> None:
        self._part = part
        self._strategy = strategy
        self._host = host
        self._life = life

    def agreement(self, call: Call) -> Agreement | None:
        """A new agreement with the other ranks; None, with a Decision, where the job has no store to agree by."""
        modes = (torch.is_grad_enabled(), getattr(call.target, "training", None))
        try:
            return agreement_here(f"{self._part.name} {self._strategy} {modes}")
        except Exception as cause:  # noqa: BLE001 - the store is another program's kind, or gone
            self._life.decide("no agreement", f"ranks cannot agree on a call: {described(cause)}")
            return None

    def tell(self, generation: Generation, say: Callable[[Agreement], None]) -> None:
        """Tell the other ranks about this one's code, or that it runs eagerly, so that none of them waits for it."""
        if generation.agreement is None:
            return
        try:
            say(generation.agreement)
        except Exception as cause:  # noqa: BLE001 - the store is gone
            self._life.decide("not told", f"the other ranks cannot be reached: {described(cause)}")

    def begin(self, generation: Generation, agreement: Agreement) -> None:
        """Settle with the other ranks, in a thread of its own, when all take over."""
        threading.Thread(target=self._agree, args=(generation, agreement), name=watch.AGREEMENT_THREAD, daemon=True).start()

    def _agree(self, generation: Generation, agreement: Agreement) -> None:
        """Settle when all take over, and hear how that went for them."""

        def is_cancelled() -> bool:
            return generation.cancel.is_set() or groups_here() is None

        try:
            timeout_s = WAITING_S if self._host.is_waiting else RANKS_S
            why_not = agreement.reach(is_cancelled, timeout_s, generation.done.set)
            if why_not is not None:
                self._life.reject(generation, why_not, "agreeing with the other ranks")
                return
            has_run = generation.first_run.wait(RANKS_S)
            refusal = None if has_run and generation.stage == "swapped" else "it could not take over what was compiled"
            why_not = agreement.confirm(refusal, is_cancelled, RANKS_S)
            if why_not is not None and generation.stage == "swapped":
                self._life.retire(generation, why_not)
        except Exception as cause:  # noqa: BLE001 - the store is gone, as is the rank that held it
            self._note_disagreed(generation, cause)
        finally:
            agreement.close()
            generation.done.set()

    def is_agreed(self, generation: Generation, agreement: Agreement) -> bool:
        """Whether the call that now begins is the one in which all ranks take over."""
        try:
            return agreement.is_now()
        except Exception as cause:  # noqa: BLE001 - the store is gone, or a group does not count what it issues
            self._note_disagreed(generation, cause)
            return False

    def _note_disagreed(self, generation: Generation, cause: Exception) -> None:
        if generation.stage in ("compiling", "ready"):
            generation.end("the ranks cannot agree")
            self._life.give_up(generation, failure(cause, "agreeing with the other ranks"))
