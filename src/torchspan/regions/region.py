"""A region at run time: eager from the first call, compiled once a compile process has made code and a check has passed.

Each input signature and each state of the program has a Generation, see :mod:`.lifecycle`. Generations live side by side, and a
call goes to one whose guards hold. From the second size of an input, or the second value of a number, one generation serves
all sizes or values. A call and its backward run in one generation from beginning to end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from torchspan.core.errors import CaptureError, GuardError
from torchspan.private import dispatch
from torchspan.regions.backward import is_in_backward, saves_are_hooked
from torchspan.regions.call import Call
from torchspan.regions.generation import MAX_UNSERVED, PATIENCE, Family, Generation, Generations, describe
from torchspan.regions.handback import FromArtifact, FromCaches, is_of_compiled_code
from torchspan.regions.host import Host
from torchspan.regions.lifecycle import Lifecycle
from torchspan.regions.outside import has_global_hooks
from torchspan.regions.part import Part
from torchspan.regions.signature import general
from torchspan.regions.transformers import as_called

MAX_ODD = 64  # kinds of calls that cannot be sent, or that raise
_PLAIN = frozenset((torch.Tensor, type(None), bool, int, str))  # of arguments: what guards tell apart as a signature does
MAX_HOPELESS = 3  # signatures that are tried where none compiles


@dataclass
class _Pending:
    """Forwards inside activation checkpointing that wait for their recomputation, all run by the same generation."""

    generation: Generation | None
    count: int = 1


class Region:
    """One Part of a Plan, at run time."""

    def __init__(self, part: Part, strategy: str, host: Host) -> None:
        self.part = part
        self.is_gathered = False  # whether the Report says that calls whose inner results are gathered run eagerly
        self._host = host
        self._pid = os.getpid()
        self._generations = Generations()
        self._life = Lifecycle(part, strategy, host, self._generations, self.eager)
        self._only: Generation | None = None  # the only one, if there is just one: then its guards alone decide
        self._is_only = True  # its guards have held in every call so far
        self._is_full = False  # whether the Report says that there are more signatures and states than the limit
        self._pending: dict[int, _Pending] = {}
        self._lock = threading.Lock()

    @property
    def has_failed(self) -> bool:
        """Whether nothing of it could be compiled."""
        return self._life.has_failed

    def end(self, why: str) -> None:
        """End the compiles that are under way: the program is gone."""
        self._life.end(why)

    @property
    def may_try_others(self) -> bool:
        """Whether calls of other signatures may be compiled although no compile has succeeded: none hung or crashed."""
        return self._life.may_try_others

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run `target`, compiled if that is ready for these arguments and eagerly if not."""
        only = self._only
        if only is not None and only.stage == "swapped" and self._is_plain(args, kwargs):
            return self._run_only(only, target, args, kwargs)
        call = Call(target, args, kwargs)
        generation = self._serving(call)
        if generation is not None:
            return self._run(generation, call)
        if self.has_failed and self._host.is_waiting and not self.part.is_block and self._host.has_moved_on(self.part):
            return self._host.call_again(args, kwargs)
        try:
            return self.eager(call.target, *call.args, **call.kwargs)
        except Exception:
            self._note_raised(call)
            raise

    def _note_raised(self, call: Call) -> None:
        """Note that the program raises in this call: how its compile ends says nothing about other calls."""
        if is_in_backward():
            return
        try:
            with self._lock:
                self._generations.note_raised(call)
        except Exception as cause:  # noqa: BLE001 - an argument cannot be read, as was reported; the program's error goes on
            self._life.note_failure(cause, "after the call")

    def _serving(self, call: Call) -> Generation | None:
        """The generation that runs this call; None to run it eagerly, also where something of ours fails."""
        why_eager = self._why_eager()
        if why_eager is not None:
            self._decide("eager", why_eager)
            if not (is_in_backward() or saves_are_hooked()):
                return None
        try:
            call.signature  # noqa: B018 - computed here: whatever an argument may be, the program has its own use for it
        except Exception as cause:  # noqa: BLE001 - whatever a user's own object raises when it is looked at
            self._life.note_failure(cause, "reading the arguments")
            return None
        is_recomputing = is_in_backward()
        try:
            if is_recomputing or saves_are_hooked():
                return self._as_checkpointed(is_recomputing, call, is_eager=why_eager is not None)
            return self._current(call)
        except CaptureError:
            raise
        except Exception as cause:  # noqa: BLE001 - of ours, or of what it asked of torch: never the program's
            self._life.note_failure(cause, "before the call")
            return None

    def _why_eager(self) -> str | None:
        """Why a call is not compiled, whatever its arguments are; None if it may be."""
        if dispatch.is_transformed():
            return "inside a transform of torch.func (vmap, grad, jvp) or a trace: such calls are not compiled"
        if has_global_hooks():
            return "there are hooks on all modules, which compiled code does not call"
        return None

    def _current(self, call: Call) -> Generation | None:
        """The swapped generation for this call, which may be swapped just now; None to run eagerly."""
        generation = self._generations.find(call)
        if generation is not None and generation.stage == "swapped" and self._host.verify != "always":
            return generation
        if self._is_forked():
            return None
        with self._host.overhead():
            generation = self._chosen(call)
            if generation is None:
                return None
            if generation.error is not None:
                raise CaptureError(generation.error)
            if self._takes_over(generation, call):
                self._life.take_over(generation, call)
                if self._host.is_waiting and generation.stage == "compiling":  # what an earlier run compiled did not serve
                    generation.wait()
                    self._life.take_over(generation, call)
                self._remember(generation, call)
        return generation if generation.stage == "swapped" else None

    def _chosen(self, call: Call) -> Generation | None:
        """A generation whose guards hold, or one that is compiling for such calls, or a new one; None beyond the limit."""
        with self._lock:
            existing = self._generations.serving(call) or self._generations.meant(call)
            generation = existing or self._opened(call)
        if generation is None or existing is not None:
            if generation is not None and generation.stage == "compiling" and generation.record is not None:
                generation.record.wait()
            return generation
        self._life.start(generation, call)
        if self._host.is_waiting:
            generation.wait()
        return generation

    def _remember(self, generation: Generation, call: Call) -> None:
        """Send this call and others like it to `generation` without checking guards: torch makes them in the first call."""
        if generation.stage == "swapped":
            with self._lock:
                self._generations.remember(generation, call)
            self._life.keep_record(generation)  # after that: other threads look for it meanwhile

    def _takes_over(self, generation: Generation, call: Call) -> bool:
        """Whether this call is to take it over; one with other strings or booleans does so only after PATIENCE calls."""
        if generation.stage == "swapped":
            return self._host.verify == "always" and generation.agreement is None
        agreement = generation.agreement
        if agreement is not None:  # asked in every call, as it goes by how far the calls are
            is_now = generation.stage != "eager" and self._life.ranks.is_agreed(generation, agreement)
            return is_now and generation.stage == "ready"
        if generation.stage != "ready":
            return False
        generation.num_passed += 1
        return generation.num_passed > PATIENCE or generation.is_exactly_for(call)

    def _as_checkpointed(self, is_recomputing: bool, call: Call, *, is_eager: bool) -> Generation | None:
        """The generation of a call that activation checkpointing runs again in the backward: both must be of one kind.

        While a forward waits for its recomputation, nothing is swapped for this target.
        """
        with self._lock:
            pending = self._pending.get(id(call.target))
            if pending is not None:
                pending.count += -1 if is_recomputing else 1
                if pending.count == 0:
                    del self._pending[id(call.target)]
                return pending.generation
        if is_recomputing and is_eager:
            return None
        if is_recomputing:  # of a forward that was not seen: never swap in the middle of a backward
            remembered = self._generations.find(call)
            if remembered is not None and remembered.stage == "swapped":
                return remembered
            with self._lock:
                return self._generations.serving(call)
        generation = None if is_eager else self._current(call)
        with self._lock:
            self._pending[id(call.target)] = _Pending(generation)
        return generation

    def eager(self, target: Any, *args: Any, **kwargs: Any) -> Any:
        """Run `target` as torch does."""
        program, args, keywords = as_called(target, args, kwargs)
        return program._call_impl(*args, **keywords) if self.part.is_called_inside else program(*args, **keywords)

    # compiling

    def _opened(self, call: Call) -> Generation | None:
        """A new generation for this call; None beyond the limit."""
        limit = self._host.settings.limit
        count = self._generations.num_counted
        is_hopeless = self.has_failed and (not self.may_try_others or count >= MAX_HOPELESS)
        if is_hopeless or count >= limit or len(self._generations.all()) >= limit + MAX_ODD:
            if not self._is_full:
                self._is_full = True
                self._decide("eager", self._why_full())
            return None
        beaten = self._generations.beaten(call)
        is_misfit = any(generation.family is not None and generation.proven != call.sizes for generation in beaten)
        if is_misfit:
            self._misfit(call)
        elif beaten:
            self._decide("compiled again", "the program's state changed since it was compiled (its guards failed)")
        dynamic = None if is_misfit else self._dynamic(call)
        static = dynamic or Generation.of(call, wants_artifact=self._host.wants_artifact(self.part))
        return self._generations.open(static)

    def _why_full(self) -> str:
        """Why no more signatures and states are compiled."""
        tried, count = self._generations.num_counted, self._generations.num_compiled
        counts = f"{count} of {tried}" if count != tried else str(count)
        counts += " input signatures and states of the program were compiled"
        return f"{counts}; calls with others run eagerly (recompile_limit={self._host.settings.limit})"

    def _is_forked(self) -> bool:
        """Whether this is a fork of the process that compiles, as a data loader's worker is: nothing comes back here."""
        if os.getpid() == self._pid:
            return False
        self._decide("eager", "forked from the process that compiles: what was not swapped before runs eagerly here")
        return True

    def _dynamic(self, call: Call) -> Generation | None:
        """A generation with dynamic shapes, where a second size of an input says so, or the user; None for a static one."""
        setting = self._host.settings.dynamic
        if setting is False:
            return None
        family = self._generations.families.get(call.family)
        if family is None:
            family = self._generations.families[call.family] = Family(call.sizes)
            dims = general(call.sizes) if setting else None
        else:
            dims = family.widened(call.sizes)
        if dims is None or family.is_static:
            return None
        if not setting:
            kind = "numbers" if family.first[:-1] == call.sizes[:-1] else "sizes"
            self._decide("dynamic", f"{kind} differ between calls: {describe(family.first, call.sizes)}")
        generation = Generation.of(call, family=family, dims=dims)
        family.generations.append(generation)
        return generation

    # running

    def _is_plain(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether guards alone can decide: the arguments are tensors and plain values, and nothing unusual is in force."""
        if not (_are_plain(args) and (not kwargs or _are_plain(kwargs.values()))):
            return False
        is_usual = not (dispatch.is_transformed() or has_global_hooks() or torch.is_inference_mode_enabled())
        return is_usual and not (is_in_backward() or saves_are_hooked())

    def _run_only(self, generation: Generation, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the only generation, without computing the call's signature; where its guards fail, the call is eager."""
        code = generation.code
        if code is None:  # another thread has just given it up
            return self.eager(target, *args, **kwargs)
        try:
            outputs, is_compiled = code.run_and_see(target, args, kwargs)
        except GuardError:
            self._only, self._is_only = None, False
        except Exception as error:
            if not is_of_compiled_code(error):
                raise
            cause = error
        else:
            if not is_compiled:
                self._only, self._is_only = None, False
            return outputs
        if not self._is_only:
            return self.eager(target, *args, **kwargs)
        return self._run_instead(generation, cause, Call(target, args, kwargs))

    def _note_run(self, generation: Generation) -> None:
        """Note that it has run a call: if it is the only generation, later calls skip the search."""
        is_only = self._is_only and len(self._generations.all()) == 1 and generation.num_unserved == 0
        waits = self._host.is_waiting or self._host.settings.fullgraph or self._host.verify == "always"
        if is_only and not waits and generation.agreement is None and self._pid == os.getpid():
            self._only = generation

    def _run(self, generation: Generation, call: Call) -> Any:
        code = generation.code
        if code is None:  # another thread has just given it up
            return self.eager(call.target, *call.args, **call.kwargs)
        agreement = generation.agreement
        before = 0 if agreement is None else agreement.position()
        try:
            return self._run_code(generation, code, call)
        except Exception as error:
            if not is_of_compiled_code(error):
                raise
            if agreement is not None and agreement.position() != before:
                raise  # other ranks have taken its collectives for this call's, and would not issue them again
            cause = error
        return self._run_instead(generation, cause, call)

    def _run_instead(self, generation: Generation, error: Exception, call: Call) -> Any:
        """Run eagerly what compiled code raised in. If eager raises too, that is the program's own error."""
        outputs = self.eager(call.target, *call.args, **call.kwargs)
        with generation.lock:
            if generation.stage == "swapped":
                self._life.reject(generation, f"compiled code raised {type(error).__name__}: {error}", "running")
        return outputs

    def _run_code(self, generation: Generation, code: FromArtifact | FromCaches, call: Call) -> Any:
        if isinstance(code, FromArtifact):
            return self._run_artifact(generation, code, call)
        if not generation.is_traced:
            generation.is_traced = True
            return self._trace(generation, code, call)
        if not generation.has_own_guards:  # another thread traces it just now
            return self.eager(call.target, *call.args, **call.kwargs)
        outputs, is_compiled = code.run_and_see(call.target, call.args, call.kwargs)
        if code.is_counting:
            self._note_run(generation) if is_compiled else self._note_stale(generation, call)
        return outputs

    def _trace(self, generation: Generation, code: FromCaches, call: Call) -> Any:
        """The first real call, which traces if nothing was verified before."""
        try:
            outputs = code.trace(call.target, *call.args, **call.kwargs)
            with generation.lock:
                if code.misses and generation.stage == "swapped":
                    self._life.miss_when_traced(generation, code, call)
        finally:
            generation.first_run.set()
        return outputs

    def _run_artifact(self, generation: Generation, code: FromArtifact, call: Call) -> Any:
        try:
            outputs = code.run(call.target, *call.args, **call.kwargs)
        except GuardError:
            self._note_stale(generation, call)
        else:
            self._note_run(generation)
            return outputs
        return self.eager(call.target, *call.args, **call.kwargs)

    def _note_stale(self, generation: Generation, call: Call) -> None:
        """Note that guards failed and the call ran eagerly: the next one like it finds another generation, or opens one.

        The program's state has changed since the compile, or the sizes are not those that the code is for. If the guards held
        before the call, the program has changed its state during the call, and would do so again.
        """
        with self._lock:
            if generation.stage != "swapped" or not self._generations.contest(call):
                return
            generation.num_unserved += 1
            if generation.num_unserved >= MAX_UNSERVED:
                why = f"{MAX_UNSERVED} calls changed the state of the program that it was compiled for while they ran"
                self._life.retire(generation, why)

    def _misfit(self, call: Call) -> None:
        family = self._generations.families[call.family]
        family.num_misfits += 1
        if family.is_static:
            family.give_up()
        self._decide("static", "the code for dynamic shapes does not serve these sizes (its guards failed)")

    def _decide(self, choice: str, reason: str) -> None:
        self._host.report.decide("compile", self.part.name, choice, reason)


def _are_plain(values: Iterable[Any], depth: int = 2) -> bool:
    for value in values:
        kind = type(value)
        if kind not in _PLAIN and not (depth and (kind is list or kind is tuple) and _are_plain(value, depth - 1)):
            return False
    return True
