"""``BlockMask._flatten``, ``_unflatten``, ``_flatten_with_keys``: flex attention's mask as a container of tensors.

With these a program registers the class with ``torch.utils._pytree``, and a mask can be an argument of a traced function. What
a mask function holds (in its closure, or as arguments of a ``functools.partial``) becomes leaves too, so that a trace sees it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport, Change

_PLACE = "torch.nn.attention.flex_attention"
_TENSORS = (
    "kv_num_blocks",
    "kv_indices",
    "full_kv_num_blocks",
    "full_kv_indices",
    "q_num_blocks",
    "q_indices",
    "full_q_num_blocks",
    "full_q_indices",
)


@dataclass(frozen=True)
class _Whole:
    """A callable that is kept as it is; functions are equal that do the same, whoever made them."""

    function: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Whole) and _identity(self.function) == _identity(other.function)

    def __hash__(self) -> int:
        return hash(_identity(self.function))


def _identity(function: Any) -> Any:
    return function.__code__ if isinstance(function, FunctionType) else function


@dataclass(frozen=True)
class _Recipe:
    """A function without the values that it holds: `build` makes it from them.

    `code` is the function's (None for a ``functools.partial``), `spec` the structure of what it holds. Of each leaf of that,
    `parts` has None for a value, and for a function in its turn what remains of it and the number of values it holds.
    """

    code: CodeType | None
    build: Callable[[Any], Any] = field(compare=False)
    spec: Any
    parts: tuple[tuple[Any, int] | None, ...]

    def __hash__(self) -> int:
        return hash(self.code)


def _taken_apart(function: Any, within: tuple[Any, ...] = ()) -> tuple[list[Any], _Whole | _Recipe]:
    """The values that a function holds, and what remains of it.

    >>> values, recipe = _taken_apart(functools.partial(pow, 3))
    >>> values, _put_together(recipe, [pow, 2])(5)
    ([<built-in function pow>, 3], 32)
    """
    is_opaque = not isinstance(function, (FunctionType, functools.partial)) or any(function is outer for outer in within)
    if is_opaque or torch.compiler.is_compiling():  # dynamo lifts what a function holds by itself
        return [], _Whole(function)
    if isinstance(function, functools.partial):
        code, held = None, (function.func, function.args, function.keywords)
    else:
        try:
            held = tuple(cell.cell_contents for cell in function.__closure__ or ())
        except ValueError:  # a cell that nothing was put into yet
            return [], _Whole(function)
        if not held:
            return [], _Whole(function)
        code = function.__code__
    leaves, spec = torch.utils._pytree.tree_flatten(held)
    values: list[Any] = []
    parts: list[tuple[Any, int] | None] = []
    for leaf in leaves:
        if isinstance(leaf, (FunctionType, functools.partial)):
            inner, recipe = _taken_apart(leaf, (*within, function))
            parts.append((recipe, len(inner)))
            values += inner
        else:
            parts.append(None)
            values.append(leaf)
    return values, _Recipe(code, _rebuild(function), spec, tuple(parts))


def _as_partial(held: Any) -> Any:
    function, args, keywords = held
    return functools.partial(function, *args, **keywords)


def _rebuild(function: FunctionType | functools.partial[Any]) -> Callable[[Any], Any]:
    """What makes a function like this one that holds other values; it does not hold those of this one."""
    if isinstance(function, functools.partial):
        return _as_partial
    code, names, name, defaults = function.__code__, function.__globals__, function.__name__, function.__defaults__
    others = {"__qualname__": function.__qualname__, "__kwdefaults__": function.__kwdefaults__}
    more = dict(function.__dict__)

    def build(held: Any) -> Any:
        result = FunctionType(code, names, name, defaults, tuple(CellType(value) for value in held))
        for attribute, value in others.items():
            setattr(result, attribute, value)
        vars(result).update(more)
        return result

    return build


def _put_together(recipe: _Whole | _Recipe, values: Sequence[Any]) -> Any:
    """The function again, holding these values."""
    if isinstance(recipe, _Whole):
        return recipe.function

    def leaves(left: list[Any]) -> Iterator[Any]:
        for part in recipe.parts:
            if part is None:
                yield left.pop(0)
            else:
                inner, num_values = part
                yield _put_together(inner, left[:num_values])
                del left[:num_values]

    return recipe.build(torch.utils._pytree.tree_unflatten(list(leaves(list(values))), recipe.spec))


class _MaskModWrapper:
    """A mask function in the context of a tree: equal to another that does the same, whatever values they hold."""

    __slots__ = ("fn",)

    def __init__(self, fn: Any) -> None:
        self.fn = fn if isinstance(fn, (_Whole, _Recipe)) else _Whole(fn)

    def __call__(self, *indices: Any) -> Any:
        """The function's answer for (batch, head, query, key) indices, if it holds no values."""
        if isinstance(self.fn, _Recipe):
            raise RuntimeError("this mask function is without the values that it holds; unflatten the BlockMask first")
        return self.fn.function(*indices)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _MaskModWrapper) and self.fn == other.fn

    def __hash__(self) -> int:
        return hash(self.fn)

    def __repr__(self) -> str:
        return f"_MaskModWrapper({self.fn})"


def _flatten_with_keys(self: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
    """The tensors of this BlockMask and the values of its mask function, each with its key; and the rest, the context."""
    key = torch.utils._pytree.GetAttrKey
    values, recipe = _taken_apart(self.mask_mod)
    absent = tuple(name for name in _TENSORS if getattr(self, name) is None)
    tensors = ((key(name), getattr(self, name)) for name in _TENSORS if name not in absent)
    closure = ((key(f"_closure_{position}"), value) for position, value in enumerate(values))
    context = (self.seq_lengths, self.BLOCK_SIZE, _MaskModWrapper(recipe), absent)
    return (*tensors, *closure), context


def _flatten(self: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The tensors of this BlockMask and the values of its mask function; and the rest, the context."""
    leaves, context = _flatten_with_keys(self)
    return tuple(value for _, value in leaves), context


def _unflatten(cls: Any, leaves: Sequence[Any], context: Sequence[Any]) -> Any:
    """A BlockMask of what `_flatten` gave."""
    BACKPORT.record_use("BlockMask._unflatten")
    seq_lengths, block_size, mask, absent = context
    names = [name for name in _TENSORS if name not in absent]
    return cls(
        seq_lengths=seq_lengths,
        BLOCK_SIZE=block_size,
        mask_mod=_put_together(mask.fn, leaves[len(names) :]),
        **dict.fromkeys(absent),
        **dict(zip(names, leaves)),
    )


def _lacks(module: ModuleType | None) -> bool:
    return module is None or vars(module.BlockMask).get("_flatten", _flatten) is _flatten


def _new(name: str, method: object) -> Change:
    return Change(_PLACE, f"BlockMask.{name}", lambda old: old or method, create=True)


BACKPORT = Backport(
    name="block_mask_pytree",
    summary="BlockMask._flatten, _unflatten, _flatten_with_keys, to register flex attention's mask as a pytree",
    target=_PLACE,
    since="2.10.0",
    came={"2.11.0": ("_MaskModWrapper",)},
    upstream="https://github.com/pytorch/pytorch/pull/164940",
    differs="it has no tensors that this torch's BlockMask has not",
    names={"_MaskModWrapper": lambda: _MaskModWrapper},
    also=(
        _new("_flatten", _flatten),
        _new("_unflatten", classmethod(_unflatten)),
        _new("_flatten_with_keys", _flatten_with_keys),
    ),
    lacks=_lacks,
)
