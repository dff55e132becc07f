"""``torch.hash_tensor``: the exclusive or of a tensor's elements, as 64 bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from torchspan.backports._base import Backport, Change


def hash_tensor(input: Tensor, dim: int | Sequence[int] = (), *, keepdim: bool = False, mode: int = 0) -> Tensor:
    """The exclusive or of the elements, each as a 64-bit float or integer, of all or along `dim`.

    Args:
        input: any tensor of numbers.
        dim: the dimension or dimensions to reduce; none is all of them.
        keepdim: whether those stay, with size 1.
        mode: 0, which is the only one.

    Returns:
        uint64, of the shape of `input` without `dim`.

    Raises:
        RuntimeError: another mode, a dimension given twice, or no elements and no dimension.
        NotImplementedError: complex numbers.
        IndexError: a dimension that is not there, or one without elements.

    >>> int(hash_tensor(torch.tensor([1, 2, 4])))
    7
    """
    if mode != 0:
        raise RuntimeError(f"Unknown hash_tensor mode: {mode}; expected 0, the exclusive or")
    if input.is_complex():
        raise NotImplementedError(f"hash_tensor is not implemented for {input.dtype}; expected real numbers")
    dims = _dims(input, (dim,) if isinstance(dim, int) else tuple(dim))
    if input.ndim == 0:
        return _bits(input).view(torch.uint64)
    kept = [axis for axis in range(input.ndim) if axis not in dims]
    rows = [input.shape[axis] for axis in kept]
    bits = _bits(input).permute([*kept, *dims]).reshape(*rows, input.numel() // math.prod(rows) if math.prod(rows) else 1)
    shape = [1 if axis in dims else size for axis, size in enumerate(input.shape) if keepdim or axis not in dims]
    return _folded(bits).reshape(shape).view(torch.uint64)


def _dims(input: Tensor, axes: tuple[int, ...]) -> list[int]:
    """The dimensions to reduce, from the first on."""
    if not axes:
        if input.numel() == 0:
            raise RuntimeError(
                "hash_tensor: Expected reduction dim to be specified for input.numel() == 0. "
                "Specify the reduction dim with the 'dim' argument."
            )
        return list(range(input.ndim))
    limit = max(input.ndim, 1)
    for axis in axes:
        if not -limit <= axis < limit:
            raise IndexError(f"Dimension out of range (expected to be in range of [{-limit}, {limit - 1}], but got {axis})")
    dims = sorted(axis % limit for axis in axes)
    if len({*dims}) < len(dims):
        raise RuntimeError(f"a dim appears multiple times in the list of dims {axes}")
    for axis in dims if input.ndim else ():
        if input.shape[axis] == 0:
            raise IndexError(f"hash_tensor: Expected reduction dim {axis} to have non-zero size.")
    return dims


def _bits(x: Tensor) -> Tensor:
    if x.is_floating_point():
        return x.double().view(torch.int64)
    return x.view(torch.int64) if x.dtype == torch.uint64 else x.long()


def _folded(bits: Tensor) -> Tensor:
    """The exclusive or along the last dimension, ``(…, 1)``, by halves."""
    while bits.size(-1) > 1:
        half = bits.size(-1) // 2
        rest = bits[..., 2 * half :]
        bits = torch.cat((bits[..., :half] ^ bits[..., half : 2 * half], rest), dim=-1)
    return bits


hash_tensor.__module__ = "torch"

BACKPORT = Backport(
    name="hash_tensor",
    summary="the exclusive or of a tensor's elements: torch.hash_tensor and Tensor.hash_tensor",
    target="torch",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.9.0/torch/_torch_docs.py",
    differs="it is no operator of its own: graphs have the operators that it is made of",
    names={"hash_tensor": lambda: hash_tensor},
    also=(Change("torch", "Tensor.hash_tensor", lambda old: old or hash_tensor, create=True),),
)
