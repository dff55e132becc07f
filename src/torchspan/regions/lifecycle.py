"""The life of a generation: ``compiling`` → ``ready`` → ``swapped``, or ``eager``. Its stage is written here and nowhere else.

compiling   a compile process works; calls run eagerly
ready       the next call takes over at its beginning, in its own thread: dynamo's tracing saves and restores the global
            random state. Where code issues collectives, it is a call that all ranks agree on, see :mod:`.agreement`
swapped     calls run compiled
eager       given up

A generation ends, or begins again, in one of these ways. Its record (see :mod:`.record`) is removed where its code turned out
to be wrong, so that the next start of the program does not load it again:

=============================================================  =======================================  ===============
what happens                                                   stage after it                           record removed
=============================================================  =======================================  ===============
the call cannot be sent, or the GPU cannot run such code       eager                                    no
the compile fails, or is cancelled, or exceeds its budget      eager                                    no
nothing in the program can be compiled                         eager                                    no
a cache entry that the compile left is damaged                 compiling; eager after MAX_DAMAGED       no
its artifact does not load, or fails the check                 compiling, this time into the caches     no
an earlier run's code has changed sources or damaged files     compiling                                yes
an earlier run's code does not load, or fails the check        compiling                                yes
its code fails the check                                       eager                                    yes
an error is raised while a call takes it over                  eager                                    yes
its code cannot be loaded in the call that checks it           ready; eager after MAX_MISSED            yes, if eager
its code cannot be loaded in its first call, without a check   eager                                    yes
the check itself raises                                        ready; eager after MAX_UNCHECKED         yes, if eager
its code raises in a call, and eager does not                  eager                                    yes
its code raises later in a call, or its backward cannot run    eager                                    no
MAX_UNSERVED calls change, while they run, what it guards      eager                                    no
the ranks do not agree on a call, or another rank gives up     eager                                    there is none
=============================================================  =======================================  ===============
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from torchspan.core.errors import GuardError, TorchspanError
from torchspan.core.report import log
from torchspan.jobs.groups import groups_here
from torchspan.jobs.supervisor import Ending
from torchspan.regions import verify
from torchspan.regions.call import Call
from torchspan.regions.compiler_state import known_isas_here
from torchspan.regions.compiling import SENDING, Compiler
from torchspan.regions.failure import described, failure, text_of
from torchspan.regions.fullgraph import break_message
from torchspan.regions.generation import Generation, Generations
from torchspan.regions.handback import FromArtifact, FromCaches
from torchspan.regions.host import Host
from torchspan.regions.part import Part
from torchspan.regions.ranks import Ranks
from torchspan.regions.worker import Filled

MAX_UNCHECKED = 2
MAX_MISSED = 3


class Lifecycle:
    """The lives of the generations of one region; `eager` runs a target as torch does."""

    def __init__(self, part: Part, strategy: str, host: Host, generations: Generations, eager: Callable[..., Any]) -> None:
        self.part = part
        self.strategy = strategy
        self.has_failed = False
        self.has_compiled = False
        self.may_try_others = True
        self._failures: dict[tuple[type[Exception], str], str] = {}
        self._host = host
        self._generations = generations
        self._eager = eager
        self.ranks = Ranks(part, strategy, host, self)
        self._compiler = Compiler(part, strategy, host, self)

    def start(self, generation: Generation, call: Call) -> None:
        """Have it compiled for `call`, in a thread that waits for a compile process; raises nothing."""
        try:
            if generation.agreement is None and groups_here() is not None:
                generation.agreement = self.ranks.agreement(call)
            self._compiler.start(generation, call)
        except Exception as cause:  # noqa: BLE001 - no thread can be started, an argument cannot be read
            self.give_up(generation, failure(cause, "starting the compile"))

    def make_ready(self, generation: Generation, ending: Ending, filled: Filled) -> None:
        """Have a call take over what was compiled: the next one, or one that ranks agree on if the code issues collectives."""
        self.attempt(ending)
        self.has_failed = False
        if generation.record is not None:
            generation.record.offer(generation.kind, filled)
        agreement = generation.agreement
        self.ranks.tell(generation, lambda agreement: agreement.tell(filled.collectives))
        if not filled.collectives:
            generation.agreement = None
        elif agreement is None:
            self.give_up(generation, Ending("skipped", 0.0, cause="it has collectives, and the ranks cannot agree on a call"))
            return
        elif filled.not_verified is not None:
            self.decide("not verified", f"it has collectives, and in the compile process: {filled.not_verified}")
        else:
            self.decide("verified apart", "it has collectives: compared with eager where it was compiled")
        generation.stage = "ready"
        if agreement is not None and generation.is_agreeing:
            self.ranks.begin(generation, agreement)

    def end(self, why: str) -> None:
        """End every compile that is under way; takes no lock, since it may run while an object is finalized."""
        for generation in self._generations.all():
            if generation.stage == "compiling" or generation.is_agreeing:
                generation.end(why)

    def give_up(self, generation: Generation, ending: Ending, *, is_of_call: bool = False) -> None:
        """Run its calls eagerly: its compile failed. If no generation of the region has code, the plan is told.

        Calls of other signatures may still be compiled if the compile ended with an error, or if the call itself was the
        reason (`is_of_call`).
        """
        generation.stage = "eager"
        if generation.record is not None:
            generation.record.forget()
        self.attempt(ending)
        generation.first_run.set()
        self.ranks.tell(generation, lambda agreement: agreement.refuse(ending.cause or ending.outcome))
        if generation.agreement is not None:
            generation.agreement.close()
        if self._host.settings.fullgraph and ending.outcome == "failed":
            generation.error = break_message(ending.cause, self.part.name)
        if generation.error is not None:  # the user's to mend: no other strategy is tried
            self.decide("refused", generation.error)
        elif generation.is_odd:
            self.decide("eager", f"calls like this one only: {ending.cause}")
        elif ending.outcome == "cancelled":
            self.decide("eager", f"its compile was cancelled: {ending.cause}")
        elif generation.family is not None and not self._host.settings.dynamic:
            generation.family.give_up()
            self.decide("static", "not compiled with dynamic shapes: each size is compiled by itself")
        elif not any(other.stage in ("ready", "swapped") for other in self._generations.all()):
            self.has_failed = True
            self.may_try_others = is_of_call or (ending.outcome == "failed" and ending.where != SENDING)
            self._host.part_failed(self.part)
        generation.done.set()

    # taking over

    def take_over(self, generation: Generation, call: Call) -> None:
        """Load the compiled code at the beginning of a call, and check it; other threads run eagerly meanwhile."""
        if not generation.lock.acquire(blocking=self._host.is_waiting):
            return
        try:
            if generation.stage == "ready" or self._host.verify == "always":
                self._swap(generation, call)
        except Exception as cause:  # noqa: BLE001 - of torch.compile, which has not begun to compile, or of ours
            self.reject(generation, described(cause))
        finally:
            generation.lock.release()

    def _swap(self, generation: Generation, call: Call) -> None:
        started = time.perf_counter()
        settings = self._host.settings
        if generation.code is None:
            give_up = partial(self.withdraw, generation)
            generation.code = FromCaches(settings, self.part, known_isas_here(), self._compiler.marks(generation), give_up)
            self._note_handback(generation, settings.is_inductor)
        try:
            wrong = self._verify(generation, generation.code, call) if self._host.verify != "off" else None
        except Exception as cause:  # noqa: BLE001 - eager raises in this call, or the check does not run: memory is short
            self._note_unchecked(generation, cause)
            return
        if (wrong is not None or generation.code.misses) and generation.is_of_earlier_run:
            self.compile_instead(generation, wrong or self.miss(generation.code), call)
        elif wrong is not None and isinstance(generation.code, FromArtifact):
            self._without_artifact(generation, wrong, call)
        elif generation.code.misses:
            self._missed(generation, self.miss(generation.code))
        elif wrong is not None:
            self.reject(generation, f"compiled code gives other results than eager: {wrong}")
            log.warning("torchspan: %s runs eagerly: compiled code gives other results: %s", self.part.name, wrong)
        elif generation.stage == "ready":
            generation.stage = "swapped"
            generation.proven = call.sizes
            self.has_compiled = True
            self._host.report.figure("swap_stall_s", time.perf_counter() - started)

    def keep_record(self, generation: Generation) -> None:
        """Have the next start of the program load what was taken over."""
        try:
            if generation.record is not None:
                generation.record.keep()
        except Exception as cause:  # noqa: BLE001 - a folder that takes no file; the next start compiles again
            self.decide("not kept", f"the next start compiles again: {described(cause)}")

    def _remove_record(self, generation: Generation) -> None:
        try:
            if generation.record is not None:
                generation.record.remove(generation.kind)
        except Exception as cause:  # noqa: BLE001 - a folder that is not ours to change
            self.decide("not removed", f"the record cannot be removed, the next start reads it again: {described(cause)}")

    def compile_instead(self, generation: Generation, why: str, call: Call) -> None:
        """Compile, because what an earlier run compiled cannot be used."""
        self.decide("compiled again", f"what an earlier run compiled cannot be used: {why}")
        self.forget_earlier_run(generation)
        self.start_again(generation, call)

    def forget_earlier_run(self, generation: Generation) -> None:
        """Remove the record of an earlier run, whose code cannot be used."""
        self._remove_record(generation)
        if generation.record is not None:
            generation.record.begin_again()

    def miss_when_traced(self, generation: Generation, code: FromCaches, call: Call) -> None:
        """Note that code which no check has run could not be loaded in its first call, which ran eagerly."""
        if generation.is_of_earlier_run:
            self.compile_instead(generation, self.miss(code), call)
        else:
            self.reject(generation, self.miss(code))

    def _missed(self, generation: Generation, why: str) -> None:
        """Note that the code could not be loaded for this call, as where the program's state differs: try with the next."""
        generation.num_missed += 1
        if generation.num_missed >= MAX_MISSED or not isinstance(generation.code, FromCaches):
            self.reject(generation, why)
            return
        generation.code = None
        self.decide("not taken over", why)

    def _note_unchecked(self, generation: Generation, cause: Exception) -> None:
        """Note that the check raised: try with the next call, and give up if it raises again."""
        message = text_of(cause) if isinstance(cause, TorchspanError) else described(cause)
        generation.num_unchecked += 1
        if generation.num_unchecked < MAX_UNCHECKED:
            self.decide("not verified", message)
        else:
            self.reject(generation, f"the check did not run, {generation.num_unchecked} times: {message}", "checking")

    def _without_artifact(self, generation: Generation, why: str, call: Call) -> None:
        """Compile again into the caches, because the artifact is wrong."""
        self.decide("caches", f"the artifact is wrong here: {why}")
        generation.wants_artifact = False
        self.start_again(generation, call)

    def _verify(self, generation: Generation, code: FromArtifact | FromCaches, call: Call) -> str | None:
        if generation.agreement is not None:  # a check would issue collectives of its own, and must not fail on one rank alone
            return None
        try:
            return verify.mismatch(
                self._eager, code.trace, (call.target, call.args, call.kwargs), is_random=self._host.settings.is_random
            )
        except (verify.CannotCopyError, verify.WouldBeNoticedError) as cause:
            self.decide("not verified", str(cause))
            return None
        except GuardError as cause:  # of an artifact
            return str(cause)

    def miss(self, code: FromArtifact | FromCaches) -> str:
        """Why what the child compiled cannot be loaded here."""
        problem = (
            "its cache entries do not serve this process" if self._host.settings.is_inductor else "it does not compile here"
        )
        return f"{problem}: {code.misses[0]}"

    def _note_handback(self, generation: Generation, is_inductor: bool) -> None:
        if is_inductor and generation.wants_artifact:
            return  # the Report says why there is no artifact
        if is_inductor:
            self._host.report.decide("compile", self.part.name, "caches", "torch's caches hold what the child compiled")
        else:
            reason = f"{self._host.settings.backend_name} compiles here too: its child showed that it ends within the budget"
            self._host.report.decide("compile", self.part.name, "compiled again", reason)

    def reject(self, generation: Generation, cause: str, where: str = "taking over") -> None:
        """Give it up because its code is wrong."""
        generation.code = None
        self._remove_record(generation)
        self.decide("eager", cause)
        self.give_up(generation, Ending("failed", 0.0, cause=cause, where=where))

    def start_again(self, generation: Generation, call: Call) -> None:
        """Compile again; calls run eagerly meanwhile."""
        generation.stage, generation.code, generation.is_traced = "compiling", None, False
        generation.num_missed = 0
        generation.done.clear()
        generation.first_run.clear()
        self.start(generation, call)

    def withdraw(self, generation: Generation, why: str, where: str = "in the backward") -> None:
        """Run calls eagerly from now on, because a part of the code cannot be used, such as its backward; reported once."""
        if generation.stage != "eager":
            self.retire(generation, why)
            self.attempt(Ending("failed", 0.0, cause=why, where=where))

    def note_failure(self, cause: Exception, where: str) -> None:
        """Report that a call runs eagerly because something of ours failed: an Attempt once, a Decision each time."""
        kind = (type(cause), where)
        if kind not in self._failures:
            ending = failure(cause, where)
            self._failures[kind] = f"{where}: {ending.cause}"
            self.attempt(ending)
        self.decide("eager", self._failures[kind])

    def retire(self, generation: Generation, why: str) -> None:
        """Run calls eagerly from now on, although the code is right."""
        generation.stage = "eager"
        self.decide("eager", why)

    def decide(self, choice: str, reason: str) -> None:
        """Write a Decision into the Report."""
        self._host.report.decide("compile", self.part.name, choice, reason)

    def attempt(self, ending: Ending) -> None:
        """Write an Attempt into the Report."""
        self._host.report.attempt(ending.attempt(self.strategy, self.part.name, self._host.settings.backend_name))
