"""Collectives of tensors on an accelerator that no backend of torch.distributed serves: through the CPU and back, by gloo.

It is a backend like another, so DDP, functional collectives and DTensor find it. Tensors of the CPU go to gloo as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

NAME = "torchspan_staged"
_C10D: Any = torch._C._distributed_c10d
_SENDING, _RECEIVING = "send", ("recv", "recv_anysource")
_METHODS = (
    "allreduce",
    "allreduce_coalesced",
    "broadcast",
    "reduce",
    "allgather",
    "allgather_coalesced",
    "allgather_into_tensor_coalesced",
    "_allgather_base",
    "gather",
    "scatter",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_tensor_coalesced",
    "alltoall",
    "alltoall_base",
    _SENDING,
    *_RECEIVING,
    "barrier",
)
_NEWER = {
    "all_gather_single": "_allgather_base",
    "all_gather_single_coalesced": "allgather_into_tensor_coalesced",
    "reduce_scatter_single": "_reduce_scatter_base",
    "reduce_scatter_single_coalesced": "reduce_scatter_tensor_coalesced",
    "all_to_all_single": "alltoall_base",
}
"""What torch 2.13 and later ask of a group, by the names that a backend has for it."""


class StagedGroup(dist.ProcessGroup):
    """A process group around one of gloo; the first argument of a collective is what it writes, but for ``send``."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg, arg-type]
        self.inner = dist.ProcessGroupGloo(store, rank, size, timeout)
        self._name = self._desc = ""

    def getBackendName(self) -> str:
        """The name of the backend."""
        return NAME

    # torch 2.8 asks the backends of a group for its name, and this group is its own backend

    def setGroupName(self, name: str) -> None:
        """Be known by this name."""
        self._name = name

    def getGroupName(self) -> str:
        """The name that functional collectives and meshes know it by."""
        return self._name

    def setGroupDesc(self, desc: str) -> None:
        """Be described so."""
        self._desc = desc

    def getGroupDesc(self) -> str:
        """The description, for messages."""
        return self._desc

    def __repr__(self) -> str:
        return f"StagedGroup(rank={self.rank()}, size={self.size()})"


class _Received(dist.Work):
    """A receive into memory of the CPU; `wait` copies it to its place. Sends and receives go on meanwhile."""

    def __init__(self, work: Any, staged: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__()
        self._work = work
        self._staged = staged

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait until it is here, and copy it to its place."""
        done = bool(self._work.wait(timeout))
        _copy_back(self._staged)
        return done

    def is_completed(self) -> bool:
        """Whether `wait` would not take long."""
        return bool(self._work.is_completed())

    def _source_rank(self) -> int:
        return int(self._work._source_rank())


def _copy_back(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
    with torch.no_grad():
        for tensor, copy in pairs:
            tensor.copy_(copy)


def _method(name: str) -> Callable[..., Any]:
    def method(self: StagedGroup, *args: Any, **kwargs: Any) -> Any:
        staged: list[tuple[torch.Tensor, torch.Tensor]] = []
        arguments = [_on_cpu(value, staged) for value in args]
        work = getattr(self.inner, name)(*arguments, **kwargs)
        if not staged or name == _SENDING:
            return work
        if name in _RECEIVING:
            return _Received(work, staged)
        work.wait()
        written = _tensors(args[0])
        _copy_back((tensor, copy) for tensor, copy in staged if any(tensor is target for target in written))
        future: torch.futures.Future[Any] = torch.futures.Future()
        future.set_result(args[0])
        return _C10D._create_work_from_future(future)

    method.__name__ = name
    return method


for _called, _name in {**{name: name for name in _METHODS}, **_NEWER}.items():
    if hasattr(dist.ProcessGroupGloo, _name):
        setattr(StagedGroup, _called, _method(_name))


def _on_cpu(value: Any, staged: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
    if isinstance(value, torch.Tensor) and value.device.type != "cpu":
        staged.append((value, value.detach().cpu()))
        return staged[-1][1]
    return [_on_cpu(element, staged) for element in value] if isinstance(value, (list, tuple)) else value


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for element in value for tensor in _tensors(element)] if isinstance(value, (list, tuple)) else []


def register(kind: str) -> None:
    """Make the backend known to torch.distributed, once."""
    if not hasattr(dist.Backend, NAME.upper()):
        dist.Backend.register_backend(NAME, StagedGroup, devices=["cpu", kind])


def backend_of(kind: str) -> str:
    """The backend for tensors on this `kind` of device: its own where torch has one, else this.

    >>> backend_of("second")
    'torchspan_staged'
    """
    own = dist.Backend.default_device_backend_map.get(kind)
    return own if own is not None and own != "gloo" and dist.is_backend_available(own) else NAME
