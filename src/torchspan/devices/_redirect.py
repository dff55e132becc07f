"""Redirection: where requests for a device that is not here go, at run time; cheap for each call, and recorded by call site."""

from __future__ import annotations

import gc
import multiprocessing
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchspan.core.errors import UnsupportedError
from torchspan.core.report import Report, Tally, user_site
from torchspan.core.topics import Standing, Topic
from torchspan.devices._callers import Callers, asked_by_torch
from torchspan.devices._memories import DEVICE, HOST, PLAIN, UNKNOWN, Answers, Memory, mark, memory_of, memory_of_storage
from torchspan.devices._policy import ACCELERATORS, FOLLOWED, KEEP_CPU, DeviceRequest, choose
from torchspan.environment.facts import Facts

_SHARED = "; one device stands in for"

in_force: Redirection | None = None
"""The Redirection whose patches are in force; a function that outlives them finds None here and does what torch does."""

comptime: Any = None
"""dynamo's way to call a function while it reads a program; known when dynamo is imported."""

_DEVICE = torch.device
_DEVICE_OF = torch._C.TensorBase.device.__get__
NARROW = {torch.float64: torch.float32, torch.complex128: torch.complex64}
_CPU = torch.device("cpu")
_num_modes = torch._C._len_torch_function_stack


class PlacementWarning(UserWarning):
    """A program uses several devices, and one stands in for all; issued once, at the first line that does so."""


class Redirection:
    """Gives each request the device that the policy chooses, remembers which tensors it placed, and counts by call site."""

    def __init__(self, facts: Facts, mode: str, report: Report, *, masquerade: bool = False) -> None:
        self.facts = facts
        self.mode = mode
        self.report = report
        self.knows_keep_cpu = mode == "torchdevice"
        self.is_cuda_default = False
        self.choice = choose(facts, DeviceRequest("cuda"), mode)
        self.target = self.choice.device
        self.target_kind = self.target.partition(":")[0]
        self.has_target_module = self.target not in ("cpu", "cuda")
        self.lacks_float64 = not facts.computes_in_float64(self.target)
        self.follows = mode == FOLLOWED and self.target == "cpu"
        self.masquerade = masquerade or self.follows
        self.generator: Any = torch.default_generator  # of draws on the device, where nothing gives them one of their own
        self.generators: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # on the device, by address
        self.kinds = tuple(
            kind for kind in (*ACCELERATORS, "cpu") if choose(facts, DeviceRequest(kind), mode).device.partition(":")[0] != kind
        )
        self.originals: dict[int, Any] = {}
        self._devices: dict[object, torch.device | None] = {}
        self._tallies: dict[tuple[int, int, str, object], Tally] = {}
        self._callers = Callers()
        self._has_warned = False
        self._has_said_copied = False
        self.in_use = False
        self.answers = Answers()
        self._asking = _Asking()
        self._quiet = _Depth()
        self._keeping_cpu = _Depth()

    # which device

    def lookup(self, device: object) -> torch.device | None:
        """The device that a request for `device` goes to instead, or None where it is left as it is.

        `device` is anything that torch takes for one; what torch would refuse is left to torch to refuse.
        """
        kind = type(device)
        if kind is str or kind is _DEVICE:
            try:
                return self._devices[device]
            except KeyError:
                target = self._resolve(device)
                if "cpu" not in self.kinds:  # else it depends on the scope
                    self._devices[device] = target
                return target
        if kind is int:
            return self._resolve(device)
        return None

    def _resolve(self, device: Any) -> torch.device | None:
        request = self._request(device)
        if request is None or (request.kind == "cpu" and self._keeping_cpu.depth):
            return None
        if request.index == -1:
            return torch.device("cpu")
        choice = choose(self.facts, request, self.mode)
        reason = choice.reason if not choice.is_possible else self._out_of_range(request)
        if reason:
            raise self._invalid_ordinal(request, reason)
        if request.kind not in self.kinds:
            return None
        if request.kind in ACCELERATORS:
            self.begin_use()
        return torch.device(choice.device)

    def _request(self, device: Any) -> DeviceRequest | None:
        """What `device` asks for; None for what torch will say is wrong."""
        if isinstance(device, int):
            return DeviceRequest("cuda", device) if device >= 0 else None
        if device == KEEP_CPU and self.knows_keep_cpu:
            return DeviceRequest("cpu", -1)
        try:
            request = torch.device(device)
        except RuntimeError:
            return None
        return DeviceRequest(request.type, request.index)

    def num_devices(self) -> int:
        """How many devices the program is told of: those of the target, or as many as a launcher started ranks for here."""
        return max(1, self.facts.num_devices(self.target), int(os.environ.get("LOCAL_WORLD_SIZE") or 1))

    def _out_of_range(self, request: DeviceRequest) -> str:
        """Why there is no such index, "" where there is: a process that a program started has a device of its own."""
        is_told = self.mode in ("auto", "torchdevice", FOLLOWED) and request.kind in self.kinds and request.kind in ACCELERATORS
        if not is_told or (request.index or 0) < self.num_devices() or multiprocessing.parent_process() is not None:
            return ""
        return (
            f"torch.{request.kind}.device_count() is {self.num_devices()}; device='cpu' (torchspan run --device cpu) takes "
            "every index, and a process for each device (torchrun) has its own"
        )

    def _invalid_ordinal(self, request: DeviceRequest, reason: str) -> RuntimeError:
        """The error that CUDA gives for an index that is not there, in torch's words and of torch's type."""
        site = user_site()
        self.report.decide(Topic.DEVICE, f"the device {request}", "refused", reason, site, Standing.UNSUPPORTED)
        kind: Callable[[str], RuntimeError] = getattr(torch, "AcceleratorError", RuntimeError)
        return kind(f"CUDA error: invalid device ordinal ({site}: {request}: {reason})")

    def index(self, device: object = None, *, is_optional: bool = True) -> int:
        """The index that `device` names, that of the current one where it names none.

        Raises:
            RuntimeError: torch's, for an index that is not there.
            ValueError: torch's, for what is not a device of this kind, or has no index although it is not `is_optional`.
        """
        if device is None:
            return torch.cuda.current_device()
        if isinstance(device, str):
            device = torch.device(device)
        if self.knows_keep_cpu and isinstance(device, torch.device) and device.type == self.target_kind:
            return torch.cuda.current_device()  # such a program's label is of the device that it was given
        if isinstance(device, torch.device) and device.type in self.kinds and device.type in ACCELERATORS:
            self.lookup(device)
            if device.index is not None or is_optional:
                return torch.cuda.current_device() if device.index is None else device.index
        if type(device) is not int:
            return int(torch.cuda._utils._get_device_index(device, optional=is_optional))
        self.lookup(device)
        return device

    def is_placed(self, generator: Any) -> bool:
        """Whether a generator, or what torch wraps anew around it, was asked for on the device."""
        return generator._cdata in self.generators

    # which memory, where one stands in for the device's and the host's

    def begin_use(self) -> None:
        """The program asks for the device: tensors that exist already lie in the host's memory, and moves copy from now on."""
        if self.in_use or self.target != "cpu":
            return
        self.in_use = True
        for thing in () if torch.compiler.is_compiling() else gc.get_objects():
            if type(thing) in PLAIN and _DEVICE_OF(thing) == _CPU:
                mark(thing, HOST)

    def memory_asked(self, request: object, is_programs: bool | None = None, depth: int = 2) -> Memory | None:
        """The memory that a `request` for a device or a tensor means; None for one that is neither of the two.

        Only the program names the CPU and means it (`is_programs`; by default, whether its code is what called the wrapper, at
        that `depth`): torch's code, and what its compilers generate, names it for the device as well.
        """
        if type(request) is _DEVICE:
            answered = self.answers.memories.get(id(request))
            if answered is not None:
                return answered
        elif isinstance(request, torch.Tensor):
            return memory_of(request) if _DEVICE_OF(request) == _CPU else None
        if is_cpu(request):
            if request == KEEP_CPU:
                return HOST
            if is_programs is None:
                frame = sys._getframe(depth)
                known = self._callers.known.get(id(frame.f_code))
                is_programs = (known is not None and not known[0]) or self._callers.is_programs(frame)
            return HOST if is_programs else self._asking.memory
        return DEVICE if self.lookup(request) is not None else None

    @contextmanager
    def asking(self, memory: Memory | None) -> Iterator[None]:
        """Inside, in this thread, torch's own requests for the CPU mean `memory`, which the program asked for."""
        before, self._asking.memory = self._asking.memory, memory or UNKNOWN
        try:
            yield
        finally:
            self._asking.memory = before

    def default_memory(self) -> Memory | None:
        """The memory of tensors that are made without a device."""
        mode = self._default_context() if _num_modes() else None
        if mode is not None:
            memory: Memory | None = getattr(mode, "_torchspan_memory", UNKNOWN)
            return memory
        return DEVICE if self.is_cuda_default else HOST

    @staticmethod
    def _default_context() -> Any:
        """The ``with torch.device(…)`` or ``torch.set_default_device`` that is in force in this thread."""
        for mode in reversed(torch.overrides._get_current_function_mode_stack()):
            if isinstance(mode, torch.utils._device.DeviceContext):
                return mode
        return None

    def answer(self, tensor: Any, truth: torch.device) -> torch.device:
        """What a tensor or storage on `truth` answers as its device: the object equal to `truth` that stands for its memory."""
        memory = memory_of(tensor) if isinstance(tensor, torch.Tensor) else memory_of_storage(tensor)
        return self.answers.of(truth, memory) if truth == _CPU else truth

    def say_result_copied(self) -> None:
        """Record, once, that moving a result copies it: the memory of results is not followed."""
        if self._has_said_copied:
            return
        self._has_said_copied = True
        reason = "what an operator computes is not followed: it may lie in the other memory, and then a move is a copy"
        self.report.decide(Topic.DEVICE, "moves of results", "copies", reason, user_site())

    def may_be_placed(self, tensor: Any) -> bool:
        """Whether the program may believe this tensor to be on the device."""
        return self.in_use and _DEVICE_OF(tensor).type == "cpu" and not self._is_on_host(memory_of(tensor))

    def _is_on_host(self, memory: Memory) -> bool:
        """Whether a masqueraded program is told that it lies on the host: so is UNKNOWN where every operator is followed."""
        return memory is HOST or (memory is UNKNOWN and self.follows)

    def believed(self, holder: Any) -> torch.device | None:
        """The device that a masqueraded program believes a tensor or storage to be on; None where it is told the real one."""
        is_tensor = isinstance(holder, torch.Tensor)
        if is_tensor and _DEVICE_OF(holder).type != self.target_kind:
            return None
        memory = memory_of(holder) if is_tensor else memory_of_storage(holder)
        if self.target == "cpu" and (not self.in_use or self._is_on_host(memory)):
            return None
        return self.ordinal() if memory is DEVICE else self.answers.of(self.ordinal(), UNKNOWN)

    def asked_default(self) -> torch.device | None:
        """The default device that the program asked for, if it was redirected."""
        mode = self._default_context()
        if mode is not None:
            device: torch.device | None = getattr(mode, "_torchspan_asked", None)
            return device
        return self.ordinal() if self.is_cuda_default else None

    def ordinal(self) -> torch.device:
        """The program's current device."""
        return torch.device("cuda", torch.cuda.current_device())

    # who asks, and what is recorded

    def note(
        self,
        name: str,
        asked: object = None,
        reason: str | None = None,
        choice: str | None = None,
        standing: Standing = Standing.REDIRECTED,
        depth: int = 2,
    ) -> None:
        """Count one redirection of ``name(device=asked)`` at the line of the program that asked for it.

        A plain `reason` is the policy's; `choice` is the target device. The program is looked for from `depth` frames on.
        """
        if self._quiet.depth:
            return
        frame = sys._getframe(depth)
        code = frame.f_code
        known = self._callers.known.get(id(code))
        is_foreign = self._callers.is_torchs(frame) if known is None else known[0]
        while is_foreign and frame.f_back is not None:
            frame = frame.f_back
            is_foreign = self._callers.is_torchs(frame)
            code = frame.f_code
        key = (id(code), frame.f_lasti, name, asked)
        tally = self._tallies.get(key)
        if tally is None:
            site = f"{code.co_filename}:{frame.f_lineno}" if not is_foreign else user_site()
            tally = self._tallies[key] = self._tally(site, name, asked, reason, choice, standing)
        tally.count += 1

    def note_at(self, site: str, name: str, asked: object) -> None:
        """Count one redirection at the given line."""
        self._tally(site, name, asked, None, None, Standing.REDIRECTED).count += 1

    def _tally(
        self, site: str | None, name: str, asked: object, reason: str | None, choice: str | None, standing: Standing
    ) -> Tally:
        subject = name if asked is None else f"{name}(device={str(asked)!r})"
        request = None if asked is None or reason else self._request(asked)
        if request is not None:
            chosen = choose(self.facts, request, self.mode)
            choice, reason = choice or chosen.device, chosen.reason
            reason += self._shared(request)
        if self.mode == "strict":
            otherwise = "" if standing is Standing.REDIRECTED else f"else {standing}, as "
            raise UnsupportedError(
                f"{site}: {subject}: {otherwise}{reason or self.choice.reason}; device='strict' redirects nothing: take the "
                "device from torch.accelerator.current_accelerator(), or run with device='auto'"
            )
        if reason and _SHARED in reason:
            self._warn_once(f"{subject}: {reason}", site)
        return self.report.tally(Topic.DEVICE, subject, choice or self.target, reason or self.choice.reason, site, standing)

    def _shared(self, request: DeviceRequest) -> str:
        """What to add to the reason where the program asks for one of several devices, and one stands in for all."""
        index = request.index or 0
        is_launched = index < int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # then each rank has its own
        is_one = request.kind in ACCELERATORS and self.target_kind == "cpu"
        return f"{_SHARED} {request.kind}:0 to {request}" if index and is_one and not is_launched else ""

    def _warn_once(self, message: str, site: str | None) -> None:
        if self._has_warned:
            return
        self._has_warned = True
        file, _, line = (site or "?:0").rpartition(":")
        advice = "; run a process for each device (torchrun, torch.distributed) to have several"
        warnings.warn_explicit(f"{message}{advice}", PlacementWarning, file, int(line))

    def narrowed(self, name: str, dtype: Any) -> Any:
        """The type that a tensor of `dtype` has on the target: where it has no double precision, single takes its place."""
        narrow = NARROW.get(dtype) if self.lacks_float64 else None
        if narrow is None:
            return dtype
        depth, self._quiet.depth = self._quiet.depth, 0  # a module that is moved is one entry; what it loses is another
        try:
            self.note(f"{name}({dtype})", None, f"{self.target.upper()} has no double precision", str(narrow))
        finally:
            self._quiet.depth = depth
        return narrow

    def is_on_target(self, tensor: Any) -> bool:
        """Whether a tensor is on the accelerator that stands in for CUDA."""
        return isinstance(tensor, torch.Tensor) and _DEVICE_OF(tensor).type == self.target_kind

    def waits_for_copy(self, name: str, source: Any, to: Any) -> bool:
        """Whether a copy between the host and another accelerator has to be waited for, although the program would not.

        CUDA keeps pinned memory until a copy from it is done, and waits where memory is not pinned; another accelerator may
        read a source that is gone. `source` and `to` are devices.
        """
        kinds = {torch.device(source).type, torch.device(to).type}
        is_between = self.has_target_module and kinds == {"cpu", self.target_kind}
        if is_between:
            self.note(f"{name}(non_blocking=True)", None, "its source may be gone before the copy is done", "waits")
        return is_between

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Count nothing in this thread inside the block: what is done there has been counted as a whole."""
        self._quiet.depth += 1
        try:
            yield
        finally:
            self._quiet.depth -= 1

    @contextmanager
    def keeping_cpu(self) -> Iterator[None]:
        """In this thread, inside the block, what asks for the CPU is given the CPU, whatever the mode says."""
        self._keeping_cpu.depth += 1
        try:
            yield
        finally:
            self._keeping_cpu.depth -= 1

    def keep_cpu(self, is_kept: bool) -> None:
        """Begin `keeping_cpu` in this thread, or end it."""
        self._keeping_cpu.depth = max(0, self._keeping_cpu.depth + (1 if is_kept else -1))

    def leave_out(self, name: str, choice: str, reason: str | None = None, asked: object = None) -> None:
        """Count one request that has no counterpart here and is left out."""
        self.note(name, asked, reason, choice, Standing.LEFT_OUT)

    def simulate(self, name: str, what: str) -> None:
        """Count one use of `name`; `what` says which part of it works here."""
        self.note(name, None, what, "simulated", Standing.SIMULATED)

    def simulate_for_program(self, name: str, what: str) -> None:
        """The same, unless torch's own code uses it."""
        if not asked_by_torch():
            self.simulate(name, what)


class _Depth(threading.local):
    depth = 0


class _Asking(threading.local):
    memory = UNKNOWN


def is_cpu(device: object) -> bool:
    """Whether a request, a name or a ``torch.device``, is for the CPU."""
    if type(device) is _DEVICE:
        return device == _CPU or device.type == "cpu"
    return isinstance(device, str) and (device == "cpu" or device.startswith("cpu:"))
