"""How near two results must be: the one place of tolerances, by dtype, and a comparison of nested results."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Tolerance:
    """Two numbers are near if they differ by at most ``relative * (|expected| + rms(expected)) + absolute``.

    The root mean square of the tensor takes part because a compiler may sum in another order: an element near zero that is a
    difference of large terms is no more precise than those.
    """

    relative: float
    absolute: float


TOLERANCES: Mapping[torch.dtype, Tolerance] = {
    torch.float64: Tolerance(1e-9, 1e-12),
    torch.complex128: Tolerance(1e-9, 1e-12),
    torch.float32: Tolerance(1e-4, 1e-6),
    torch.complex64: Tolerance(1e-4, 1e-6),
    torch.bfloat16: Tolerance(3e-2, 1e-4),
    torch.float16: Tolerance(4e-3, 1e-5),
}
EXACT = Tolerance(0.0, 0.0)
_PIECE = 1 << 18  # elements that are compared at a time
_COARSE = Tolerance(1.25e-1, 1e-3)  # 8-bit floats: two or three bits of mantissa


def tolerance(*dtypes: torch.dtype) -> Tolerance:
    """The tolerance of a computation that passed through all these `dtypes`: the widest of theirs; integers are exact.

    >>> tolerance(torch.float32), tolerance(torch.int64)
    (Tolerance(relative=0.0001, absolute=1e-06), Tolerance(relative=0.0, absolute=0.0))
    >>> tolerance(torch.float32, torch.bfloat16) == tolerance(torch.bfloat16)
    True
    """
    known = [TOLERANCES.get(dtype, _COARSE) for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    return max(known, key=lambda limit: limit.relative, default=EXACT)


def difference(actual: Any, expected: Any, *through: torch.dtype, name: str = "output") -> str | None:
    """What differs between two nested results beyond tolerance, in words; None if nothing does.

    `through` are the dtypes that the computation passed through besides the results' own (autocast, low-precision weights). NaN
    equals NaN, as eager's own NaN is what was asked for.

    >>> difference({"loss": torch.ones(2)}, {"loss": torch.ones(2)})
    >>> difference([torch.zeros(2)], [torch.ones(2)])
    'output[0]: 2 of 2 elements differ, by up to 1 (tolerance 0.000201)'
    """
    return next(_differences(actual, expected, through, name), None)


def _differences(actual: Any, expected: Any, through: tuple[torch.dtype, ...], name: str) -> Iterator[str]:
    if isinstance(expected, torch.Tensor):
        yield from _tensor_difference(actual, expected, through, name)
    elif isinstance(actual, torch.Tensor) or type(actual) is not type(expected):
        yield f"{name}: {type(actual).__name__} instead of {type(expected).__name__}"
    else:
        yield from _container_differences(actual, expected, through, name)


def _container_differences(actual: Any, expected: Any, through: tuple[torch.dtype, ...], name: str) -> Iterator[str]:
    actual_parts, expected_parts = dict(parts(actual)), dict(parts(expected))
    if actual_parts.keys() != expected_parts.keys():
        yield f"{name}: {len(actual_parts)} parts instead of {len(expected_parts)}"
        return
    for key, value in expected_parts.items():
        yield from _differences(actual_parts[key], value, through, f"{name}{key}")
    is_number = isinstance(expected, (bool, int, float, complex))
    if is_number and not torch.tensor(actual).isclose(torch.tensor(expected), equal_nan=True):
        yield f"{name}: {actual!r} instead of {expected!r}"
    if isinstance(expected, str) and actual != expected:
        yield f"{name}: {actual!r} instead of {expected!r}"


def parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What a mapping, a sequence or a dataclass holds, each with how it is reached; nothing for anything else.

    >>> list(parts({"a": 1})), list(parts((2,)))
    ([("['a']", 1)], [('[0]', 2)])
    """
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", item) for key, item in value.items()]
    if isinstance(value, (tuple, list)):
        return [(f"[{index}]", item) for index, item in enumerate(value)]
    if is_dataclass(value):
        return [(f".{field.name}", getattr(value, field.name)) for field in fields(value)]
    return []


def tensors(value: Any) -> list[torch.Tensor]:
    """Every tensor in a nested value, in order.

    >>> len(tensors({"a": torch.ones(1), "b": [torch.ones(1), 3]}))
    2
    """
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for _, item in parts(value) for tensor in tensors(item)]


def as_real(value: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs of real numbers; any other as it is.

    >>> as_real(torch.ones(2, dtype=torch.complex64)).shape
    torch.Size([2, 2])
    """
    return torch.view_as_real(value) if value.is_complex() else value


def but_rounding(
    actual: list[torch.Tensor | None], expected: list[torch.Tensor | None], *through: torch.dtype
) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
    """Both gradients, with zeros for those that are zero but for rounding, as that of a bias before a batch norm is.

    Rounding is what is beyond the precision of the largest gradient, in both.

    >>> noise, other = torch.tensor([1e-5]), torch.tensor([-2e-5])
    >>> but_rounding([torch.ones(1), noise], [torch.ones(1), other])
    ([tensor([1.]), tensor([0.])], [tensor([1.]), tensor([0.])])
    """
    limit = rounding_limit(expected, *through)
    is_noise = [is_below(a, limit) and is_below(b, limit) for a, b in zip(actual, expected, strict=True)]
    return _zeroed(actual, is_noise), _zeroed(expected, is_noise)


def rounding_limit(expected: Iterable[torch.Tensor | None], *through: torch.dtype) -> float:
    """The root mean square up to which a gradient beside these is rounding: the precision of the largest of them."""
    known = [tensor for tensor in expected if tensor is not None and tensor.layout is torch.strided and tensor.numel()]
    return max((tolerance(tensor.dtype, *through).relative * _rms(tensor) for tensor in known), default=0.0)


def _zeroed(values: list[torch.Tensor | None], which: list[bool]) -> list[torch.Tensor | None]:
    return [
        torch.zeros_like(value) if is_zero and value is not None else value
        for value, is_zero in zip(values, which, strict=True)
    ]


def is_below(value: torch.Tensor | None, limit: float) -> bool:
    """Whether a gradient is rounding, see :func:`rounding_limit`."""
    return value is not None and value.layout is torch.strided and value.numel() > 0 and _rms(value) <= limit


def _rms(value: torch.Tensor) -> float:
    real = as_real(value.detach())
    return math.sqrt(sum(_sum_of_squares(piece) for (piece,) in _pieces(real)) / max(real.numel(), 1))


def _sum_of_squares(values: torch.Tensor) -> float:
    """Of a vector of real numbers: in single precision, which is five times as fast, unless that is too small or too large."""
    if values.dtype in (torch.float32, torch.bfloat16, torch.float16):
        single = values.float()
        total = float(torch.dot(single, single))
        if 1e-20 < total < math.inf:
            return total
    return float(values.double().square().sum())


def _finite_rms(value: torch.Tensor) -> float:
    """The root mean square of a tensor, with zeros for what is not finite."""
    real = as_real(value)
    total = 0.0
    for (piece,) in _pieces(real):
        squares = _sum_of_squares(piece)
        total += squares if math.isfinite(squares) else _sum_of_squares(piece.where(piece.isfinite(), 0))
    return math.sqrt(total / value.numel())


def _pieces(*values: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Tensors of one shape, one part of each at a time, so that computing in double precision takes little memory."""
    return zip(*(value.reshape(-1).split(_PIECE) for value in values), strict=True)


def _tensor_difference(actual: Any, expected: torch.Tensor, through: tuple[torch.dtype, ...], name: str) -> Iterator[str]:
    if not isinstance(actual, torch.Tensor):
        yield f"{name}: {type(actual).__name__} instead of a tensor"
        return
    for what in ("shape", "dtype", "device"):
        actual_value, expected_value = getattr(actual, what), getattr(expected, what)
        if actual_value != expected_value:
            yield f"{name}: {what} {_short(actual_value)} instead of {_short(expected_value)}"
            return
    if expected.numel() and not expected.is_meta:
        yield from _value_difference(actual.detach(), expected.detach(), tolerance(expected.dtype, *through), name)


def _value_difference(actual: torch.Tensor, expected: torch.Tensor, allowed: Tolerance, name: str) -> Iterator[str]:
    if not (expected.dtype.is_floating_point or expected.dtype.is_complex):
        num_wrong = int((actual != expected).sum())
        if num_wrong:
            yield f"{name}: {num_wrong} of {expected.numel()} elements differ"
        return
    if expected.layout is not torch.strided:
        actual, expected = actual.to_dense(), expected.to_dense()
    wide = torch.complex128 if expected.dtype.is_complex else torch.float64
    rms = _finite_rms(expected)
    num_wrong, worst, at_most = 0, 0.0, 0.0
    for actual_piece, expected_piece in _pieces(actual, expected):
        if _is_within(actual_piece, expected_piece, (allowed.relative * rms + allowed.absolute) / 2):
            continue
        gap, limit = _gap_and_limit(actual_piece.to(wide), expected_piece.to(wide), rms, allowed)
        wrong = ~(gap <= limit)
        if wrong.any():
            num_wrong += int(wrong.sum())
            worst, at_most = _larger(worst, float(gap[wrong].max())), max(at_most, float(limit[wrong].max()))
    if num_wrong:
        yield f"{name}: {num_wrong} of {expected.numel()} elements differ, by up to {worst:.4g} (tolerance {at_most:.3g})"


def _is_within(actual: torch.Tensor, expected: torch.Tensor, limit: float) -> bool:
    """Whether no element differs by more, seen in the tensors' own precision, which is faster; False where that cannot say."""
    return expected.dtype in TOLERANCES and bool(torch.linalg.vector_norm(actual - expected, math.inf) <= limit)


def _larger(first: float, second: float) -> float:
    return first if math.isnan(first) else max(second, first)


def _size(value: torch.Tensor) -> torch.Tensor:
    return torch.where(value.isfinite(), value, 0).abs()


def _gap_and_limit(
    actual: torch.Tensor, expected: torch.Tensor, rms: float, allowed: Tolerance
) -> tuple[torch.Tensor, torch.Tensor]:
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    gap = torch.where(same, 0, (actual - expected).abs())
    return gap, allowed.relative * (_size(expected) + rms) + allowed.absolute


def _short(value: Any) -> str:
    return str(tuple(value)) if isinstance(value, torch.Size) else str(value)
