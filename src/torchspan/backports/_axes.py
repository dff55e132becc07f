"""An axis of a mesh over the ranks of its root: (size, stride) pairs, the outermost first; how such are cut and joined."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import torch

Axis = tuple[tuple[int, int], ...]


def axis_of(pairs: Iterable[tuple[int, int]]) -> Axis:
    """The pairs in their one normal form: those that continue each other are one, those of size 1 are none.

    >>> axis_of([(2, 4), (2, 2), (1, 2)])
    ((4, 2),)
    """
    merged: list[tuple[int, int]] = []
    for size, stride in pairs:
        if size == 1:
            continue
        if merged and merged[-1][1] == size * stride:
            size *= merged.pop()[0]
        merged.append((size, stride))
    return tuple(merged)


def size_of(axis: Axis) -> int:
    return math.prod(size for size, _ in axis)


def joined(axes: Iterable[Axis]) -> Axis:
    return axis_of(itertools.chain.from_iterable(axes))


def rows_of(sizes: Sequence[int]) -> list[Axis]:
    """The axes of a root mesh of these sizes.

    >>> rows_of([2, 3])
    [((2, 3),), ((3, 1),)]
    """
    strides = [math.prod(sizes[position + 1 :]) for position in range(len(sizes))]
    return [axis_of([pair]) for pair in zip(sizes, strides)]


def split(axis: Axis, sizes: Sequence[int]) -> list[Axis]:
    """The axes of these sizes, the outermost first, that make up `axis`.

    >>> split(((2, 4), (2, 1)), [2, 2])
    [((2, 4),), ((2, 1),)]
    """
    if len(axis) < 2:
        stride = axis[0][1] if axis else 1
        return [axis_of((size, stride * inner) for size, inner in row) for row in rows_of(sizes)]
    left = list(axis)
    parts: list[Axis] = []
    for remaining in reversed(sizes):
        part: list[tuple[int, int]] = []
        while remaining > 1:
            size, stride = left.pop()
            factor = math.gcd(size, remaining)
            if factor != min(size, remaining):
                raise ValueError(f"the axis {axis} of (size, stride) pairs has no parts of the sizes {tuple(sizes)}")
            part.insert(0, (factor, stride))
            remaining //= factor
            if size > factor:
                left.append((size // factor, stride * factor))
        parts.insert(0, axis_of(part))
    return parts


def is_disjoint(axis: Axis) -> bool:
    """Whether no rank is named twice."""
    ascending = sorted(axis, key=lambda pair: pair[1])
    return all(outer[1] % (inner[0] * inner[1]) == 0 for inner, outer in itertools.pairwise(ascending))


def rest_of(axis: Axis, num_ranks: int) -> Axis:
    """The axis that, with `axis`, makes up all ranks.

    >>> rest_of(((2, 2),), 8)
    ((2, 4), (2, 1))
    """
    pairs, reached = [], 1
    for size, stride in sorted(axis, key=lambda pair: pair[1]):
        pairs.append((stride // reached, reached))
        reached = size * stride
    pairs.append((num_ranks // reached, reached))
    return axis_of(reversed(pairs))


def copies_of(axes: Sequence[Axis], ranks: torch.Tensor) -> torch.Tensor:
    """The ranks of every mesh with these `axes`: a tensor of the number of meshes × the size of each axis."""
    inner = [pair for axis in axes for pair in axis]
    pairs = [*rest_of(axis_of(inner), ranks.numel()), *inner]
    rows = ranks.as_strided([size for size, _ in pairs], [stride for _, stride in pairs])
    return rows.reshape(-1, *map(size_of, axes))


def selected(axis: Axis, size: int, stride: int) -> Axis:
    """Of the ranks of `axis` in order, every `stride`-th, `size` of them.

    >>> selected(((6, 2), (2, 1)), 3, 2)
    ((3, 2),)
    """
    if size == 1:
        return ()
    pairs: list[tuple[int, int]] = []
    for position in reversed(range(len(axis))):
        (length, step), is_outermost = axis[position], position == 0
        if not is_outermost and length <= stride:
            if stride % length:
                break
            stride //= length
            continue
        if length % stride and not is_outermost:
            break
        length, step, stride = length // stride, step * stride, 1
        part = size if is_outermost else min(length, size)
        if size % part:
            break
        pairs.insert(0, (part, step))
        size //= part
        if size == 1:
            return axis_of(pairs)
    raise ValueError(f"{size} ranks, every {stride}-th, cannot be taken from the axis {axis} of (size, stride) pairs")
