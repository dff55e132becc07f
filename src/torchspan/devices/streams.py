"""Streams and events: an accelerator's own where one stands in for CUDA.

With a CPU alone, work is done when it is asked for, so order holds by itself; events measure real time.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from torchspan.devices import _target_streams
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Replacement

MODULE = "torch.cuda.streams"
WHAT = "work is done when it is asked for, in that order"


class Stream(_target_streams.AnyStream):
    """A stand-in for ``torch.cuda.Stream``, which it says it is an instance of."""

    _numbers = itertools.count(1)

    def __init__(
        self,
        device: torch.device | None = None,
        priority: int = 0,
        stream_id: int | None = None,
        *,
        device_index: int = 0,
        device_type: int = 1,
    ) -> None:
        self.device = torch.device("cuda", device_index) if device is None else device
        self.priority = max(-5, min(0, priority))
        self.stream_id = next(self._numbers) if stream_id is None else stream_id

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.cuda.Stream

    @property
    def cuda_stream(self) -> int:
        """A number of its own; 0 for the default stream."""
        return self.stream_id

    @property
    def device_index(self) -> int:
        """The index of its device."""
        return self.device.index or 0

    @property
    def device_type(self) -> int:
        """CUDA's number among the device types."""
        return 1

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The least and the greatest priority that a stream can have."""
        return (0, -5)

    def query(self) -> bool:
        """Whether its work is done: it is."""
        return True

    def synchronize(self) -> None:
        """Its work is done."""

    def wait_event(self, event: Any) -> None:
        """What the event stands for is done."""

    def wait_stream(self, stream: Any) -> None:
        """What the other stream was asked for is done."""

    @property
    def native_handle(self) -> int:
        """The number of the stream, in place of a pointer."""
        return self.cuda_stream

    def __enter__(self) -> Stream:
        _current.stack.append(self)
        return self

    def __exit__(self, *exc_info: object) -> None:
        _current.stack.pop()

    def __eq__(self, other: object) -> bool:
        return (
            type(other) is type(self) and (self.device, self.stream_id) == (other.device, other.stream_id)  # type: ignore[attr-defined]
        )

    def __hash__(self) -> int:
        return hash((self.device, self.stream_id))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} cuda_stream={self.cuda_stream:#x} simulated>"


class Event:
    """A stand-in for ``torch.cuda.Event``, which it says it is an instance of; it measures wall time."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: Any) -> None:
        self.enable_timing = enable_timing
        self.blocking = blocking
        self.interprocess = interprocess
        self.device = torch.device("cuda", 0)
        self.recorded_ns: int | None = None

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.cuda.Event

    @property
    def cuda_event(self) -> int:
        """0 until it is recorded, as for CUDA."""
        return 0 if self.recorded_ns is None else id(self)

    @property
    def event_id(self) -> int:
        """The same number."""
        return self.cuda_event

    def record(self, stream: Any = None) -> None:
        """Remember this moment."""
        self.recorded_ns = time.perf_counter_ns()

    def wait(self, stream: Any = None) -> None:
        """What it stands for is done."""

    def query(self) -> bool:
        """Whether what it stands for is done: it is."""
        return True

    def synchronize(self) -> None:
        """What it stands for is done."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to `end_event`.

        Raises:
            ValueError: one of them was made without ``enable_timing``.
            RuntimeError: one of them was not recorded.
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.recorded_ns is None or end_event.recorded_ns is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return float(end_event.recorded_ns - self.recorded_ns) / 1e6

    def ipc_handle(self) -> bytes:
        """There is none: raises."""
        raise RuntimeError("an event of a device that torchspan stands in for has no handle for other processes")

    def __repr__(self) -> str:
        return "<torch.cuda.Event simulated>"


class _Current(threading.local):
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.default = Stream(torch.device("cuda", 0), stream_id=0)


_current = _Current()


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The classes keep their identity and make stand-ins; the functions know which one is current."""
    new = {"Stream": _new_stream, "ExternalStream": _new_external, "Event": _new_event}
    for name, build in new.items():
        yield Replacement("streams", MODULE, f"{name}.__new__", partial(build, redirection))
    yield Replacement("streams", MODULE, "Event.from_ipc_handle", lambda old: staticmethod(_from_ipc_handle))
    yield Replacement("streams", MODULE, "Stream.priority_range", _priority_range, create=True)
    for name, kind in {"Stream": Stream, "Event": Event}.items():
        yield Replacement("streams", "torch", name, partial(_generic, redirection, kind), follow=True)
    context = {"__init__": _context_init, "__enter__": _context_enter, "__exit__": _context_exit}
    if redirection.has_target_module:
        context |= {"__enter__": _target_streams.enter, "__exit__": lambda self, *exc_info: _target_streams.leave(self)}
    for name, function in context.items():
        yield Replacement("streams", "torch.cuda", f"StreamContext.{name}", partial(_given, function))
    yield from stand_ins("streams", "torch.cuda", _functions(redirection))
    if redirection.has_target_module:
        yield from stand_ins("streams", "torch.cuda", _target_streams.functions(redirection))
    yield Replacement("streams", "torch", "Tensor.record_stream", partial(_record_stream, redirection), follow=True)


def _given(function: Any, old: object) -> Any:
    return function


def _new_stream(redirection: Redirection, old: object) -> staticmethod[..., Any]:
    def new(cls: type, device: Any = None, priority: int = 0, **kwargs: Any) -> Any:
        if redirection.has_target_module:
            return _target_streams.new_stream(redirection, device, priority, **kwargs)
        redirection.simulate("torch.cuda.Stream()", WHAT)
        return Stream(torch.device("cuda", redirection.index(device)), priority, kwargs.get("stream_id"))

    return staticmethod(new)


def _new_external(redirection: Redirection, old: object) -> staticmethod[..., Stream]:
    def new(cls: type, stream_ptr: int, device: Any = None, **kwargs: Any) -> Stream:
        redirection.simulate("torch.cuda.ExternalStream()", WHAT)
        return Stream(torch.device("cuda", redirection.index(device)), 0, stream_ptr)

    return staticmethod(new)


def _new_event(redirection: Redirection, old: object) -> staticmethod[..., Any]:
    def new(cls: type, *args: Any, **kwargs: Any) -> Any:
        if redirection.has_target_module:
            redirection.note("torch.cuda.Event()")
            return _target_streams.TargetEvent(redirection.target_kind, *args, **kwargs)
        redirection.simulate("torch.cuda.Event()", "it measures wall time; " + WHAT)
        return Event(*args, **kwargs)

    return staticmethod(new)


def _priority_range(old: object) -> staticmethod[..., tuple[int, int]]:
    return staticmethod(Stream.priority_range)


def _generic(redirection: Redirection, kind: type[Stream | Event], real: Any) -> type:
    """``torch.Stream`` or ``torch.Event``: for a device that is not here, or for none, a stand-in of this `kind`.

    Streams and events of every kind are instances of it, and the classes of ``torch.cuda`` are subclasses, as in a CUDA build.
    """
    own = getattr(torch.cuda, real.__name__)
    is_simulated = redirection.target_kind == "cpu"

    class Meta(type(real)):  # type: ignore[misc]
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, (real, kind))

        def __subclasscheck__(cls, subclass: type) -> bool:
            return issubclass(subclass, (real, kind, own))

    class Generic(real, metaclass=Meta):
        __doc__ = real.__doc__

        def __new__(cls, device: Any = None, *args: Any, **kwargs: Any) -> Any:
            is_named = device is not None and not isinstance(device, int)
            if redirection.lookup(device) is None if is_named else not is_simulated:
                return real(device, *args, **kwargs) if device is not None else real(*args, **kwargs)
            if redirection.has_target_module:
                redirection.note(f"torch.{real.__name__}", device)
                return real(redirection.lookup(device), *args, **kwargs)
            redirection.simulate(f"torch.{real.__name__}()", WHAT)
            if kind is Event:
                return Event(*args, **kwargs)
            stream_device = torch.device(device) if is_named else torch.device("cuda", redirection.index(device))
            if stream_device.index is None:
                stream_device = torch.device(stream_device.type, torch.cuda.current_device())
            return Stream(stream_device, *args, **kwargs)

    Generic.__module__, Generic.__name__, Generic.__qualname__ = "torch", real.__name__, real.__qualname__
    return Generic


def _from_ipc_handle(device: Any, handle: Any) -> Event:
    raise RuntimeError("a device that torchspan stands in for has no events of other processes")


def _context_init(self: Any, stream: Any) -> None:
    self.stream = stream
    self.idx = 0


def _context_enter(self: Any) -> None:
    _current.stack.append(current_stream() if self.stream is None else self.stream)


def _context_exit(self: Any, type: Any, value: Any, traceback: Any) -> None:
    _current.stack.pop()


def current_stream(device: Any = None) -> Any:
    """The stream that the program made current in this thread, or the default one."""
    return _current.stack[-1] if _current.stack else _current.default


def _functions(redirection: Redirection) -> dict[str, Function]:
    def checked_current_stream(device: Any = None) -> Any:
        if device is not None:
            redirection.index(device)
        return current_stream()

    def default_stream(device: Any = None) -> Any:
        redirection.index(device)
        return _current.default

    def set_stream(stream: Any) -> None:
        if stream is not None:
            _current.stack[-1:] = [stream]

    def get_stream_from_external(data_ptr: int, device: Any = None) -> Stream:
        return Stream(torch.device("cuda", redirection.index(device)), 0, data_ptr)

    return {
        "current_stream": checked_current_stream,
        "default_stream": default_stream,
        "set_stream": set_stream,
        "get_stream_from_external": get_stream_from_external,
    }


def _record_stream(redirection: Redirection, old: Function) -> Function:
    def record_stream(self: Any, s: Any) -> None:
        """With a CPU alone there is nothing to record: memory is given back when its tensor dies."""
        if redirection.has_target_module and self.device.type != "cpu":
            try:
                old(self, s)
            except NotImplementedError:  # MPS has one stream, and older torch no kernel for this there
                redirection.leave_out("Tensor.record_stream()", "not recorded", "this accelerator has no kernel for it")
            else:
                redirection.note("Tensor.record_stream()")
            return
        redirection.simulate("Tensor.record_stream()", "memory is given back when its tensor dies")

    redirection.originals[id(record_stream)] = old
    return record_stream
