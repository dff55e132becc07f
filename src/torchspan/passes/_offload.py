"""Offloading: values of the forward that wait on the CPU until the backward reads them.

Three operators, of which a graph has one each a value. On an accelerator both copies run on a stream of their own, from and to
pinned memory, beside what is computed; `wait_for_copy` has the stream that computes wait for the copy, and the host goes on.
On a CPU, where nothing is gained, they copy: so the same graph can be run there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph as FxGraph
from torch.fx import Node

from torchspan.passes._phases import Phase, mark_backward
from torchspan.passes._storages import viewed_by

# Made by `define` and `impl`, not by `custom_op`, whose first call imports torch.compile's front end.
_TO_HOST, _TO_DEVICE, _WAIT = (f"torchspan::{name}" for name in ("copy_to_host", "copy_to_device", "wait_for_copy"))
torch.library.define(_TO_HOST, "(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(_TO_DEVICE, "(Tensor x, Device device) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
torch.library.define(_WAIT, "(Tensor x) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_arrivals: dict[int, Any] = {}  # the event after which a copy is there, by the address of its memory


def _like(x: Tensor, device: torch.device, **options: Any) -> Tensor:
    """Memory on `device` that is laid out as `x` is."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device, **options)


@cache
def _stream(device: torch.device) -> Any:
    """The stream of a device's copies."""
    return torch.get_device_module(device).Stream(device)


@torch.library.impl(_TO_HOST, "CompositeExplicitAutograd")
def _copy_to_host(x: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return _like(x, x.device).copy_(x)
    module, stream = torch.get_device_module(x.device), _stream(x.device)
    host = _like(x, torch.device("cpu"), pin_memory=True)
    stream.wait_stream(module.current_stream(x.device))
    with module.stream(stream):
        host.copy_(x, non_blocking=True)
    x.record_stream(stream)  # its memory is not given to others before the copy is made
    return host


@torch.library.impl(_TO_DEVICE, "CompositeExplicitAutograd")
def _copy_to_device(x: Tensor, device: torch.device) -> Tensor:
    result = _like(x, device)
    if device.type == "cpu":
        return result.copy_(x)
    module, stream = torch.get_device_module(device), _stream(device)
    stream.wait_stream(module.current_stream(device))  # who had this memory before is done with it
    with module.stream(stream):
        result.copy_(x, non_blocking=True)
        _arrivals[result.data_ptr()] = stream.record_event()
    return result


@torch.library.impl(_WAIT, "CompositeExplicitAutograd")
def _wait_for_copy(x: Tensor) -> Tensor:
    arrival = _arrivals.pop(x.data_ptr(), None)
    if arrival is not None:
        torch.get_device_module(x.device).current_stream(x.device).wait_event(arrival)
    return x


@torch.library.register_fake(_TO_HOST)
def _fake_to_host(x: Tensor) -> Tensor:
    return _like(x, torch.device("cpu"))


@torch.library.register_fake(_TO_DEVICE)
def _fake_to_device(x: Tensor, device: torch.device) -> Tensor:
    return _like(x, device)


@torch.library.register_fake(_WAIT)
def _fake_wait(x: Tensor) -> Tensor:
    return _like(x, x.device)


def other_device(owner: Node) -> torch.device | None:
    """Where a value is that could wait on the CPU; None if it is there, or is no tensor."""
    value = owner.meta.get("val")
    return value.device if isinstance(value, Tensor) and value.device.type not in ("cpu", "meta") else None


class Offloading:
    """Puts copies to the CPU into a graph, in place: each after the last use in the forward.

    `bring_back` gives, for each of `owners`, what writes its way back at the place where the graph inserts; when all are
    written, `finish` has each begin before the graph waits for the one that is `ahead` before it, so that it is there in time.
    """

    def __init__(self, graph: FxGraph, phases: dict[Node, Phase], owners: Sequence[Node], ahead: int = 1) -> None:
        self._graph, self._phases, self._ahead = graph, phases, ahead
        self._pairs: list[tuple[Node, Node]] = []
        self._hosts = {owner: self._to_host(owner) for owner in owners}

    def bring_back(self) -> dict[Node, Callable[[], Node]]:
        """For each owner, what writes the nodes that bring it back, and gives the one to read."""
        return {owner: partial(self._back, owner, host) for owner, host in self._hosts.items()}

    def finish(self) -> None:
        """Begin each copy back before it is waited for."""
        for index, (begin, _) in enumerate(self._pairs[1:], start=1):
            _, wait = self._pairs[max(0, index - self._ahead)]
            wait.prepend(begin)

    def _to_host(self, owner: Node) -> Node:
        stack, last = [owner], owner
        while stack:
            node = stack.pop()
            last = max(last, node)
            for user in node.users:
                if self._phases[user] == "forward" and user.op != "output":
                    last = max(last, user)
                    if viewed_by(user) is not None:
                        stack.append(user)
        with self._graph.inserting_after(last):
            host = self._call(torch.ops.torchspan.copy_to_host.default, owner)
        self._phases[host] = "forward"
        return host

    def _back(self, owner: Node, host: Node) -> Node:
        begin = self._call(torch.ops.torchspan.copy_to_device.default, host, owner.meta["val"].device)
        mark_backward(begin)
        self._phases[begin] = "backward"
        wait = self._call(torch.ops.torchspan.wait_for_copy.default, begin)
        self._pairs.append((begin, wait))
        return wait

    def _call(self, operator: Any, source: Node, *others: Any) -> Node:
        node = self._graph.call_function(operator, (source, *others))
        value = source.meta["val"]
        copied = {key: source.meta[key] for key in ("seq_nr", "partitioner_tag") if key in source.meta}
        device = others[0] if others else torch.device("cpu") if "to_host" in str(operator) else value.device
        with value.fake_mode:
            node.meta = {**copied, "val": _like(value, device), "custom": dict(source.meta.get("custom") or {})}
        return node


def is_on_host(node: Node) -> bool:
    """Whether `node` is a copy that waits on the CPU."""
    return node.target is torch.ops.torchspan.copy_to_host.default
