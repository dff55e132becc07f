"""Streams and events where another accelerator stands in for CUDA: its own, under the names that a program for CUDA knows.

A stream is a ``torch.Stream`` of the accelerator, so torch takes it for one. A kind that has one stream only, as MPS, gives
that one for each that is asked for: what a program puts into several is then done in one order.
"""

from __future__ import annotations

from typing import Any

import torch

from torchspan.devices._redirect import Redirection
from torchspan.devices._target import Target
from torchspan.devices._wrap import Function

_REAL_STREAM: Any = torch._C.Stream
_first: dict[torch.device, Any] = {}


class AnyStream:
    """What every stream that stands for one of CUDA's does alike."""

    def record_event(self, event: Any = None) -> Any:
        """Record `event`, or a new one, in this stream."""
        event = torch.cuda.Event() if event is None else event
        event.record(self)
        return event

    def is_capturing(self) -> bool:
        """Whether a graph is being captured: there is one order of work for all streams."""
        return bool(torch.cuda.is_current_stream_capturing())


class TargetStream(AnyStream, _REAL_STREAM):
    """A stream of the accelerator, which says that it is an instance of ``torch.cuda.Stream``."""

    priority = 0

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.cuda.Stream

    @property
    def cuda_stream(self) -> int:
        """The number of the stream."""
        return int(self.stream_id)

    def wait_event(self, event: Any) -> None:
        """Do nothing more before `event` is reached."""
        event.wait(self)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The least and the greatest priority: it has one."""
        return (0, 0)

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device={self.device} stream_id={self.stream_id:#x}>"


class TargetEvent:
    """An event of the accelerator, which says that it is an instance of ``torch.cuda.Event``."""

    def __init__(self, kind: str, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.is_of_mps = kind == "mps"
        self.enable_timing = enable_timing
        self.is_recorded = False
        if self.is_of_mps:
            self.inner: Any = torch.mps.Event(enable_timing=enable_timing)
        else:
            self.inner = torch._C.Event(kind, enable_timing=enable_timing, blocking=blocking, interprocess=interprocess)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.cuda.Event

    @property
    def device(self) -> torch.device:
        """The device that it was recorded on."""
        return torch.device("mps") if self.is_of_mps else self.inner.device

    @property
    def cuda_event(self) -> int:
        """0 until it is recorded."""
        return id(self.inner) if self.is_recorded else 0

    event_id = cuda_event

    def record(self, stream: Any = None) -> None:
        """Record it in `stream`, or in the current one."""
        self.is_recorded = True
        self.inner.record(*(() if stream is None or self.is_of_mps else (stream,)))

    def wait(self, stream: Any = None) -> None:
        """Let `stream`, or the current one, do nothing more before it is reached."""
        if self.is_recorded:
            self.inner.wait(*(() if stream is None or self.is_of_mps else (stream,)))

    def query(self) -> bool:
        """Whether what was asked of the device before it is done."""
        return not self.is_recorded or bool(self.inner.query())

    def synchronize(self) -> None:
        """Wait until it is."""
        if self.is_recorded:
            self.inner.synchronize()

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this event to `end_event`, as the device says.

        Raises:
            ValueError: one of them was made without ``enable_timing``, or was not recorded.
        """
        if not (self.enable_timing and end_event.enable_timing):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if not (self.is_recorded and end_event.is_recorded):
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        return float(self.inner.elapsed_time(end_event.inner))

    def ipc_handle(self) -> bytes:
        """There is none: raises."""
        raise RuntimeError("an event of a device that stands in for CUDA has no handle for other processes")


def as_cuda(stream: Any) -> Any:
    """A stream of the accelerator, as one that a program for CUDA knows."""
    if isinstance(stream, TargetStream):
        return stream
    return TargetStream(stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type)


def new_stream(redirection: Redirection, device: Any = None, priority: int = 0, **kwargs: Any) -> Any:
    """What ``torch.cuda.Stream(device, priority)`` gives."""
    target = Target(redirection)
    index = redirection.index(device)
    if "stream_id" in kwargs:
        return TargetStream(**kwargs)
    try:
        stream: Any = TargetStream(device=target.device(index), priority=priority)
    except RuntimeError as cause:
        redirection.simulate("torch.cuda.Stream()", f"the one stream of {target.kind}: {str(cause).splitlines()[0]}")
        return current_stream(target, index)
    target.note("Stream", f"torch.Stream({target.kind!r})")
    stream.priority = priority
    return stream


def _current(device: Any) -> Any:
    """The stream that is current on a device in this thread; the first that is seen there is the default one."""
    stream = torch.accelerator.current_stream(device)
    _first.setdefault(stream.device, stream)
    return stream


def current_stream(target: Target, index: int) -> Any:
    """The stream of the accelerator that is current in this thread."""
    return as_cuda(_current(target.device(index)))


def functions(redirection: Redirection) -> dict[str, Function]:
    """The functions of ``torch.cuda``, of the target."""
    target = Target(redirection)

    def current_stream_(device: Any = None) -> Any:
        return current_stream(target, redirection.index(device))

    def default_stream(device: Any = None) -> Any:
        return as_cuda(_first[_current(target.device(redirection.index(device))).device])

    def set_stream(stream: Any) -> None:
        if stream is not None:
            _current(stream.device)
            torch.accelerator.set_stream(stream)

    return {"current_stream": current_stream_, "default_stream": default_stream, "set_stream": set_stream}


def enter(context: Any) -> None:
    """``with torch.cuda.stream(s)``: that stream is current, on its device."""
    if context.stream is None:
        context.idx = None
        return
    context.idx = (_current(context.stream.device), _current(None))
    torch.accelerator.set_stream(context.stream)


def leave(context: Any) -> None:
    """... and what was current before is again."""
    for stream in context.idx or ():  # that of its device, then that of the device that was current, which is so again
        torch.accelerator.set_stream(stream)
