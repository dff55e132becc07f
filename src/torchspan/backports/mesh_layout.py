"""``torch.distributed._mesh_layout``: where the ranks of a mesh lie, as sizes and strides."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, overload

import torch

from torchspan.backports import _axes
from torchspan.backports._base import Backport

_PLACE = "torch.distributed._mesh_layout"

IntTuple = int | tuple[Any, ...]


def _numbers(nested: IntTuple) -> tuple[int, ...]:
    """The numbers in tuples of tuples, in order."""
    return (nested,) if isinstance(nested, int) else tuple(itertools.chain.from_iterable(map(_numbers, nested)))


def _is_alike(first: IntTuple, second: IntTuple) -> bool:
    """Whether tuples have numbers and tuples at the same places."""
    if isinstance(first, int) or isinstance(second, int):
        return isinstance(first, int) and isinstance(second, int)
    return len(first) == len(second) and all(map(_is_alike, first, second))


@dataclass(frozen=True)
class _FlatLayout:
    """One axis of a mesh over the ranks of its root: `shape` and `stride`, the outermost first, in their one normal form.

    Args:
        shape: sizes; an integer, or tuples of them, nested at will.
        stride: for each size how far apart the ranks are; by default those of rows.

    Raises:
        TypeError: what is given is neither an integer nor a tuple.
        ValueError: there is not one stride for each size.
    """

    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def __init__(self, shape: IntTuple, stride: IntTuple | None = None) -> None:
        sizes = _numbers(_checked("shape", shape))
        strides: tuple[int, ...] = tuple(math.prod(sizes[position + 1 :]) for position in range(len(sizes)))
        if stride is not None:
            strides = _numbers(_checked("stride", stride))
            if not _is_alike(shape, stride):
                raise ValueError(f"sizes {shape} and strides {stride} don't match")
        axis = _axes.axis_of(zip(sizes, strides))
        object.__setattr__(self, "shape", tuple(size for size, _ in axis))
        object.__setattr__(self, "stride", tuple(step for _, step in axis))

    def __len__(self) -> NoReturn:
        raise RuntimeError("the number of pairs in a _FlatLayout says nothing; a _MeshLayout has a length")

    def __getitem__(self, i: int) -> NoReturn:
        raise RuntimeError("the pairs of a _FlatLayout have no meaning one by one; index a _MeshLayout")

    @property
    def sizes_and_strides(self) -> Iterator[tuple[int, int]]:
        """The (size, stride) pairs."""
        return zip(self.shape, self.stride)

    def numel(self) -> int:
        """The number of ranks."""
        return math.prod(self.shape)

    def composition(self, layout: _MeshLayout) -> _MeshLayout:
        """`layout` says by number which ranks of this one are meant: a mesh of those.

        Raises ValueError where its sizes and strides do not fit into those of this one.
        """
        return _MeshLayout([_of(_axes.joined(self._selected(axis))) for axis in layout])

    def _selected(self, axis: _FlatLayout) -> Iterator[_axes.Axis]:
        return (_axes.selected(tuple(self.sizes_and_strides), size, stride) for size, stride in axis.sizes_and_strides)

    def complement(self, world_size: int) -> _FlatLayout:
        """The axis that, with this one, makes up `world_size` ranks."""
        return _of(_axes.rest_of(tuple(self.sizes_and_strides), world_size))

    def all_ranks_from_zero(self) -> list[int]:
        """The ranks of that copy of this axis which has rank 0, in order."""
        places = itertools.product(*map(range, self.shape))
        return [sum(map(int.__mul__, place, self.stride)) for place in places]

    def global_ranks(self, world_size: int) -> list[list[int]]:
        """The ranks of every copy of this axis among `world_size` ranks."""
        offsets = self.complement(world_size).all_ranks_from_zero()
        return [[offset + rank for rank in self.all_ranks_from_zero()] for offset in offsets]

    def check_sorted(self) -> bool:
        """Whether the strides descend."""
        return list(self.stride) == sorted(self.stride, reverse=True)

    def check_orthogonal(self) -> bool:
        """Whether no rank comes twice."""
        return _axes.is_disjoint(tuple(self.sizes_and_strides))


def _checked(name: str, value: Any) -> IntTuple:
    if not isinstance(value, (int, tuple)):
        raise TypeError(f"{name} must be a tuple or int, got {type(value)}")
    return value


def _of(axis: Iterable[tuple[int, int]]) -> _FlatLayout:
    pairs = tuple(axis)
    return _FlatLayout(tuple(size for size, _ in pairs), tuple(stride for _, stride in pairs))


@dataclass(frozen=True)
class _MeshLayout(Sequence[_FlatLayout]):
    """The axes of a mesh over the ranks of its root.

    >>> _MeshLayout.from_sizes_strides((2, 3)).collapse()
    _FlatLayout(shape=(6,), stride=(1,))
    """

    axes: tuple[_FlatLayout, ...]

    def __init__(self, axes: Iterable[_FlatLayout]) -> None:
        object.__setattr__(self, "axes", tuple(axes))

    @classmethod
    def from_sizes_strides(cls, sizes: tuple[int, ...], strides: tuple[int, ...] | None = None) -> _MeshLayout:
        """Axes of one (size, stride) pair each; by default the strides are those of rows.

        Raises ValueError if there is not one stride for each size.
        """
        if strides is None:
            strides = tuple(math.prod(sizes[position + 1 :]) for position in range(len(sizes)))
        if len(sizes) != len(strides):
            raise ValueError(f"sizes and strides must have the same length, got {len(sizes)} and {len(strides)}")
        return cls(_FlatLayout((size,), (stride,)) for size, stride in zip(sizes, strides))

    def __len__(self) -> int:
        return len(self.axes)

    @overload
    def __getitem__(self, i: int) -> _FlatLayout: ...

    @overload
    def __getitem__(self, i: slice) -> _MeshLayout: ...

    def __getitem__(self, i: int | slice) -> _FlatLayout | _MeshLayout:
        return _MeshLayout(self.axes[i]) if isinstance(i, slice) else self.axes[i]

    @property
    def top_level_sizes(self) -> tuple[int, ...]:
        """The size of each axis."""
        return tuple(axis.numel() for axis in self.axes)

    def numel(self) -> int:
        """The number of ranks."""
        return math.prod(self.top_level_sizes)

    def cosize(self) -> int:
        """One more than the highest rank."""
        return 1 + sum((size - 1) * stride for axis in self.axes for size, stride in axis.sizes_and_strides)

    def collapse(self) -> _FlatLayout:
        """All axes as one."""
        return _of(pair for axis in self.axes for pair in axis.sizes_and_strides)

    def splice(self, start: int, end: int, layout: _MeshLayout) -> _MeshLayout:
        """The axes of `layout` in place of those from `start` to before `end`."""
        return _MeshLayout((*self.axes[:start], *layout.axes, *self.axes[end:]))

    def remap_to_tensor(self, rank_map: torch.Tensor) -> torch.Tensor:
        """The ranks of every mesh of these axes: of the number of meshes × the size of each axis.

        Args:
            rank_map: the ranks of the root mesh in order, ``(num_ranks,)``.
        """
        is_fit = rank_map.ndim == 1 and rank_map.is_contiguous() and rank_map.numel() >= self.cosize()
        assert is_fit, f"expected at least {self.cosize()} ranks in one contiguous row, got the shape {tuple(rank_map.shape)}"
        return _axes.copies_of([tuple(axis.sizes_and_strides) for axis in self.axes], rank_map)


for _public in (_FlatLayout, _MeshLayout):
    _public.__module__ = _PLACE

BACKPORT = Backport(
    name="mesh_layout",
    summary="where the ranks of a mesh lie, as sizes and strides: torch.distributed._mesh_layout",
    target=_PLACE,
    since="2.10.0",
    came={"2.13.0": ("_FlatLayout",)},
    first_forms={"2.10, 2.11, 2.12": "layouts are made of sizes and strides by their constructor"},
    upstream="https://github.com/pytorch/pytorch/pull/161016",
    differs="layouts are as in the newest torch, of axes; to_pycute and torch.distributed._pycute are not there",
    names={"_FlatLayout": lambda: _FlatLayout, "_MeshLayout": lambda: _MeshLayout},
    is_module=True,
)
