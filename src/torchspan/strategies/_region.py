"""A region at run time: eager from the first call, compiled once a child has done the work and the result is proven.

Each input signature has a Generation; from the second size of an input on, one with dynamic shapes serves all sizes. Its
life: ``compiling`` (a child works, calls run eagerly) → ``ready`` (the next call takes it over, at its beginning, in its own
thread, because dynamo's tracing saves and restores the global random state) → ``swapped`` (calls run compiled), or ``eager``
(given up). A call runs in one generation from beginning to end, and its backward belongs to it.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from torchspan.core.errors import CaptureError, GuardError, InputError, TorchspanError
from torchspan.core.report import log
from torchspan.strategies import _ambient, _ledger, _torch, _transport, _verify, _watch
from torchspan.strategies._base import Part
from torchspan.strategies._fullgraph import break_message
from torchspan.strategies._generation import Family, Generation, describe, general
from torchspan.strategies._gpu import gpu_of, refusal
from torchspan.strategies._handback import FromArtifact, FromCaches, is_of_compiled_code
from torchspan.strategies._own_layer import as_called
from torchspan.strategies._progress import shown
from torchspan.strategies._signature import Dims, family, signature
from torchspan.strategies._supervisor import Ending, Job, run_bounded
from torchspan.strategies._worker import Filled, Task

if TYPE_CHECKING:
    from torchspan.strategies._plan import Plan

MAX_GENERATIONS = 8  # dynamo's own limit of recompiles
MAX_STALE = 3
MAX_DAMAGED = 3
_JOBS = {True: "torchspan.strategies._worker:compile_region", False: "torchspan.strategies._worker:fill_caches"}
_working: weakref.WeakSet[Generation] = weakref.WeakSet()  # those that a child works for, or did
_isas: dict[str, bool] = {}  # what was found of this machine's vector instructions, by any child


def end_compiles(timeout_s: float = 5.0) -> None:
    """End the compiles that are under way; each is a cancelled Attempt in its Report."""
    for generation in tuple(_working):
        generation.end("the program ended first")
    for thread in threading.enumerate():
        if thread.name == _watch.COMPILE_THREAD:
            thread.join(timeout_s)


@dataclass
class _Pending:
    """Forwards inside activation checkpointing that wait for their recomputation, all run by the same generation."""

    generation: Generation | None
    count: int = 1


class Region:
    """One Part of a Plan, at run time."""

    def __init__(self, part: Part, strategy: str, plan: Plan) -> None:
        self.part = part
        self.strategy = strategy
        self.has_failed = False
        self.has_compiled = False
        self.is_gathered = False  # it was said that calls whose inner results are gathered run eagerly
        self._plan = plan
        self._pid = os.getpid()
        self._generations: dict[Hashable, Generation] = {}
        self._families: dict[Hashable, Family] = {}
        self._full = Generation("eager")  # serves the signatures beyond the limit
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `target`, compiled if that is ready for these arguments and eagerly if not."""
        is_recomputing = torch._C._current_graph_task_id() != -1
        if is_recomputing or _saves_are_hooked():
            generation = self._as_checkpointed(is_recomputing, target, args, kwargs)
        else:
            generation = self._current(target, args, kwargs)
        if generation is not None:
            return self._run(generation, target, args, kwargs)
        if self.has_failed and self._plan.is_waiting and not self.part.is_block:
            return self._plan.call_next(self, args, kwargs)
        return self.eager(target, *args, **kwargs)

    def _current(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation | None:
        """The swapped generation for this call, which may be swapped just now; None to run eagerly."""
        generation = self._known(target, args, kwargs)
        if generation is None or generation.stage != "swapped" or self._plan.verify == "always":
            if self._is_forked():
                return None
            with self._plan.overhead():
                generation = generation or self._open(target, args, kwargs)
                if generation.error is not None:
                    raise CaptureError(generation.error)
                if generation.stage == "ready" or (generation.stage == "swapped" and self._plan.verify == "always"):
                    self._take_over(generation, target, args, kwargs)
        return generation if generation.stage == "swapped" else None

    def _as_checkpointed(
        self, is_recomputing: bool, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Generation | None:
        """The generation of a call that activation checkpointing runs again in the backward: both must be of one kind.

        While a forward waits for its recomputation, nothing is swapped for this target.
        """
        with self._lock:
            pending = self._pending.get(id(target))
            if pending is not None:
                pending.count += -1 if is_recomputing else 1
                if pending.count == 0:
                    del self._pending[id(target)]
                return pending.generation
        if is_recomputing:  # of a forward that was not seen: never swap in the middle of a backward
            known = self._known(target, args, kwargs)
            return known if known is not None and known.stage == "swapped" else None
        generation = self._current(target, args, kwargs)
        with self._lock:
            self._pending[id(target)] = _Pending(generation)
        return generation

    def eager(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `target` as torch does."""
        call, args, named = as_called(target, args, kwargs)
        return call._call_impl(*args, **named) if self.part.is_block else call(*args, **named)

    # compiling

    def _known(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation | None:
        """The generation that serves such a call, if there is one."""
        known = self._generations.get(signature(target, args, kwargs))
        if known is not None or not self._families:
            return known
        key, sizes = family(target, args, kwargs)
        alike = self._families.get(key)
        return alike.find(sizes) if alike is not None else None

    def _open(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation:
        with self._lock:
            known = self._known(target, args, kwargs)
            if known is not None:
                return known
            if len(self._all()) >= MAX_GENERATIONS:
                if not self._full.done.is_set():
                    self._full.done.set()
                    self._decide("eager", f"{MAX_GENERATIONS} input signatures were compiled; calls with others run eagerly")
                return self._full
            generation = self._dynamic(target, args, kwargs)
            if generation is None:
                generation = Generation(wants_artifact=self._plan.wants_artifact(self.part))
                self._generations[signature(target, args, kwargs)] = generation
        self._start(generation, target, args, kwargs)
        if self._plan.is_waiting:
            generation.wait()
        return generation

    def _is_forked(self) -> bool:
        """Whether this is a fork of the process that compiles, as a data loader's worker is: nothing comes back here."""
        if os.getpid() == self._pid:
            return False
        self._decide("eager", "forked from the process that compiles: what was not swapped before runs eagerly here")
        return True

    def _dynamic(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Generation | None:
        """A generation with dynamic shapes, where a second size of an input says so, or the user; None for a static one."""
        asked = self._plan.settings.dynamic
        if asked is False:
            return None
        key, sizes = family(target, args, kwargs)
        alike = self._families.get(key)
        if alike is None:
            alike = self._families[key] = Family(sizes)
            dims = general(sizes) if asked else None
        else:
            dims = alike.widened(sizes)
        if dims is None or alike.is_static:
            return None
        if not asked:
            self._decide("dynamic", f"sizes differ between calls: {describe(alike.first, sizes)}")
        generation = Generation(family=alike, dims=dims)
        alike.generations.append(generation)
        return generation

    def _all(self) -> list[Generation]:
        return [*self._generations.values(), *(one for alike in self._families.values() for one in alike.generations)]

    def _start(self, generation: Generation, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        gpu = gpu_of(args, kwargs)
        why_not = refusal(gpu, self._plan.settings)
        if why_not is not None:
            self._give_up(generation, Ending("skipped", 0.0, cause=why_not))
            return
        try:
            payload = self._payload(self._marks(generation), target, args, kwargs)
        except InputError as cause:
            self._give_up(generation, Ending("failed", 0.0, cause=str(cause), where="sending the program"))
            return
        work = threading.Thread(
            target=self._work,
            args=(generation, target, payload, gpu.kind != "cpu"),
            name=_watch.COMPILE_THREAD,
            daemon=True,
        )
        work.start()

    def _payload(self, dims: Dims, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bytes:
        settings, ambient = self._plan.settings.to_send(), _ambient.capture()
        task = Task(target, self.part.is_block, args, dict(kwargs), settings, ambient, dict(_isas), dims, self.part.nested)
        return _transport.dumps(task)

    def _marks(self, generation: Generation) -> Dims:
        """The dimensions that are to be marked as dynamic; none where all are, by the user's ``dynamic=True``."""
        return () if self._plan.settings.dynamic else generation.dims

    def _work(self, generation: Generation, target: Any, payload: bytes, is_fresh: bool) -> None:
        _working.add(generation)
        try:
            self._compile(generation, target, payload, is_fresh)
        finally:  # a caller that waits must not wait for ever, whatever happens here
            generation.done.set()

    def _compile(self, generation: Generation, target: Any, payload: bytes, is_fresh: bool) -> None:
        """In a thread of its own: have a child compile, then make ready to take over."""
        ending = self._run_child(generation, payload, is_fresh)
        if ending.result is None:
            if _ledger.DAMAGED in (ending.cause or ""):
                self._compile_without_damaged(generation, target, payload, is_fresh, ending)
            else:
                self._give_up(generation, ending)
            return
        filled: Filled = pickle.loads(ending.result)
        if filled.artifact is not None and not self._load(generation, target, filled.artifact):
            generation.wants_artifact = False
            self._attempt(replace(ending, outcome="failed", cause="its artifact does not load here", where="loading"))
            self._compile(generation, target, payload, is_fresh)
            return
        if self._plan.settings.is_inductor and filled.graphs == 0:
            self._give_up(generation, Ending("skipped", ending.seconds, ending.peak_bytes, "nothing here can be compiled"))
            return
        try:
            if filled.artifact is None:
                prepare_to_load(filled.isas)
        except Exception as cause:  # noqa: BLE001 - the compiler's own imports, under the user's settings and warning filters
            failed = Ending(
                "failed", ending.seconds, ending.peak_bytes, f"{type(cause).__name__}: {cause}", "importing inductor"
            )
            self._give_up(generation, failed)
            return
        self._note_caches(filled)
        to_load = {} if filled.artifact is not None else filled.kept.files
        damaged = _ledger.check(_torch.cache_folder(), to_load) if to_load else []
        if damaged:
            told = f"{_ledger.DAMAGED} {', '.join(damaged)}"
            ending = replace(ending, outcome="failed", cause=told, where="before loading")
            self._compile_without_damaged(generation, target, payload, is_fresh, ending)
            return
        self._attempt(ending)
        generation.stage = "ready"
        generation.done.set()

    def _compile_without_damaged(
        self, generation: Generation, target: Any, payload: bytes, is_fresh: bool, ending: Ending
    ) -> None:
        """Compile again: what was damaged in the cache is gone."""
        generation.num_damaged += 1
        if generation.num_damaged > MAX_DAMAGED:
            self._give_up(generation, ending)
            return
        self._attempt(ending)
        self._decide("compiled again", ending.cause or "")
        self._compile(generation, target, payload, is_fresh)

    def _note_caches(self, filled: Filled) -> None:
        """Say what the child found and did in the cache folder."""
        kept = filled.kept
        if filled.why_no_artifact:
            self._decide("caches", filled.why_no_artifact)
        if kept.dropped:
            self._decide("dropped", f"{_ledger.DAMAGED} {', '.join(kept.dropped)}")
        if kept.evicted:
            self._decide("evicted", kept.evicted)
        if kept.not_noted:
            self._decide("not noted", f"the cache folder takes no ledger of its entries: {kept.not_noted}")

    def _run_child(self, generation: Generation, payload: bytes, is_fresh: bool) -> Ending:
        with self._plan.turn(self) as budget:
            if budget is None:
                return Ending("skipped", 0.0, cause="nothing is left of the budget")
            function, began_ns = _JOBS[generation.wants_artifact], time.time_ns()
            shows = self._plan.shows_progress
            with shown(f"{self.part.name} ({self.strategy})", budget) if shows else nullcontext() as tick:
                job = Job(function, payload, is_fresh, record=shows or _watch.is_watched(), tick=tick)
                ending = run_bounded(job, budget, generation.cancel)
            if job.record:
                _watch.tell(_watch.Finished(self.part.name, self.strategy, self._plan.settings, payload, began_ns, ending))
            self._plan.spend(self.strategy, ending)
            return replace(ending, cause=generation.why_cancelled) if ending.outcome == "cancelled" else ending

    def _load(self, generation: Generation, target: Any, artifact: bytes) -> bool:
        """Load an artifact, which needs no call to do; whether that went well."""
        try:
            generation.code = FromArtifact(artifact, target)
        except TorchspanError as cause:
            self._decide("caches", f"the artifact does not load here: {cause}")
            return False
        self._decide("artifact", "what the child compiled loads without tracing")
        return True

    def _give_up(self, generation: Generation, ending: Ending) -> None:
        generation.stage = "eager"
        self._attempt(ending)
        if self._plan.settings.fullgraph and ending.outcome == "failed":
            generation.error = break_message(ending.cause, self.part.name)
        if generation.error is not None:  # the user's to mend: no other strategy is tried
            self._decide("refused", generation.error)
        elif ending.outcome == "cancelled":
            self._decide("eager", f"its compile was cancelled: {ending.cause}")
        elif generation.family is not None and not self._plan.settings.dynamic:
            generation.family.give_up()
            self._decide("static", "not compiled with dynamic shapes: each size is compiled by itself")
        elif not any(one.stage in ("ready", "swapped") for one in self._all()):
            self.has_failed = True
            self._plan.region_failed(self)
        generation.done.set()

    # taking over

    def _take_over(self, generation: Generation, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """At the beginning of a call: load the compiled code and prove it; other threads run eagerly meanwhile."""
        if not generation.lock.acquire(blocking=self._plan.is_waiting):
            return
        try:
            if generation.stage == "ready" or self._plan.verify == "always":
                self._swap(generation, target, args, kwargs)
        finally:
            generation.lock.release()

    def _swap(self, generation: Generation, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        started = time.perf_counter()
        settings = self._plan.settings
        if generation.code is None:
            generation.code = FromCaches(settings, self.part, _isas, self._marks(generation))
            self._note_handback(generation, settings.is_inductor)
        try:
            wrong = self._verify(generation.code, target, args, kwargs) if self._plan.verify != "off" else None
        except _verify.EagerRaisesError as cause:  # this call runs eagerly, and raises; the next one is taken instead
            self._decide("not verified", str(cause))
            return
        if wrong is not None and isinstance(generation.code, FromArtifact):
            self._without_artifact(generation, wrong, target, args, kwargs)
        elif generation.code.misses:
            self._reject(generation, self._miss(generation.code))
        elif wrong is not None:
            self._reject(generation, f"compiled code gives other results than eager: {wrong}")
            log.warning("torchspan: %s runs eagerly: compiled code gives other results: %s", self.part.name, wrong)
        elif generation.stage == "ready":
            generation.stage = "swapped"
            generation.proven = family(target, args, kwargs)[1] if generation.family is not None else ()
            self.has_compiled = True
            self._plan.report.figure("swap_stall_s", time.perf_counter() - started)

    def _without_artifact(
        self, generation: Generation, why: str, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Give the artifact up and have the caches filled instead."""
        self._decide("caches", f"the artifact is not right here: {why}")
        generation.stage, generation.code, generation.wants_artifact = "compiling", None, False
        generation.done.clear()
        self._start(generation, target, args, kwargs)

    def _verify(
        self, code: FromArtifact | FromCaches, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> str | None:
        try:
            return _verify.mismatch(self.eager, code.trace, (target, args, kwargs), is_random=self._plan.settings.is_random)
        except _verify.CannotCopyError as cause:
            self._decide("not verified", str(cause))
            return None
        except GuardError as cause:  # of an artifact
            return str(cause)

    def _miss(self, code: FromArtifact | FromCaches) -> str:
        """Why what the child compiled cannot be had here."""
        what = "its cache entries do not serve this process" if self._plan.settings.is_inductor else "it does not compile here"
        return f"{what}: {code.misses[0]}"

    def _note_handback(self, generation: Generation, is_inductor: bool) -> None:
        if is_inductor and generation.wants_artifact:
            return  # why there is no artifact was said
        if is_inductor:
            self._plan.report.decide("compile", self.part.name, "caches", "torch's caches hold what the child compiled")
        else:
            reason = f"{self._plan.settings.backend_name} compiles here too: its child showed that it ends within the budget"
            self._plan.report.decide("compile", self.part.name, "compiled again", reason)

    def _reject(self, generation: Generation, cause: str, where: str = "taking over") -> None:
        generation.code = None
        self._decide("eager", cause)
        self._give_up(generation, Ending("failed", 0.0, cause=cause, where=where))

    # running

    def _run(self, generation: Generation, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        code = generation.code
        if code is None:  # another thread has just given it up
            return self.eager(target, *args, **kwargs)
        try:
            return self._run_code(generation, code, target, args, kwargs)
        except Exception as error:
            if not is_of_compiled_code(error):
                raise
            cause = error
        return self._run_instead(generation, cause, target, args, kwargs)

    def _run_instead(
        self, generation: Generation, error: Exception, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """Run eagerly what compiled code raised in. If eager raises too, that is the program's own error."""
        outputs = self.eager(target, *args, **kwargs)
        with generation.lock:
            if generation.stage == "swapped":
                self._reject(generation, f"compiled code raised {type(error).__name__}: {error}", "running")
        return outputs

    def _run_code(
        self,
        generation: Generation,
        code: FromArtifact | FromCaches,
        target: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        if isinstance(code, FromArtifact):
            return self._run_artifact(generation, code, target, args, kwargs)
        if not generation.is_traced:
            generation.is_traced = True
            return self._trace(generation, code, target, args, kwargs)
        before = code.num_calls
        outputs = code.run(target, *args, **kwargs)
        if code.is_counting and code.num_calls == before:
            self._note_stale(generation, target, args, kwargs)
        return outputs

    def _trace(
        self, generation: Generation, code: FromCaches, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """The first real call, which traces if nothing was verified before."""
        outputs = code.trace(target, *args, **kwargs)
        with generation.lock:
            if code.misses and generation.stage == "swapped":
                self._reject(generation, self._miss(code))
        return outputs

    def _run_artifact(
        self, generation: Generation, code: FromArtifact, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        try:
            return code.run(target, *args, **kwargs)
        except GuardError:
            self._note_stale(generation, target, args, kwargs)
        return self.eager(target, *args, **kwargs)

    def _note_stale(self, generation: Generation, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """The guards failed, so that call ran eagerly: the program's own state has changed since it was compiled.

        Or it is for other sizes than it was meant for; then these have a generation of their own from the next call on.
        """
        with generation.lock:
            if generation.stage != "swapped":
                return
            if generation.family is not None and family(target, args, kwargs)[1] != generation.proven:
                self._misfit(generation.family)
                fallback = self._generations[signature(target, args, kwargs)] = Generation()
                self._start(fallback, target, args, kwargs)
                return
            generation.stale += 1
            if generation.stale > MAX_STALE:
                generation.stage = "eager"
                self._decide("eager", f"the program's state changed {MAX_STALE} times since it was compiled")
                return
            self._decide("compiled again", "the program's state changed since it was compiled (its guards failed)")
            generation.stage, generation.code, generation.is_traced = "compiling", None, False
            generation.done.clear()
        self._start(generation, target, args, kwargs)

    def _misfit(self, alike: Family) -> None:
        alike.num_misfits += 1
        if alike.is_static:
            alike.give_up()
        self._decide("static", "the code for dynamic shapes does not serve these sizes (its guards failed)")

    def _decide(self, choice: str, reason: str) -> None:
        self._plan.report.decide("compile", self.part.name, choice, reason)

    def _attempt(self, ending: Ending) -> None:
        self._plan.report.attempt(ending.attempt(self.strategy, self.part.name, self._plan.settings.backend_name))


def _saves_are_hooked() -> bool:
    """Whether what autograd saves passes through hooks, as it does inside activation checkpointing."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def prepare_to_load(isas: Mapping[str, bool]) -> None:
    """Ready this process for loading what a child compiled: what the child found out, and the imports."""
    _isas.update(isas)
    with _gentle_imports():
        _torch.import_compiler()


def known_isas_here() -> dict[str, bool]:
    """What children found of this machine's vector instructions."""
    return _isas


@contextmanager
def _gentle_imports() -> Iterator[None]:
    """Hand the GIL over more often while this thread imports: every operation of a step waits for it once."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, 0.0005))
    try:
        yield
    finally:
        sys.setswitchinterval(before)
