"""``torch.ops.ao.offload``, ``reload`` and ``wait_tensor``: activations copied to the CPU and back beside the computation.

A copy runs on a stream of its own. ``wait_tensor`` makes the computation wait for it, and frees what was copied. Tensors that
are on the CPU already are copied at once, so that a program computes the same where there is no accelerator.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from torchspan.backports._base import Backport, unavailable

_PLACE = "torch._functorch._activation_offloading.offload_ops"
_PASSES = "torch._functorch._activation_offloading.activation_offloading"
_CAUSE = "it works on what newer torch's partitioner notes in the graph"

_streams: dict[torch.device, Any] = {}  # the stream of copies, for each accelerator
_pending: dict[int, tuple[Any, torch.device]] = {}  # what a copy's end is known by, for each tensor that was copied to
_pool: dict[tuple[int, torch.dtype], list[Tensor]] = {}  # pinned buffers for reuse
_from_pool: set[int] = set()
_pooling: list[bool] = [False]


@contextmanager
def pinned_memory_pool(enabled: bool = True) -> Iterator[None]:
    """Inside, pinned buffers of the CPU are used again for later copies of the same size and dtype; freed at the end."""
    _pooling.append(enabled)
    try:
        yield
    finally:
        _pooling.pop()
        if not _pooling[-1]:
            _pool.clear()
            _from_pool.clear()


def _offload(tensor: Tensor) -> Tensor:
    device = tensor.device
    if device.type == "cpu":
        result = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
        _pending[result.data_ptr()] = (None, device)
        return result
    with _copying(device) as event:
        result = _buffer(tensor.numel(), tensor.dtype).view(tensor.shape)
        result.copy_(tensor, non_blocking=True)
    _pending[result.data_ptr()] = (event, device)
    return result


def _reload(
    tensor: Tensor,
    device: torch.device,
    original_size: Sequence[int] | None = None,
    original_stride: Sequence[int] | None = None,
) -> Tensor:
    result = _empty_like(tensor, device, original_size, original_stride)
    if device.type == "cpu":
        result.copy_(tensor)
        _pending[result.data_ptr()] = (None, device)
        return result
    with _copying(device) as event:
        result.copy_(tensor, non_blocking=True)
    _pending[result.data_ptr()] = (event, device)
    return result


def _empty_like(tensor: Tensor, device: torch.device, size: Sequence[int] | None, stride: Sequence[int] | None) -> Tensor:
    size = tensor.shape if size is None else size
    stride = tensor.stride() if stride is None else stride
    return torch.empty_strided(size, stride, dtype=tensor.dtype, device=device)


@contextmanager
def _copying(device: torch.device) -> Iterator[Any]:
    """On the stream of copies, once what was asked for before is done; gives the event that is recorded at the end."""
    stream = _streams.setdefault(device, torch.Stream(device=device))
    current = torch.accelerator.current_stream(device)
    event = torch.Event(device=device.type)
    stream.wait_stream(current)
    torch.accelerator.set_stream(stream)
    try:
        yield event
        stream.record_event(event)
    finally:
        torch.accelerator.set_stream(current)


def _buffer(size: int, dtype: torch.dtype) -> Tensor:
    kept = _pool.get((size, dtype)) if _pooling[-1] else None
    buffer = kept.pop() if kept else torch.empty(size, dtype=dtype, pin_memory=True)
    if _pooling[-1]:
        _from_pool.add(buffer.data_ptr())
    return buffer


def _wait(tensor: Tensor, keepalive: Tensor | None = None, last_use_of_storage: Tensor | None = None) -> Tensor:
    if tensor.data_ptr() not in _pending:
        raise RuntimeError(
            f"ao.wait_tensor: no pending transfer for tensor with data_ptr={tensor.data_ptr()}. "
            "Every ao.wait_tensor must be paired with a preceding ao.offload or ao.reload."
        )
    event, device = _pending.pop(tensor.data_ptr())
    if event is not None:
        torch.accelerator.current_stream(device).wait_event(event)
    if keepalive is not None:
        _free(keepalive)
    return tensor


def _free(tensor: Tensor) -> None:
    if tensor.data_ptr() in _from_pool:
        flat = tensor.view(-1)
        _pool.setdefault((flat.numel(), flat.dtype), []).append(flat)
    elif tensor.untyped_storage().size():
        tensor.untyped_storage().resize_(0)


@functools.cache
def _define_operators() -> None:
    """Define the operators; the dispatcher keeps them."""
    define: Any = torch.library.custom_op
    offload = define("ao::offload", _offload, mutates_args=(), schema="(Tensor tensor) -> Tensor")
    offload.register_fake(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu"))
    inputs = "Tensor tensor, Device device, SymInt[]? original_size=None, SymInt[]? original_stride=None"
    reload = define("ao::reload", _reload, mutates_args=(), schema=f"({inputs}) -> Tensor")
    reload.register_fake(
        lambda tensor, device, original_size=None, original_stride=None: _empty_like(
            tensor, device, original_size, original_stride
        )
    )
    inputs = "Tensor(a) tensor, Tensor? keepalive=None, Tensor? last_use_of_storage=None"
    torch.library.define("ao::wait_tensor", f"({inputs}) -> Tensor(a)")
    torch.library.impl("ao::wait_tensor", "CompositeExplicitAutograd")(_wait)
    torch.library.register_fake("ao::wait_tensor")(lambda tensor, keepalive=None, last_use_of_storage=None: tensor)
    torch.fx.has_side_effect(torch.ops.ao.wait_tensor.default)


def _operator(name: str) -> Any:
    _define_operators()
    return getattr(torch.ops.ao, name)


class _Definition(Backport):
    """The operators are there once the module is imported, as upstream's."""

    def _build_module(self, module: str = "") -> dict[str, object]:
        _define_operators()
        return dict(super()._build_module(module))


BACKPORT = _Definition(
    name="activation_offloading",
    summary="activations on the CPU until the backward: torch.ops.ao.offload, reload and wait_tensor",
    target=_PLACE,
    since="2.12.0",
    came={
        "2.12.0": (f"{_PASSES}.offload_activation_fw_async", f"{_PASSES}.reload_activation_bw_async"),
        "2.10.0": (_PASSES,),  # the rest of it
        "2.13.0": ("pinned_memory_pool",),
    },
    first_forms={"2.12": "pins no memory of a meta tensor, and copies to the current accelerator alone"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.12.0/torch/_functorch/_activation_offloading/offload_ops.py",
    differs=(
        "a tensor that is on the CPU is copied at once, where newer torch needs an accelerator; the passes of "
        "activation_offloading, which newer torch's partitioner calls, can be imported, and their use is an error"
    ),
    is_module=True,
    names={
        "offload": lambda: _operator("offload"),
        "reload": lambda: _operator("reload"),
        "wait_tensor": lambda: _operator("wait_tensor"),
        "pinned_memory_pool": lambda: pinned_memory_pool,
    },
    elsewhere={
        "torch._functorch._activation_offloading.activation_offloading": {
            "enable_activation_offloading": lambda: unavailable(f"{_PASSES}.enable_activation_offloading", _CAUSE, "2.10.0"),
            "offload_activation_fw": lambda: unavailable(f"{_PASSES}.offload_activation_fw", _CAUSE, "2.10.0"),
            "reload_activation_bw": lambda: unavailable(f"{_PASSES}.reload_activation_bw", _CAUSE, "2.10.0"),
            "offload_activation_fw_async": lambda: unavailable(f"{_PASSES}.offload_activation_fw_async", _CAUSE, "2.12.0"),
            "reload_activation_bw_async": lambda: unavailable(f"{_PASSES}.reload_activation_bw_async", _CAUSE, "2.12.0"),
            "can_offload": lambda: unavailable(f"{_PASSES}.can_offload", _CAUSE, "2.10.0"),
            "choose_offload_sets": lambda: unavailable(f"{_PASSES}.choose_offload_sets", _CAUSE, "2.10.0"),
        }
    },
)
