"""Reduce-scatter on gloo with the operation that was asked for: torch 2.8 gives the sum, whatever it was.

So the average of gradients, which FSDP asks for, was their sum; with no error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport, Change
from torchspan.core.errors import UnsupportedError
from torchspan.private import dynamo

_C10D = "torch.distributed.distributed_c10d"
_FUNCTIONAL = "torch.distributed._functional_collectives"


def _is_affected(group: Any, tensor: torch.Tensor, operation: Any) -> bool:
    """Whether this is not the sum, and gloo's to compute."""
    from torch.distributed import ReduceOp

    return bool(operation != ReduceOp.SUM) and group._get_backend(tensor.device).name() == "gloo"


def _of_one(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """ProcessGroup._reduce_scatter_base."""

    @functools.wraps(reduce_scatter)
    def run(self: Any, output: torch.Tensor, input: torch.Tensor, *options: Any, **named: Any) -> Any:
        operation = _operation(options, named)
        if operation is None or not _is_affected(self, output, operation):
            return reduce_scatter(self, output, input, *options, **named)
        return _reduce_scatter(self, [output], [_parts(self, input)], operation)

    return run


def _of_many(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """ProcessGroup.reduce_scatter_tensor_coalesced."""

    @functools.wraps(reduce_scatter)
    def run(self: Any, outputs: list[torch.Tensor], inputs: list[torch.Tensor], *options: Any, **named: Any) -> Any:
        operation = _operation(options, named)
        if operation is None or not _is_affected(self, outputs[0], operation):
            return reduce_scatter(self, outputs, inputs, *options, **named)
        return _reduce_scatter(self, outputs, [_parts(self, input) for input in inputs], operation)

    return run


def _of_lists(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """ProcessGroup.reduce_scatter, of a list for each output; or of one, with the operation itself in place of options."""

    @functools.wraps(reduce_scatter)
    def run(self: Any, outputs: Any, inputs: Any, *options: Any, **named: Any) -> Any:
        operation = _operation(options, named)
        is_one = isinstance(outputs, torch.Tensor)
        if operation is None or not _is_affected(self, outputs if is_one else outputs[0], operation):
            return reduce_scatter(self, outputs, inputs, *options, **named)
        return _reduce_scatter(self, [outputs] if is_one else outputs, [inputs] if is_one else inputs, operation)

    return run


def _operation(options: Sequence[Any], named: dict[str, Any]) -> Any:
    """The operation in what a method of ProcessGroup was given after its tensors; None for its default."""
    operation = options[0] if options else named.get("opts", named.get("op"))
    return getattr(operation, "reduceOp", operation)


def _parts(group: Any, tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    return tensor.detach().reshape(group.size(), -1).unbind()


def _reduce_scatter(
    group: Any, outputs: Sequence[torch.Tensor], inputs: Sequence[Sequence[torch.Tensor]], operation: Any
) -> Any:
    """Reduce every rank's part of each input and keep this rank's, as gloo's own does; gives the Work."""
    from torch.distributed.distributed_c10d import AllreduceOptions

    BACKPORT.record_use("reduce-scatter on gloo, other than the sum")
    options = AllreduceOptions()
    options.reduceOp = operation
    buffers = [[part.detach().clone(memory_format=torch.contiguous_format) for part in parts] for parts in inputs]
    works = [group.allreduce([buffer], options) for parts in buffers for buffer in parts]

    def keep() -> None:
        with torch.no_grad():
            for output, parts in zip(outputs, buffers):
                output.copy_(parts[group.rank()].view_as(output))

    return _work_class()(works, keep)


@functools.cache
def _work_class() -> type:
    """The class of a Work that ends with a function of ours; ``_create_work_from_future`` has one that hides errors."""
    from torch.distributed import Work

    class ReduceScatterWork(Work):
        def __init__(self, works: Sequence[Any], keep: Callable[[], None]) -> None:
            super().__init__()
            self._works, self._keep = works, keep

        def wait(self, timeout: timedelta = timedelta(0)) -> bool:
            for work in self._works:
                work.wait(timeout)
            self._keep()
            return True

        def is_completed(self) -> bool:
            return all(work.is_completed() for work in self._works)

        def is_success(self) -> bool:
            return all(work.is_success() for work in self._works)

        def get_future(self) -> Any:
            def keep(done: Any) -> None:
                for future in done.value():
                    future.value()  # raises what went wrong
                self._keep()

            return torch.futures.collect_all([work.get_future() for work in self._works]).then(keep)

    return ReduceScatterWork


# functional collectives, which reach gloo by another way; dynamo traces these functions


def _functional(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """reduce_scatter_tensor: the average is the sum, divided; others are reduced whole, and cut."""

    @functools.wraps(reduce_scatter)
    def run(self: torch.Tensor, reduceOp: str, scatter_dim: int, group: Any, tag: str = "") -> Any:
        name = _group_name(group, tag)
        if reduceOp.lower() == "sum" or not _is_gloo(name, self.device.type):
            return reduce_scatter(self, reduceOp, scatter_dim, group, tag)
        if reduceOp.lower() == "avg":
            return reduce_scatter(self, "sum", scatter_dim, group, tag) / _size(name)
        return _reduced(self, reduceOp, name).chunk(_size(name), scatter_dim)[_rank(name)].contiguous()

    return run


def _functional_of_many(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """reduce_scatter_tensor_coalesced, in the same way."""

    @functools.wraps(reduce_scatter)
    def run(inputs: list[torch.Tensor], reduceOp: str, scatter_dim: list[int], group: Any, tag: str = "") -> Any:
        name = _group_name(group, tag)
        if reduceOp.lower() == "sum" or not _is_gloo(name, inputs[0].device.type):
            return reduce_scatter(inputs, reduceOp, scatter_dim, group, tag)
        if reduceOp.lower() == "avg":
            return [part / _size(name) for part in reduce_scatter(inputs, "sum", scatter_dim, group, tag)]
        whole = [_reduced(tensor, reduceOp, name) for tensor in inputs]
        return [tensor.chunk(_size(name), dim)[_rank(name)].contiguous() for tensor, dim in zip(whole, scatter_dim)]

    return run


def _with_gradient(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """reduce_scatter_tensor_autograd, of which torch has the sum and the average only."""

    @functools.wraps(reduce_scatter)
    def run(self: torch.Tensor, reduceOp: str, scatter_dim: int, group: Any, tag: str = "") -> Any:
        name = _group_name(group, tag)
        if reduceOp.lower() == "sum" or not _is_gloo(name, self.device.type):
            return reduce_scatter(self, reduceOp, scatter_dim, group, tag)
        if reduceOp.lower() != "avg":
            raise UnsupportedError(
                f"reduce_scatter_tensor_autograd({reduceOp!r}) on gloo: this torch gives the sum; "
                f"expected 'sum' or 'avg'; torch has it since {BACKPORT.since}"
            )
        return reduce_scatter(self, "sum", scatter_dim, group, tag) / _size(name)

    return run


def _group_name(group: Any, tag: str) -> Any:
    from torch.distributed._functional_collectives import _resolve_group_name

    return _resolve_group_name(group, tag)


def _reduced(tensor: torch.Tensor, operation: str, name: Any) -> torch.Tensor:
    from torch.distributed._functional_collectives import all_reduce

    return all_reduce(tensor, operation, name)


@dynamo.constant_to_dynamo
def _is_gloo(name: Any, device: str) -> bool:
    return bool(_group(name)._get_backend(torch.device(device)).name() == "gloo")


@dynamo.constant_to_dynamo
def _size(name: Any) -> int:
    return _group(name).size()


@dynamo.constant_to_dynamo
def _rank(name: Any) -> int:
    return _group(name).rank()


def _group(name: Any) -> Any:
    from torch._C._distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)


def _lacks(module: ModuleType | None) -> bool:
    """Whether this torch is older than the repair.

    The fault shows between processes only. Gloo's groups have a `set_timeout` from the release on that mended it.
    """
    gloo = getattr(module, "ProcessGroupGloo", None)
    return gloo is not None and not hasattr(gloo, "set_timeout")


BACKPORT = Backport(
    name="gloo_reduce_scatter",
    summary="reduce-scatter on gloo gives the average, the maximum, … that was asked for; torch 2.8 gives the sum",
    target=_C10D,
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/issues/162338",
    differs="torch.ops._c10d_functional.reduce_scatter_tensor, called as such, still gives the sum",
    replaces={
        "ProcessGroup._reduce_scatter_base": _of_one,
        "ProcessGroup.reduce_scatter": _of_lists,
        "ProcessGroup.reduce_scatter_tensor_coalesced": _of_many,
    },
    also=(
        Change(_FUNCTIONAL, "reduce_scatter_tensor", _functional),
        Change(_FUNCTIONAL, "reduce_scatter_tensor_coalesced", _functional_of_many),
        Change(_FUNCTIONAL, "reduce_scatter_tensor_autograd", _with_gradient),
    ),
    lacks=_lacks,
)
