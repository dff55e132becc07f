"""Gets the code of a generation: what an earlier run compiled, or else what a compile process makes, in a thread of its own."""

from __future__ import annotations

import pickle
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torchspan.caches import ledger
from torchspan.core.errors import InputError, TorchspanError
from torchspan.jobs import transport
from torchspan.jobs.budget import Allowance
from torchspan.jobs.groups import groups_here
from torchspan.jobs.supervisor import Ending, Job, run_bounded
from torchspan.private import inductor
from torchspan.regions import ambient, watch
from torchspan.regions.call import Call, original
from torchspan.regions.compiler_state import known_isas_here, prepare_to_load
from torchspan.regions.failure import described, failure
from torchspan.regions.generation import Generation
from torchspan.regions.gpu import gpu_of, refusal
from torchspan.regions.handback import FromArtifact
from torchspan.regions.host import Host
from torchspan.regions.part import Part
from torchspan.regions.progress import shown
from torchspan.regions.record import Record, can_be_kept
from torchspan.regions.signature import Dims
from torchspan.regions.worker import APART, Filled, Isas, Task

MAX_DAMAGED = 3
SENDING = "sending the program"
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
    """What a thread compiles: for which generation, which program, and the pickled Task of it."""

    generation: Generation
    target: Callable[[], Any]  # does not keep a compiled module alive, see `_held`
    payload: bytes
    is_fresh: bool  # whether it needs a process that was not forked


class Life(Protocol):
    """The owner of a generation's stage."""

    has_compiled: bool

    def decide(self, choice: str, reason: str) -> None:
        """Write a Decision into the Report."""

    def attempt(self, ending: Ending) -> None:
        """Write an Attempt into the Report."""

    def give_up(self, generation: Generation, ending: Ending, *, is_of_call: bool = False) -> None:
        """Give it up because its compile failed."""

    def forget_earlier_run(self, generation: Generation) -> None:
        """Remove the record of an earlier run, whose code cannot be used."""

    def make_ready(self, generation: Generation, ending: Ending, filled: Filled) -> None:
        """Have a call take over what was compiled."""


class Compiler:
    """Gets the code of the generations of one region."""

    def __init__(self, part: Part, strategy: str, host: Host, life: Life) -> None:
        self._part = part
        self._strategy = strategy
        self._host = host
        self._life = life

    def start(self, generation: Generation, call: Call) -> None:
        """Have `generation` compiled for `call`, in a thread that waits for a compile process."""
        gpu = gpu_of(call.args, call.kwargs)
        why_not = refusal(gpu, self._host.settings)
        if why_not is not None:
            self._life.give_up(generation, Ending("skipped", 0.0, cause=why_not))
            return
        state = ambient.capture()
        try:
            payload = self._payload(self.marks(generation), call, state)
        except InputError as cause:
            generation.is_odd = self._can_be_sent(call)
            self._life.give_up(generation, Ending("failed", 0.0, cause=str(cause), where=SENDING))
            return
        generation.record = generation.record or self._record(payload, state)
        work = _Work(generation, _held(call.target), payload, gpu.kind != "cpu")
        threading.Thread(target=self._work, args=(work,), name=watch.COMPILE_THREAD, daemon=True).start()

    def _record(self, payload: bytes, state: ambient.Ambient) -> Record | None:
        """The record of a compile that is checked before it is taken over, on one rank; None where there is to be none."""
        host = self._host
        if host.verify == "off" or watch.is_watched() or groups_here() is not None or not can_be_kept(host.settings):
            return None
        try:
            return Record(f"{self._part.name} {self._strategy}", payload, state, 2 * max(1, len(self._part.targets)) - 1)
        except OSError as cause:  # no folder for caches
            self._life.decide("not kept", f"the next start compiles again: {described(cause)}")
            return None

    def _payload(self, dims: Dims, call: Call, state: ambient.Ambient) -> bytes:
        task = Task(
            call.target,
            self._part.is_called_inside,
            call.args,
            dict(call.kwargs),
            self._host.settings.to_send(),
            state,
            Isas(known_isas_here()),
            dims,
            self._part.nested,
        )
        return transport.dumps(task, groups=groups_here(), apart=APART)

    def _can_be_sent(self, call: Call) -> bool:
        """Whether the program can be sent without the call's arguments: then these are what cannot."""
        try:
            self._payload((), Call(call.target, (), {}), ambient.capture())
        except InputError:
            return False
        return True

    def marks(self, generation: Generation) -> Dims:
        """The dimensions that are to be marked as dynamic; none where all are, by the user's ``dynamic=True``."""
        return () if self._host.settings.dynamic else generation.dims

    def _work(self, work: _Work) -> None:
        _working.add(work.generation)
        try:
            self._compile(work)
        except Exception as cause:  # noqa: BLE001 - whatever may go wrong in the program's process
            self._life.give_up(work.generation, failure(cause, "in the thread that compiles"))
        finally:  # a caller that waits must not wait for ever, whatever happens here
            if work.generation.record is not None:
                work.generation.record.settle()
            if not work.generation.is_agreeing:
                work.generation.done.set()

    def _compile(self, work: _Work) -> None:
        """Get the code, and make it ready to be taken over; runs in a thread of its own."""
        generation = work.generation
        ending = self._of_earlier_run(work) or self._run_child(work)
        if ending.result is None:
            if ending.is_cache_damaged:
                self._compile_without_damaged(work, ending)
            else:
                self._life.give_up(generation, ending)
            return
        filled: Filled = pickle.loads(ending.result)
        if filled.artifact is not None and not self._load(generation, work.target(), filled.artifact):
            self._life.attempt(replace(ending, outcome="failed", cause="its artifact does not load here", where="loading"))
            if generation.is_of_earlier_run:
                self._life.forget_earlier_run(generation)
            else:
                generation.wants_artifact = False
            self._compile(work)
            return
        if self._host.settings.is_inductor and filled.graphs == 0:
            nothing = Ending("skipped", ending.seconds, ending.peak_bytes, "nothing here can be compiled")
            self._life.give_up(generation, nothing, is_of_call=True)
            return
        try:
            if filled.artifact is None:
                prepare_to_load(filled.isas)
        except Exception as cause:  # noqa: BLE001 - the compiler's own imports, under the user's settings and warning filters
            self._life.give_up(generation, failure(cause, "importing inductor", ending.seconds, ending.peak_bytes))
            return
        self._note_caches(filled)
        is_checked = filled.artifact is not None or generation.is_of_earlier_run
        to_load = {} if is_checked else filled.kept.files
        damaged = ledger.check(inductor.cache_folder(), to_load) if to_load else []
        if damaged:
            message = f"{ledger.DAMAGED} {', '.join(damaged)}"
            ending = replace(ending, outcome="failed", cause=message, where="before loading")
            self._compile_without_damaged(work, ending)
            return
        self._life.make_ready(generation, ending, filled)

    def _of_earlier_run(self, work: _Work) -> Ending | None:
        """What an earlier run compiled, as the Ending of a compile process; None if it has to be compiled."""
        record, started = work.generation.record, time.perf_counter()
        if record is None:
            return None
        try:
            filled = record.read(work.generation.kind)
        except Exception as cause:  # noqa: BLE001 - the folder cannot be read, or holds what another version wrote
            self._life.decide("compiled again", f"what an earlier run compiled cannot be read: {described(cause)}")
            filled = None
        if record.why_not is not None:
            self._life.decide("compiled again", record.why_not)
        if filled is None:
            record.settle()
            return None
        self._life.decide("loaded", "an earlier run of this program compiled it")
        return Ending("loaded", time.perf_counter() - started, result=pickle.dumps(filled))

    def _compile_without_damaged(self, work: _Work, ending: Ending) -> None:
        """Compile again, after the damaged entry of the cache was removed."""
        generation = work.generation
        generation.num_damaged += 1
        if generation.num_damaged > MAX_DAMAGED:
            self._life.give_up(generation, ending)
            return
        self._life.attempt(ending)
        self._life.decide("compiled again", ending.cause or "")
        self._compile(work)

    def _note_caches(self, filled: Filled) -> None:
        """Report what the child found and did in the cache folder."""
        changes = filled.kept
        if filled.why_no_artifact:
            self._life.decide("caches", filled.why_no_artifact)
        if changes.dropped:
            self._life.decide("dropped", f"{ledger.DAMAGED} {', '.join(changes.dropped)}")
        if changes.evicted:
            self._life.decide("evicted", changes.evicted)
        if changes.not_noted:
            self._life.decide("not noted", f"no ledger of its entries can be written to the cache folder: {changes.not_noted}")

    def _run_child(self, work: _Work) -> Ending:
        generation = work.generation
        with self._host.turn(self._part, generation.cancel.is_set, self._life.has_compiled) as allowed:
            ending = allowed if isinstance(allowed, Ending) else self._run_within(allowed, work)
        is_cancelled = ending.outcome == "cancelled" and generation.cancel.is_set()
        return replace(ending, cause=generation.why_cancelled) if is_cancelled else ending

    def _run_within(self, allowed: Allowance, work: _Work) -> Ending:
        generation, payload = work.generation, work.payload
        function, began_ns = _JOBS[generation.wants_artifact], time.time_ns()
        shows = self._host.shows_progress
        limit = replace(allowed.budget, seconds=allowed.share_s)
        with shown(f"{self._part.name} ({self._strategy})", limit) if shows else nullcontext() as tick:
            job = Job(function, payload, work.is_fresh, record=shows or watch.is_watched(), tick=tick)
            ending = run_bounded(job, allowed.budget, generation.cancel, share_s=allowed.share_s)
        if job.record:
            watch.tell(watch.Finished(self._part.name, self._strategy, self._host.settings, payload, began_ns, ending))
        self._host.spend(self._strategy, self._part, ending)
        return ending

    def _load(self, generation: Generation, target: Any, artifact: bytes) -> bool:
        """Load an artifact, which can be done outside of a call; gives whether that succeeded."""
        try:
            generation.code = FromArtifact(artifact, target)
        except TorchspanError as cause:
            self._life.decide("caches", f"the artifact does not load here: {cause}")
            return False
        self._life.decide("artifact", "what the child compiled loads without tracing")
        return True


def _held(target: Any) -> Callable[[], Any]:
    """Gives `target`; a compiled module only as long as the program has it, since a compile does not keep it alive."""
    return weakref.ref(target) if original(target) is not target else lambda: target
