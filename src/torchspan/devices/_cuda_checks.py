"""What CUDA checks of where an operator's arguments lie, and the words in which torch refuses them: pure functions of operands.

torch's own table of its operators, which comes with it, says which kernels of CUDA have a check that torch generates (every
tensor lies where the first one does) and which leave it to TensorIterator (one tensor without dimensions may lie on the host).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torchgen  # type: ignore[import-untyped]

from torchspan.devices._memories import DEVICE, HOST, UNKNOWN, Memory

_TABLE = Path(torchgen.__file__).parent / "packaged" / "ATen" / "native" / "native_functions.yaml"
_OF_CUDA = re.compile(r"^    (?:\w+, )*CUDA(?:, \w+)*:|^  structured_delegate:", re.MULTILINE)
_IS_STRUCTURED = re.compile(r"^  structured(?:_delegate)?:", re.MULTILINE)
_NAMES = {DEVICE: "cuda:0", HOST: "cpu"}
_SAME = "Expected all tensors to be on the same device, but "


@dataclass(frozen=True)
class Operand:
    """One tensor that an operator is given: the name of its argument, where it lies, and whether it is written to."""

    name: str
    tensor: torch.Tensor
    memory: Memory
    is_written: bool = False

    @property
    def is_number(self) -> bool:
        """Whether a kernel of CUDA reads it as a number: it has no dimensions and lies on the host."""
        return self.memory is HOST and self.tensor.dim() == 0 and not self.is_written

    @property
    def device(self) -> str:
        """Its device, as torch writes it."""
        return _NAMES.get(self.memory, "cpu")

    @property
    def kind(self) -> str:
        """Its type, as torch writes it."""
        name: str = _type_of(self.tensor)
        return name.replace("torch.", "torch.cuda.", 1) if self.memory is DEVICE else name


_type_of: Any = torch._C.TensorBase.type
Judge = Callable[[Sequence[Operand]], Memory]
"""Says where the result lies; raises torch's error where CUDA does."""


# the checks


def iterated(operands: Sequence[Operand], *, most_numbers: int | None = 1) -> Memory:
    """TensorIterator's check: the device is that of the first tensor on CUDA; numbers may lie on the host."""
    numbers = [operand for operand in operands if operand.is_number]
    for operand in operands:
        if operand.memory is HOST and not operand.is_number:
            raise RuntimeError(f"{_SAME}found at least two devices, cuda:0 and cpu!")
    if most_numbers is not None and len(numbers) > most_numbers:
        raise RuntimeError("Trying to pass too many CPU scalars to non-CPU kernel!")
    return DEVICE


def alike(operands: Sequence[Operand], *, kernel: str, renamed: tuple[tuple[str, str], ...] = ()) -> Memory:
    """The check that torch generates for `kernel`: every tensor lies where the first does."""
    known = [operand for operand in operands if operand.memory is not UNKNOWN]
    first = known[0]
    for operand in known:
        if operand.memory is not first.memory:
            name = dict(renamed).get(operand.name, operand.name)
            raise RuntimeError(
                f"{_SAME}got {name} is on {operand.device}, different from other tensors on {first.device} "
                f"(when checking argument in method {kernel})"
            )
    return first.memory


def anywhere(operands: Sequence[Operand]) -> Memory:
    """No check: a copy, or what reads a shape only. The result lies where the first tensor does."""
    return operands[0].memory


def indexed(operands: Sequence[Operand]) -> Memory:
    """``x[index]`` and ``x[index] = values``: an index may lie on the host, a value without dimensions anywhere."""
    target = operands[0]
    for operand in operands[1:]:
        if operand.name == "indices" and operand.memory is DEVICE and target.memory is HOST:
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        is_value = operand.name == "values" and operand.tensor.dim() > 0
        if is_value and {operand.memory, target.memory} == {HOST, DEVICE}:
            raise RuntimeError(f"{_SAME}found at least two devices, cuda:0 and cpu!")
    return target.memory


def masked(operands: Sequence[Operand]) -> Memory:
    """``masked_fill``: a mask lies with its tensor, a value without dimensions anywhere."""
    target, mask = operands[:2]
    if {target.memory, mask.memory} == {HOST, DEVICE}:
        raise RuntimeError(
            f"expected self and mask to be on the same device, but got mask on {mask.device} and self on {target.device}"
        )
    return target.memory


def convolved(operands: Sequence[Operand]) -> Memory:
    """A convolution compares the types of its tensors, which name their devices."""
    image = operands[0]
    for other in operands[1:]:
        if {image.memory, other.memory} == {HOST, DEVICE}:
            more = f" or input should be a MKLDNN tensor and {other.name} is a dense tensor" if image.memory is HOST else ""
            raise RuntimeError(f"Input type ({image.kind}) and {other.name} type ({other.kind}) should be the same{more}")
    return image.memory


def attended(operands: Sequence[Operand]) -> Memory:
    """``scaled_dot_product_attention`` names all three devices."""
    query, key, value = operands[:3]
    if len({operand.memory for operand in (query, key, value)} - {UNKNOWN}) > 1:
        raise RuntimeError(
            "Expected query, key, and value to have the same device type, but got "
            f"query.device: {query.device} key.device: {key.device} and value.device: {value.device} instead."
        )
    return iterated(operands)


def recurrent(operands: Sequence[Operand]) -> Memory:
    """``nn.LSTM`` compares its input with the hidden state, then with the parameters."""
    input_, *rest = operands
    hidden = [("hidden", other) for other in rest if other.name.startswith(("hx", "cx"))]
    for name, other in (*hidden, *(("parameter", other) for other in rest if other.name.startswith("weight"))):
        if {input_.memory, other.memory} == {HOST, DEVICE}:
            raise RuntimeError(
                f"Input and {name} tensors are not at the same device, found input tensor at {input_.device} "
                f"and {name} tensor at {other.device}"
            )
    return input_.memory


def packed(operands: Sequence[Operand]) -> Memory:
    """``pack_padded_sequence``: the lengths lie on the host."""
    lengths = operands[1]
    if lengths.memory is DEVICE:
        kind = lengths.kind.rpartition(".")[2].removesuffix("Tensor")
        raise RuntimeError(
            "'lengths' argument should be a 1D CPU int64 tensor, but got "
            f"{lengths.tensor.dim()}D {lengths.device} {kind} tensor"
        )
    return operands[0].memory


# which check an operator has

_UNCHECKED = (
    "copy",
    "copy_",
    "_copy_from",
    "_copy_from_and_resize",
    "_to_copy",
    "_foreach_copy_",
    "fill_",
    "set_",
    "set_data",
    "is_set_to",
    "is_same_size",
    "result_type",
    "broadcast_tensors",
    "expand_as",
    "view_as",
    "reshape_as",
    "resize_as_",
    "_has_compatible_shallow_copy_type",
)
_BY_NAME: dict[str, Judge] = {
    **dict.fromkeys(_UNCHECKED, anywhere),
    **dict.fromkeys(["index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"], indexed),
    **dict.fromkeys(("masked_fill", "masked_fill_"), masked),
    **dict.fromkeys(("convolution", "_convolution", "convolution_overrideable"), convolved),
    **dict.fromkeys(("_fused_sdp_choice", "_scaled_dot_product_flash_attention_for_cpu"), attended),
    "where": partial(iterated, most_numbers=None),
    "_pack_padded_sequence": packed,
    "mkldnn_rnn_layer": recurrent,
    "embedding": partial(alike, kernel="wrapper_CUDA__index_select", renamed=(("indices", "index"),)),
    "stack": partial(alike, kernel="wrapper_CUDA_cat"),
}
OF_MANY = "_foreach_"
"""How the names of operators begin that do the same for each tensor of a list."""


def judge_of(name: str, overload: str) -> Judge:
    """The check of the operator ``aten::name.overload``; TensorIterator's where torch's table does not tell."""
    by_name = _BY_NAME.get(name)
    if by_name is not None:
        return by_name
    kernel = _kernels().get(f"{name}.{overload}" if overload else name)
    return iterated if kernel is None else partial(alike, kernel=kernel)


@lru_cache(maxsize=1)
def _kernels() -> dict[str, str]:
    """The kernel of CUDA by the operator's full name, of the operators for which torch generates a check."""
    if not _TABLE.exists():
        return {}
    kernels = {}
    for entry in _TABLE.read_text().split("\n- func: ")[1:]:
        if "device_check: NoCheck" not in entry and _OF_CUDA.search(entry):
            name = entry.partition("(")[0]
            kernels[name] = _kernel(name, bool(_IS_STRUCTURED.search(entry)))
    return kernels


def _kernel(name: str, is_structured: bool) -> str:
    """What torch calls the function that holds the check."""
    base, _, overload = name.partition(".")
    suffix = "_out" if overload == "out" or overload.endswith("_out") else ""
    return f"wrapper_CUDA_{base}{suffix}" if is_structured else f"wrapper_CUDA_{overload}_{base}{suffix}"
