"""Example inputs from text, as the command line takes them."""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from torchspan.core.errors import InputError

_INPUT = re.compile(r"\s*([a-z_0-9]+)\s*(?:\[((?:\s*(?:[a-zA-Z_]\w*\s*=)?\s*[0-9]+\s*,?)*\s*)\])?\s*")


def parse_inputs(text: str) -> tuple[torch.Tensor, ...]:
    """Example tensors from text such as ``float32[4,10],int64[2]``: a dtype and a shape each; ``float32`` alone is a scalar.

    A size such as ``batch=4`` is that of a dynamic dimension, see `parse_dynamic`. Floating and complex numbers are normal,
    integers 0 or 1 (valid as indices), from a generator of their own.

    >>> [(tensor.dtype, tuple(tensor.shape)) for tensor in parse_inputs("float32[4,10], int64[2]")]
    [(torch.float32, (4, 10)), (torch.int64, (2,))]
    >>> parse_inputs("float32(4)")
    Traceback (most recent call last):
    torchspan.core.errors.InputError: cannot read the inputs 'float32(4)' from '(4)' on; expected such as float32[4,10],int64[2]

    Raises:
        InputError: the text is not of that form, or names no dtype of torch.
    """
    generator = torch.Generator().manual_seed(0)
    return tuple(_make(dtype, [int(size.rpartition("=")[2]) for size in sizes], generator) for dtype, sizes in _split(text))


def parse_dynamic(text: str) -> tuple[dict[int, str], ...]:
    """The dynamic dimensions of each input in text such as ``float32[batch=4,10]``, by name.

    >>> parse_dynamic("float32[batch=4, 10], int64[2]")
    ({0: 'batch'}, {})
    """
    return tuple(
        {dim: size.partition("=")[0].strip() for dim, size in enumerate(sizes) if "=" in size} for _, sizes in _split(text)
    )


def _split(text: str) -> Iterator[tuple[torch.dtype, list[str]]]:
    position = 0
    while True:
        match = _INPUT.match(text, position)
        end = match.end() if match else position
        if match is None or (end < len(text) and text[end] != ","):
            raise InputError(f"cannot read the inputs {text!r} from {text[end:]!r} on; expected such as float32[4,10],int64[2]")
        dtype = getattr(torch, match[1], None)
        if not isinstance(dtype, torch.dtype):
            raise InputError(
                f"{match[1]!r} in the inputs {text!r} is not a dtype of torch; expected such as float32, bfloat16, int64"
            )
        yield dtype, [size for size in (match[2] or "").split(",") if size.strip()]
        if end == len(text):
            return
        position = end + 1


def _make(dtype: torch.dtype, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    try:
        if dtype.is_floating_point or dtype.is_complex:
            wide = torch.complex64 if dtype.is_complex else torch.float32
            return torch.randn(shape, generator=generator, dtype=wide).to(dtype)
        return torch.randint(0, 2, shape, generator=generator).to(dtype)
    except RuntimeError as cause:  # no memory for it, or a dtype that is not for plain tensors
        reason = str(cause).splitlines()[0]
        raise InputError(f"an example of {str(dtype).removeprefix('torch.')}{shape} cannot be made: {reason}") from cause
