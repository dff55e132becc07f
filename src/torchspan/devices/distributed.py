"""Distributed programs: NCCL becomes gloo, meshes and DDP go to the target.

Where that is another accelerator, NCCL becomes the accelerator's own backend, or one that takes its tensors through the CPU."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition, Replacement

C10D = "torch.distributed.distributed_c10d"
_POINT_TO_POINT = (12, 13, 14)  # c10d's numbers for send, recv and recv_anysource


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Process groups, meshes, and the wrappers that take device numbers."""
    for name in ("init_process_group", "new_group", "split_group", "new_subgroups", "new_subgroups_by_enumeration"):
        yield Redefinition("distributed", C10D, name, partial(_group, redirection, name))
    yield Redefinition("distributed", C10D, "barrier", partial(_barrier, redirection))
    yield Replacement("distributed", C10D, "Work.get_future", _get_future)
    mesh = partial(_mesh, redirection)
    yield Redefinition("distributed", "torch.distributed.device_mesh", "init_device_mesh", mesh)
    yield Replacement("distributed", "torch.distributed.device_mesh", "DeviceMesh.__init__", partial(_mesh_init, redirection))
    ddp = "DistributedDataParallel.__init__"
    yield Replacement("distributed", "torch.nn.parallel.distributed", ddp, partial(_ddp, redirection))
    fsdp = "torch.distributed.fsdp.fully_sharded_data_parallel"
    yield Replacement("distributed", fsdp, "FullyShardedDataParallel.__init__", partial(_fsdp, redirection))


def portable_backend(backend: object) -> object:
    """The backend with gloo in the place of NCCL, and no entries for CUDA.

    >>> portable_backend("nccl"), portable_backend("cpu:gloo,cuda:nccl"), portable_backend("mpi")
    ('gloo', 'gloo', 'mpi')
    """
    if not isinstance(backend, str) or "nccl" not in backend.lower():
        return backend
    named = dict(entry.partition(":")[::2] for entry in backend.lower().split(",") if ":" in entry)
    return named.get("cpu") or "gloo"


def _group(redirection: Redirection, name: str, old: Function) -> Function:
    def function(*args: Any, **kwargs: Any) -> Any:
        if name == "init_process_group" and args:
            args, kwargs = args[1:], {**kwargs, "backend": args[0]}
            kwargs = {**dict(zip(("init_method", "timeout", "world_size", "rank"), args)), **kwargs}
            args = ()
        backend = kwargs.get("backend")
        portable = portable_backend(backend)
        if redirection.has_target_module and (name == "init_process_group" or backend is not None):
            portable = _for_target(redirection, portable)
        if portable != backend:
            redirection.note(f"torch.distributed.{name}({backend!r})", None, _why(portable), str(portable))
            kwargs["backend"] = portable
            kwargs.pop("pg_options", None)  # they are NCCL's
        if redirection.lookup(kwargs.get("device_id")) is not None:
            redirection.leave_out(f"torch.distributed.{name}(device_id)", "no device", asked=kwargs["device_id"])
            kwargs["device_id"] = None
        return old(*args, **kwargs)

    return function


def _for_target(redirection: Redirection, backend: object) -> object:
    """A backend in the place of gloo, or of none, that takes tensors of the accelerator besides those of the CPU."""
    if backend not in (None, "gloo"):
        return backend
    from torchspan.devices import _staged_group

    kind = redirection.target_kind
    device_backend = _staged_group.backend_of(kind)
    if device_backend == _staged_group.NAME:
        _staged_group.register(kind)
        return device_backend
    return None if backend is None else f"cpu:gloo,{kind}:{device_backend}"  # without one, torch takes each device's own


def _why(backend: object) -> str:
    if backend == "torchspan_staged":
        return "no backend takes tensors of this accelerator: they go through the CPU, by gloo"
    return "NCCL is for CUDA devices"


def _barrier(redirection: Redirection, old: Function) -> Function:
    def barrier(group: Any = None, async_op: bool = False, device_ids: Any = None, **kwargs: Any) -> Any:
        if device_ids:
            redirection.leave_out("torch.distributed.barrier(device_ids)", "no devices", "gloo takes no devices")
        return old(group, async_op, **kwargs)

    return barrier


def _get_future(old: Any) -> Function:
    """NCCL has a future for every work; gloo has none for a reduce-scatter, in any torch up to 2.15.

    It has none for a send and a receive either, and those may be waited for once: they are left as they are.
    """

    @wraps(old)
    def get_future(self: Any) -> Any:
        try:
            return old(self)
        except RuntimeError as error:
            if "not implemented" not in str(error) or self._get_op_type() in _POINT_TO_POINT:
                raise
            return _future_of(self)

    return get_future


def _future_of(work: Any) -> Any:
    """A future that is done when the work is, or has its error. What the work wrote is not known here: its value is empty."""
    future: Any = torch.futures.Future()

    def wait() -> None:
        try:
            work.wait()
        except RuntimeError as error:
            future.set_exception(error)
        else:
            future.set_result([])

    threading.Thread(target=wait, name="torchspan-work", daemon=True).start()
    return future


def _mesh(redirection: Redirection, old: Function) -> Function:
    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        if device_type in redirection.kinds:
            redirection.note("init_device_mesh", device_type)
            device_type = redirection.target
        return old(device_type, *args, **kwargs)

    return init_device_mesh


def _mesh_init(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        if device_type in redirection.kinds:
            redirection.note("DeviceMesh", device_type)
            device_type = redirection.target
        old(self, device_type, *args, **kwargs)

    return init


def _ddp(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, module: Any, device_ids: Any = None, output_device: Any = None, *args: Any, **kwargs: Any) -> None:
        if device_ids is not None or output_device is not None:
            redirection.leave_out(f"DistributedDataParallel(device_ids={device_ids})", "device_ids=None")
        old(self, module, None, None, *args, **kwargs)

    return init


def _fsdp(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        if redirection.lookup(kwargs.get("device_id")) is not None:
            redirection.note("FullyShardedDataParallel(device_id)", kwargs["device_id"])
            kwargs["device_id"] = None
        if redirection.target == "cpu" and kwargs.get("device_id") is None:
            kwargs["device_id"] = torch.device("cpu")  # it takes the CPU where it is named, not where there is nothing else
        old(self, *args, **kwargs)

    return init
