"""The life of a generation: ``compiling`` → ``ready`` → ``swapped``, or ``eager``. Its stage is written here and nowhere else.

compiling   a compile process works; calls run eagerly
ready       the next call takes over at its beginning, in its own thread: dynamo's tracing saves and restores the global
            random state. Where code issues collectives, it is a call that all ranks agree on, see :mod:`.agreement`
swapped     calls run compiled
eager       given up
"""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torchspan.caches import ledger
from torchspan.core.errors import GuardError, InputError, TorchspanError
from torchspan.core.report import log
from torchspan.jobs import transport
from torchspan.jobs.budget import Allowance
from torchspan.jobs.groups import groups_here
from torchspan.jobs.supervisor import Ending, Job, run_bounded
from torchspan.private import inductor
from torchspan.regions import ambient, verify, watch
from torchspan.regions.call import Call, original
from torchspan.regions.compiler_state import known_isas_here, prepare_to_load
from torchspan.regions.failure import described, failure, text_of
from torchspan.regions.fullgraph import break_message
from torchspan.regions.generation import Generation, Generations
from torchspan.regions.gpu import gpu_of, refusal
from torchspan.regions.handback import FromArtifact, FromCaches
from torchspan.regions.host import Host
from torchspan.regions.part import Part
from torchspan.regions.progress import shown
from torchspan.regions.ranks import Ranks
from torchspan.regions.record import Record, can_be_kept
from torchspan.regions.signature import Dims
from torchspan.regions.worker import APART, Filled, Isas, Task

MAX_DAMAGED = 3
MAX_UNCHECKED = 2
MAX_MISSED = 3
_SENDING = "sending the program"
_JOBS = {True: "torchspan.regions.worker:compile_region", False: "torchspan.regions.worker:fill_caches"}
_working: weakref.WeakSet[Generation] = weakref.WeakSet()  # those that a compile process works for, or did


def end_compiles(timeout_s: float = 5.0) -> None:
    """End the compiles that are under way; each is a cancelled Attempt in its Report."""
    for generation in tuple(_working):
        generation.end("the program ended first")
    for thread in threading.enumerate():
        if thread.name in (watch.COMPILE_THREAD, watch.AGREEMENT_THREAD):
            thread.join(timeout_s)


@dataclass(frozen=True)
class _Work:
    """What a thread has compiled: for which generation, which program, and the pickled Task of it."""

    generation: Generation
    target: Callable[[], Any]  # a program that nobody has any more is not kept for its compile, see `_held`
    payload: bytes
    is_fresh: bool  # whether it needs a process that was not forked


class Lifecycle:
    """What becomes of the generations of one region; `eager` runs a target as torch does."""

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

    def start(self, generation: Generation, call: Call) -> None:
        """Have it compiled for `call`, in a thread that waits for a compile process; raises nothing."""
        try:
            self._start(generation, call)
        except Exception as cause:  # noqa: BLE001 - no thread to be had, an argument that cannot be looked at
            self.give_up(generation, failure(cause, "starting the compile"))

    def _start(self, generation: Generation, call: Call) -> None:
        if generation.agreement is None and groups_here() is not None:
            generation.agreement = self.ranks.agreement(call)
        gpu = gpu_of(call.args, call.kwargs)
        why_not = refusal(gpu, self._host.settings)
        if why_not is not None:
            self.give_up(generation, Ending("skipped", 0.0, cause=why_not))
            return
        state = ambient.capture()
        try:
            payload = self._payload(self._marks(generation), call, state)
        except InputError as cause:
            generation.is_odd = self._can_be_sent(call)
            self.give_up(generation, Ending("failed", 0.0, cause=str(cause), where=_SENDING))
            return
        generation.record = generation.record or self._record(payload, state)
        work = _Work(generation, _held(call.target), payload, gpu.kind != "cpu")
        threading.Thread(target=self._work, args=(work,), name=watch.COMPILE_THREAD, daemon=True).start()

    def _record(self, payload: bytes, state: ambient.Ambient) -> Record | None:
        """That of a compile which is checked before it is taken over, on one rank; None where it is compiled in any case."""
        host = self._host
        if host.verify == "off" or watch.is_watched() or groups_here() is not None or not can_be_kept(host.settings):
            return None
        try:
            return Record(f"{self.part.name} {self.strategy}", payload, state, 2 * max(1, len(self.part.targets)) - 1)
        except OSError as cause:  # no folder for caches
            self.decide("not kept", f"the next start compiles again: {described(cause)}")
            return None

    def _payload(self, dims: Dims, call: Call, state: ambient.Ambient) -> bytes:
        task = Task(
            call.target,
            self.part.is_called_inside,
            call.args,
            dict(call.kwargs),
            self._host.settings.to_send(),
            state,
            Isas(known_isas_here()),
            dims,
            self.part.nested,
        )
        return transport.dumps(task, groups=groups_here(), apart=APART)

    def _can_be_sent(self, call: Call) -> bool:
        """Whether the program can be sent, so that it is the arguments of a call that cannot."""
        try:
            self._payload((), Call(call.target, (), {}), ambient.capture())
        except InputError:
            return False
        return True

    def _marks(self, generation: Generation) -> Dims:
        """The dimensions that are to be marked as dynamic; none where all are, by the user's ``dynamic=True``."""
        return () if self._host.settings.dynamic else generation.dims

    def _work(self, work: _Work) -> None:
        _working.add(work.generation)
        try:
            self._compile(work)
        except Exception as cause:  # noqa: BLE001 - the program's process is in a state that was not thought of
            self.give_up(work.generation, failure(cause, "in the thread that compiles"))
        finally:  # a caller that waits must not wait for ever, whatever happens here
            if work.generation.record is not None:
                work.generation.record.settle()
            if not work.generation.is_agreeing:
                work.generation.done.set()

    def _compile(self, work: _Work) -> None:
        """In a thread of its own: have a child compile, then make ready to take over."""
        generation = work.generation
        ending = self._of_earlier_run(work) or self._run_child(work)
        if ending.result is None:
            if ending.is_cache_damaged:
                self._compile_without_damaged(work, ending)
            else:
                self.give_up(generation, ending)
            return
        filled: Filled = pickle.loads(ending.result)
        if filled.artifact is not None and not self._load(generation, work.target(), filled.artifact):
            self._attempt(replace(ending, outcome="failed", cause="its artifact does not load here", where="loading"))
            if self._is_of_earlier_run(generation):
                self._forget_earlier_run(generation)
            else:
                generation.wants_artifact = False
            self._compile(work)
            return
        if self._host.settings.is_inductor and filled.graphs == 0:
            nothing = Ending("skipped", ending.seconds, ending.peak_bytes, "nothing here can be compiled")
            self.give_up(generation, nothing, is_of_call=True)
            return
        try:
            if filled.artifact is None:
                prepare_to_load(filled.isas)
        except Exception as cause:  # noqa: BLE001 - the compiler's own imports, under the user's settings and warning filters
            self.give_up(generation, failure(cause, "importing inductor", ending.seconds, ending.peak_bytes))
            return
        self._note_caches(filled)
        is_checked = filled.artifact is not None or self._is_of_earlier_run(generation)
        to_load = {} if is_checked else filled.kept.files
        damaged = ledger.check(inductor.cache_folder(), to_load) if to_load else []
        if damaged:
            message = f"{ledger.DAMAGED} {', '.join(damaged)}"
            ending = replace(ending, outcome="failed", cause=message, where="before loading")
            self._compile_without_damaged(work, ending)
            return
        self._attempt(ending)
        self.has_failed = False
        if generation.record is not None:
            generation.record.offer(generation.kind, filled)
        self._make_ready(generation, filled)

    def _of_earlier_run(self, work: _Work) -> Ending | None:
        """What an earlier run of the program compiled, as if a compile process gave it; None if it has to be compiled."""
        record, started = work.generation.record, time.perf_counter()
        if record is None:
            return None
        try:
            filled = record.read(work.generation.kind)
        except Exception as cause:  # noqa: BLE001 - the folder cannot be read, or holds what another version wrote
            self.decide("compiled again", f"what an earlier run compiled cannot be read: {described(cause)}")
            filled = None
        if record.why_not is not None:
            self.decide("compiled again", record.why_not)
        if filled is None:
            record.settle()
            return None
        self.decide("loaded", "an earlier run of this program compiled it")
        return Ending("loaded", time.perf_counter() - started, result=pickle.dumps(filled))

    def _make_ready(self, generation: Generation, filled: Filled) -> None:
        """Have a call take it over: the next one, or one that all ranks agree on where its code issues collectives."""
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

    def _compile_without_damaged(self, work: _Work, ending: Ending) -> None:
        """Compile again: what was damaged in the cache is gone."""
        generation = work.generation
        generation.num_damaged += 1
        if generation.num_damaged > MAX_DAMAGED:
            self.give_up(generation, ending)
            return
        self._attempt(ending)
        self.decide("compiled again", ending.cause or "")
        self._compile(work)

    def _note_caches(self, filled: Filled) -> None:
        """Say what the child found and did in the cache folder."""
        changes = filled.kept
        if filled.why_no_artifact:
            self.decide("caches", filled.why_no_artifact)
        if changes.dropped:
            self.decide("dropped", f"{ledger.DAMAGED} {', '.join(changes.dropped)}")
        if changes.evicted:
            self.decide("evicted", changes.evicted)
        if changes.not_noted:
            self.decide("not noted", f"the cache folder takes no ledger of its entries: {changes.not_noted}")

    def _run_child(self, work: _Work) -> Ending:
        generation = work.generation
        with self._host.turn(self.part, generation.cancel.is_set, self.has_compiled) as allowed:
            ending = allowed if isinstance(allowed, Ending) else self._run_within(allowed, work)
        is_cancelled = ending.outcome == "cancelled" and generation.cancel.is_set()
        return replace(ending, cause=generation.why_cancelled) if is_cancelled else ending

    def _run_within(self, allowed: Allowance, work: _Work) -> Ending:
        generation, payload = work.generation, work.payload
        function, began_ns = _JOBS[generation.wants_artifact], time.time_ns()
        shows = self._host.shows_progress
        limit = replace(allowed.budget, seconds=allowed.share_s)
        with shown(f"{self.part.name} ({self.strategy})", limit) if shows else nullcontext() as tick:
            job = Job(function, payload, work.is_fresh, record=shows or watch.is_watched(), tick=tick)
            ending = run_bounded(job, allowed.budget, generation.cancel, share_s=allowed.share_s)
        if job.record:
            watch.tell(watch.Finished(self.part.name, self.strategy, self._host.settings, payload, began_ns, ending))
        self._host.spend(self.strategy, self.part, ending)
        return ending

    def _load(self, generation: Generation, target: Any, artifact: bytes) -> bool:
        """Load an artifact, which needs no call to do; whether that went well."""
        try:
            generation.code = FromArtifact(artifact, target)
        except TorchspanError as cause:
            self.decide("caches", f"the artifact does not load here: {cause}")
            return False
        self.decide("artifact", "what the child compiled loads without tracing")
        return True

    def end(self, why: str) -> None:
        """End every compile that is under way; takes no lock, as nothing may that runs when an object goes."""
        for generation in self._generations.all():
            if generation.stage == "compiling" or generation.is_agreeing:
                generation.end(why)

    def give_up(self, generation: Generation, ending: Ending, *, is_of_call: bool = False) -> None:
        """It is not compiled: calls run eagerly, and where nothing of the region is compiled the plan hears of it.

        Calls of other signatures may be compiled yet if it failed with an error, or `is_of_call`: that lies in the call.
        """
        generation.stage = "eager"
        if generation.record is not None:
            generation.record.forget()
        self._attempt(ending)
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
            self.may_try_others = is_of_call or (ending.outcome == "failed" and ending.where != _SENDING)
            self._host.part_failed(self.part)
        generation.done.set()

    # taking over

    def take_over(self, generation: Generation, call: Call) -> None:
        """At the beginning of a call: load the compiled code and prove it; other threads run eagerly meanwhile."""
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
            generation.code = FromCaches(settings, self.part, known_isas_here(), self._marks(generation), give_up)
            self._note_handback(generation, settings.is_inductor)
        try:
            wrong = self._verify(generation, generation.code, call) if self._host.verify != "off" else None
        except Exception as cause:  # noqa: BLE001 - eager raises in this call, or the check does not run: memory is short
            self._note_unchecked(generation, cause)
            return
        if (wrong is not None or generation.code.misses) and self._is_of_earlier_run(generation):
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
            self.decide("not removed", f"the next start finds it again: {described(cause)}")

    def _is_of_earlier_run(self, generation: Generation) -> bool:
        return generation.record is not None and generation.record.is_loaded

    def compile_instead(self, generation: Generation, why: str, call: Call) -> None:
        """What an earlier run compiled does not serve this one: compile."""
        self.decide("compiled again", f"what an earlier run compiled does not serve: {why}")
        self._forget_earlier_run(generation)
        self.start_again(generation, call)

    def _forget_earlier_run(self, generation: Generation) -> None:
        self._remove_record(generation)
        if generation.record is not None:
            generation.record.begin_again()

    def miss_when_traced(self, generation: Generation, code: FromCaches, call: Call) -> None:
        """Code that was taken over unchecked cannot be had: that call ran eagerly, and later ones do."""
        if self._is_of_earlier_run(generation):
            self.compile_instead(generation, self.miss(code), call)
        else:
            self.reject(generation, self.miss(code))

    def _missed(self, generation: Generation, why: str) -> None:
        """What was compiled is not for this call, as when the program's state is another: the next one is taken instead."""
        generation.num_missed += 1
        if generation.num_missed >= MAX_MISSED or not isinstance(generation.code, FromCaches):
            self.reject(generation, why)
            return
        generation.code = None
        self.decide("not taken over", why)

    def _note_unchecked(self, generation: Generation, cause: Exception) -> None:
        """The check did not come to an end: the next call is taken instead, and after that none."""
        message = text_of(cause) if isinstance(cause, TorchspanError) else described(cause)
        generation.num_unchecked += 1
        if generation.num_unchecked < MAX_UNCHECKED:
            self.decide("not verified", message)
        else:
            self.reject(generation, f"the check did not run, {generation.num_unchecked} times: {message}", "checking")

    def _without_artifact(self, generation: Generation, why: str, call: Call) -> None:
        """Give the artifact up and have the caches filled instead."""
        self.decide("caches", f"the artifact is not right here: {why}")
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
        """Why what the child compiled cannot be had here."""
        problem = (
            "its cache entries do not serve this process" if self._host.settings.is_inductor else "it does not compile here"
        )
        return f"{problem}: {code.misses[0]}"

    def _note_handback(self, generation: Generation, is_inductor: bool) -> None:
        if is_inductor and generation.wants_artifact:
            return  # why there is no artifact was said
        if is_inductor:
            self._host.report.decide("compile", self.part.name, "caches", "torch's caches hold what the child compiled")
        else:
            reason = f"{self._host.settings.backend_name} compiles here too: its child showed that it ends within the budget"
            self._host.report.decide("compile", self.part.name, "compiled again", reason)

    def reject(self, generation: Generation, cause: str, where: str = "taking over") -> None:
        """What was compiled is not right."""
        generation.code = None
        self._remove_record(generation)
        self.decide("eager", cause)
        self.give_up(generation, Ending("failed", 0.0, cause=cause, where=where))

    def start_again(self, generation: Generation, call: Call) -> None:
        """Compile anew; calls run eagerly meanwhile."""
        generation.stage, generation.code, generation.is_traced = "compiling", None, False
        generation.num_missed = 0
        generation.done.clear()
        generation.first_run.clear()
        self.start(generation, call)

    def withdraw(self, generation: Generation, why: str, where: str = "in the backward") -> None:
        """Calls run eagerly from now on: a part of what was compiled does not serve, such as its backward. Said once."""
        if generation.stage != "eager":
            self.retire(generation, why)
            self._attempt(Ending("failed", 0.0, cause=why, where=where))

    def note_failure(self, cause: Exception, where: str) -> None:
        """A call runs eagerly because something failed before it: an Attempt the first time, and counted from then on."""
        kind = (type(cause), where)
        if kind not in self._failures:
            ending = failure(cause, where)
            self._failures[kind] = f"{where}: {ending.cause}"
            self._attempt(ending)
        self.decide("eager", self._failures[kind])

    def retire(self, generation: Generation, why: str) -> None:
        """Calls run eagerly from now on, although what was compiled is right."""
        generation.stage = "eager"
        self.decide("eager", why)

    def decide(self, choice: str, reason: str) -> None:
        self._host.report.decide("compile", self.part.name, choice, reason)

    def _attempt(self, ending: Ending) -> None:
        self._host.report.attempt(ending.attempt(self.strategy, self.part.name, self._host.settings.backend_name))


def _held(target: Any) -> Callable[[], Any]:
    """Gives `target`; where that is a compiled module, as long as the program has it."""
    return weakref.ref(target) if original(target) is not target else lambda: target
