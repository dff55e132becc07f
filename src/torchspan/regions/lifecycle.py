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

import torch

from torchspan.caches import ledger
from torchspan.core.errors import GuardError, InputError, TorchspanError
from torchspan.core.report import log
from torchspan.jobs import transport
from torchspan.jobs.budget import Allowance
from torchspan.jobs.groups import groups_here
from torchspan.jobs.supervisor import Ending, Job, run_bounded
from torchspan.private import inductor
from torchspan.regions import ambient, verify, watch
from torchspan.regions.agreement import Agreement, agreement_here
from torchspan.regions.call import Call, original
from torchspan.regions.compiler_state import known_isas_here, prepare_to_load
from torchspan.regions.fullgraph import break_message
from torchspan.regions.generation import Generation, Generations
from torchspan.regions.gpu import gpu_of, refusal
from torchspan.regions.handback import FromArtifact, FromCaches
from torchspan.regions.host import Host
from torchspan.regions.part import Part
from torchspan.regions.progress import shown
from torchspan.regions.signature import Dims
from torchspan.regions.worker import Filled, Task

MAX_DAMAGED = 3
MAX_UNCHECKED = 2
MAX_MISSED = 3
RANKS_S = 600.0  # how long one rank's code waits for the others'
WAITING_S = 120.0  # the same where calls wait for it, and another rank's call may wait for this one's collectives
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

    def start(self, generation: Generation, call: Call) -> None:
        """Have it compiled for `call`, in a thread that waits for a compile process; raises nothing."""
        try:
            self._start(generation, call)
        except Exception as cause:  # noqa: BLE001 - no thread to be had, an argument that cannot be looked at
            self.give_up(generation, _failure(cause, "starting the compile"))

    def _start(self, generation: Generation, call: Call) -> None:
        if generation.agreement is None and groups_here() is not None:
            generation.agreement = self._agreement(call)
        gpu = gpu_of(call.args, call.kwargs)
        why_not = refusal(gpu, self._host.settings)
        if why_not is not None:
            self.give_up(generation, Ending("skipped", 0.0, cause=why_not))
            return
        try:
            payload = self._payload(self._marks(generation), call)
        except InputError as cause:
            generation.is_odd = self._can_be_sent(call)
            self.give_up(generation, Ending("failed", 0.0, cause=str(cause), where=_SENDING))
            return
        work = _Work(generation, _held(call.target), payload, gpu.kind != "cpu")
        threading.Thread(target=self._work, args=(work,), name=watch.COMPILE_THREAD, daemon=True).start()

    def _payload(self, dims: Dims, call: Call) -> bytes:
        task = Task(
            call.target,
            self.part.is_called_inside,
            call.args,
            dict(call.kwargs),
            self._host.settings.to_send(),
            ambient.capture(),
            dict(known_isas_here()),
            dims,
            self.part.nested,
        )
        return transport.dumps(task, groups=groups_here())

    def _can_be_sent(self, call: Call) -> bool:
        """Whether the program can be sent, so that it is the arguments of a call that cannot."""
        try:
            self._payload((), Call(call.target, (), {}))
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
            self.give_up(work.generation, _failure(cause, "in the thread that compiles"))
        finally:  # a caller that waits must not wait for ever, whatever happens here
            if not self._is_agreeing(work.generation):
                work.generation.done.set()

    def _compile(self, work: _Work) -> None:
        """In a thread of its own: have a child compile, then make ready to take over."""
        generation = work.generation
        ending = self._run_child(work)
        if ending.result is None:
            if ending.is_cache_damaged:
                self._compile_without_damaged(work, ending)
            else:
                self.give_up(generation, ending)
            return
        filled: Filled = pickle.loads(ending.result)
        if filled.artifact is not None and not self._load(generation, work.target(), filled.artifact):
            generation.wants_artifact = False
            self._attempt(replace(ending, outcome="failed", cause="its artifact does not load here", where="loading"))
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
            self.give_up(generation, _failure(cause, "importing inductor", ending.seconds, ending.peak_bytes))
            return
        self._note_caches(filled)
        to_load = {} if filled.artifact is not None else filled.kept.files
        damaged = ledger.check(inductor.cache_folder(), to_load) if to_load else []
        if damaged:
            told = f"{ledger.DAMAGED} {', '.join(damaged)}"
            ending = replace(ending, outcome="failed", cause=told, where="before loading")
            self._compile_without_damaged(work, ending)
            return
        self._attempt(ending)
        self.has_failed = False
        self._make_ready(generation, filled)

    # with other ranks

    def _make_ready(self, generation: Generation, filled: Filled) -> None:
        """Have a call take it over: the next one, or one that all ranks agree on where its code issues collectives."""
        agreement = generation.agreement
        self._tell(generation, lambda agreement: agreement.tell(filled.collectives))
        if not filled.collectives:
            generation.agreement = None
        elif agreement is None:
            self.give_up(generation, Ending("skipped", 0.0, cause="it has collectives, and the ranks cannot agree on a call"))
            return
        elif filled.not_verified is not None:
            self._decide("not verified", f"it has collectives, and in the compile process: {filled.not_verified}")
        else:
            self._decide("verified apart", "it has collectives: compared with eager where it was compiled")
        generation.stage = "ready"
        if self._is_agreeing(generation):
            threading.Thread(target=self._agree, args=(generation, agreement), name=watch.AGREEMENT_THREAD, daemon=True).start()

    def _is_agreeing(self, generation: Generation) -> bool:
        return generation.stage == "ready" and generation.agreement is not None

    def _agree(self, generation: Generation, agreement: Agreement) -> None:
        """In a thread of its own: settle with the other ranks when all take over, and hear how that went for them."""

        def is_cancelled() -> bool:
            return generation.cancel.is_set() or groups_here() is None

        try:
            timeout_s = WAITING_S if self._host.is_waiting else RANKS_S
            why_not = agreement.reach(is_cancelled, timeout_s, generation.done.set)
            if why_not is not None:
                self.reject(generation, why_not, "agreeing with the other ranks")
                return
            has_run = generation.first_run.wait(RANKS_S)
            told = None if has_run and generation.stage == "swapped" else "it could not take over what was compiled"
            why_not = agreement.confirm(told, is_cancelled, RANKS_S)
            if why_not is not None and generation.stage == "swapped":
                self.retire(generation, why_not)
        except Exception as cause:  # noqa: BLE001 - the store is gone, as is the rank that held it
            self._note_disagreed(generation, cause)
        finally:
            agreement.close()
            generation.done.set()

    def _agreement(self, call: Call) -> Agreement | None:
        """That with the other ranks; None where the job has no store to agree by, which is reported."""
        modes = (torch.is_grad_enabled(), getattr(call.target, "training", None))
        try:
            return agreement_here(f"{self.part.name} {self.strategy} {modes}")
        except Exception as cause:  # noqa: BLE001 - the store is another program's kind, or gone
            self._decide("no agreement", f"ranks cannot agree on a call: {type(cause).__name__}: {_said(cause)}")
            return None

    def is_agreed(self, generation: Generation, agreement: Agreement) -> bool:
        """At the beginning of a call: whether it is the one in which all ranks take over."""
        try:
            return agreement.is_now()
        except Exception as cause:  # noqa: BLE001 - the store is gone, or a group does not count what it issues
            self._note_disagreed(generation, cause)
            return False

    def _note_disagreed(self, generation: Generation, cause: Exception) -> None:
        if generation.stage in ("compiling", "ready"):
            generation.end("the ranks cannot agree")
            self.give_up(generation, _failure(cause, "agreeing with the other ranks"))

    def _tell(self, generation: Generation, say: Callable[[Agreement], None]) -> None:
        """Have the other ranks know of this one's code, or that it runs eagerly, so that none of them waits for it."""
        if generation.agreement is None:
            return
        try:
            say(generation.agreement)
        except Exception as cause:  # noqa: BLE001 - the store is gone
            self._decide("not told", f"the other ranks cannot be told: {type(cause).__name__}: {_said(cause)}")

    def _compile_without_damaged(self, work: _Work, ending: Ending) -> None:
        """Compile again: what was damaged in the cache is gone."""
        generation = work.generation
        generation.num_damaged += 1
        if generation.num_damaged > MAX_DAMAGED:
            self.give_up(generation, ending)
            return
        self._attempt(ending)
        self._decide("compiled again", ending.cause or "")
        self._compile(work)

    def _note_caches(self, filled: Filled) -> None:
        """Say what the child found and did in the cache folder."""
        kept = filled.kept
        if filled.why_no_artifact:
            self._decide("caches", filled.why_no_artifact)
        if kept.dropped:
            self._decide("dropped", f"{ledger.DAMAGED} {', '.join(kept.dropped)}")
        if kept.evicted:
            self._decide("evicted", kept.evicted)
        if kept.not_noted:
            self._decide("not noted", f"the cache folder takes no ledger of its entries: {kept.not_noted}")

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
            self._decide("caches", f"the artifact does not load here: {cause}")
            return False
        self._decide("artifact", "what the child compiled loads without tracing")
        return True

    def end(self, why: str) -> None:
        """End every compile that is under way; takes no lock, as nothing may that runs when an object goes."""
        for generation in self._generations.all():
            if generation.stage == "compiling" or self._is_agreeing(generation):
                generation.end(why)

    def give_up(self, generation: Generation, ending: Ending, *, is_of_call: bool = False) -> None:
        """It is not compiled: calls run eagerly, and where nothing of the region is compiled the plan hears of it.

        Calls of other signatures may be compiled yet if it failed with an error, or `is_of_call`: that lies in the call.
        """
        generation.stage = "eager"
        self._attempt(ending)
        generation.first_run.set()
        self._tell(generation, lambda agreement: agreement.refuse(ending.cause or ending.outcome))
        if generation.agreement is not None:
            generation.agreement.close()
        if self._host.settings.fullgraph and ending.outcome == "failed":
            generation.error = break_message(ending.cause, self.part.name)
        if generation.error is not None:  # the user's to mend: no other strategy is tried
            self._decide("refused", generation.error)
        elif generation.is_odd:
            self._decide("eager", f"calls like this one only: {ending.cause}")
        elif ending.outcome == "cancelled":
            self._decide("eager", f"its compile was cancelled: {ending.cause}")
        elif generation.family is not None and not self._host.settings.dynamic:
            generation.family.give_up()
            self._decide("static", "not compiled with dynamic shapes: each size is compiled by itself")
        elif not any(one.stage in ("ready", "swapped") for one in self._generations.all()):
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
            self.reject(generation, f"{type(cause).__name__}: {_said(cause)}")
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
        if wrong is not None and isinstance(generation.code, FromArtifact):
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

    def _missed(self, generation: Generation, why: str) -> None:
        """What was compiled is not for this call, as when the program's state is another: the next one is taken instead."""
        generation.num_missed += 1
        if generation.num_missed >= MAX_MISSED or not isinstance(generation.code, FromCaches):
            self.reject(generation, why)
            return
        generation.code = None
        self._decide("not taken over", why)

    def _note_unchecked(self, generation: Generation, cause: Exception) -> None:
        """The check did not come to an end: the next call is taken instead, and after that none."""
        told = _said(cause) if isinstance(cause, TorchspanError) else f"{type(cause).__name__}: {_said(cause)}"
        generation.num_unchecked += 1
        if generation.num_unchecked < MAX_UNCHECKED:
            self._decide("not verified", told)
        else:
            self.reject(generation, f"the check did not run, {generation.num_unchecked} times: {told}", "checking")

    def _without_artifact(self, generation: Generation, why: str, call: Call) -> None:
        """Give the artifact up and have the caches filled instead."""
        self._decide("caches", f"the artifact is not right here: {why}")
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
            self._decide("not verified", str(cause))
            return None
        except GuardError as cause:  # of an artifact
            return str(cause)

    def miss(self, code: FromArtifact | FromCaches) -> str:
        """Why what the child compiled cannot be had here."""
        what = "its cache entries do not serve this process" if self._host.settings.is_inductor else "it does not compile here"
        return f"{what}: {code.misses[0]}"

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
        self._decide("eager", cause)
        self.give_up(generation, Ending("failed", 0.0, cause=cause, where=where))

    def start_again(self, generation: Generation, call: Call) -> None:
        """Compile anew; calls run eagerly meanwhile."""
        generation.stage, generation.code, generation.is_traced = "compiling", None, False
        generation.num_missed = 0
        generation.done.clear()
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
            ending = _failure(cause, where)
            self._failures[kind] = f"{where}: {ending.cause}"
            self._attempt(ending)
        self._decide("eager", self._failures[kind])

    def retire(self, generation: Generation, why: str) -> None:
        """Calls run eagerly from now on, although what was compiled is right."""
        generation.stage = "eager"
        self._decide("eager", why)

    def _decide(self, choice: str, reason: str) -> None:
        self._host.report.decide("compile", self.part.name, choice, reason)

    def _attempt(self, ending: Ending) -> None:
        self._host.report.attempt(ending.attempt(self.strategy, self.part.name, self._host.settings.backend_name))


def _held(target: Any) -> Callable[[], Any]:
    """Gives `target`; where that is a compiled module, as long as the program has it."""
    return weakref.ref(target) if original(target) is not target else lambda: target


def _failure(cause: Exception, where: str, seconds: float = 0.0, peak_bytes: int | None = None) -> Ending:
    """What an error of ours, or of what was asked of the program, comes to."""
    return Ending("failed", seconds, peak_bytes, f"{type(cause).__name__}: {_said(cause)}", where)


def _said(cause: Exception) -> str:
    try:
        return str(cause)
    except Exception as again:  # noqa: BLE001 - an error of a user's own class
        return f"(its text cannot be had: {type(again).__name__})"
