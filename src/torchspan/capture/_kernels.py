"""Have a trace record what eager computes: operators whole, and views of sizes that depend on data."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from torchspan.private import aot, dispatch, fx

TRACING = threading.RLock()


@contextmanager
def kernels_kept_whole() -> Iterator[None]:
    """While this is open, make_fx records operators as eager calls them, also those that could be decomposed.

    ``silu_backward`` has kernels of its own and also a composite implementation. Autograd calls the kernel; make_fx of old
    torch (2.8) traced the composite, whose rounding differs (1e-9): with it, a captured step is not bitwise eager's. Newer
    ones ask ``autograd_would_have_decomposed`` first, and nothing is done here.
    """
    if hasattr(fx.proxy_tensor, "autograd_would_have_decomposed"):
        yield
        return
    key = dispatch.DispatchKey.CompositeImplicitAutograd
    kept = [operator for operator in _with_kernel_and_composite() if key not in operator.py_kernels]
    for operator in kept:
        operator.py_kernels[key] = partial(_composite_unless_recorded, operator)
    try:
        yield
    finally:
        for operator in kept:
            del operator.py_kernels[key]


def _composite_unless_recorded(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """The composite implementation for fake tensors, which need shapes; no decomposition for what records the graph."""
    if fx.get_proxy_mode() is not None:
        return NotImplemented
    return operator._op_dk(dispatch.DispatchKey.CompositeImplicitAutograd, *args, **kwargs)


@cache
def _with_kernel_and_composite() -> tuple[Any, ...]:
    """Operators that have a CPU and a composite kernel: ``silu_backward``, ``mish_backward``, ``native_channel_shuffle``."""

    def has_all(name: str) -> bool:
        keys = ("CompositeImplicitAutograd", "CPU")
        return all(torch._C._dispatch_has_kernel_for_dispatch_key(name, key) for key in keys)

    names = (name for name in torch._C._dispatch_get_all_op_names() if name.startswith("aten::") and "." not in name)
    return tuple(getattr(torch.ops.aten, name.removeprefix("aten::")).default for name in names if has_all(name))


@contextmanager
def views_of_any_size() -> Iterator[None]:
    """While this is open, a fake tensor of a size that depends on data can be viewed; old torch (2.8) cannot by itself."""
    known = fx.op_implementations_dict
    views = (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default)
    with TRACING:
        if views[0] in known:
            yield
            return
        known.update(dict.fromkeys(views, _contiguous_view))
        try:
            yield
        finally:
            for view in views:
                del known[view]


def _contiguous_view(fake_mode: Any, _: Any, tensor: Tensor, shape: Sequence[Any]) -> Any:
    """A view of a contiguous tensor with symbols among its sizes; of any other tensor, what torch does."""
    if not any(isinstance(size, torch.SymInt) for size in (*tensor.shape, *shape)) or not _is_contiguous(tensor):
        return NotImplemented
    num_known = math.prod(size for size in shape if not (isinstance(size, int) and size == -1))
    sizes = [tensor.numel() // num_known if isinstance(size, int) and size == -1 else size for size in shape]
    with fake_mode:
        return tensor.as_strided(sizes, _contiguous_strides(sizes), tensor.storage_offset())


def _is_contiguous(tensor: Tensor) -> bool:
    return all(
        fx.statically_known_true(stride == expected)
        for stride, expected in zip(tensor.stride(), _contiguous_strides(tensor.shape), strict=True)
    )


def _contiguous_strides(sizes: Sequence[Any]) -> list[Any]:
    return [math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))]


def below_functionalization(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Call an operator inside ``torch.func.functionalize`` as if that were not there: right if it neither writes nor aliases.

    Functionalization decomposes some operators that could also be called whole, such as ``silu_backward`` in torch 2.8.
    """
    api = fx.FunctorchFunctionalizeAPI(aot.retrieve_current_functorch_interpreter())
    plain_args, plain_kwargs = api.unwrap_tensors(args), api.unwrap_tensors(dict(kwargs))
    with api.redispatch_to_next():
        return api.wrap_tensors(operator(*plain_args, **plain_kwargs))
