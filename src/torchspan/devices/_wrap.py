"""What the rules share: the patches of a facade, and wrappers that torch's compilers can read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from torchspan.core.topics import Standing
from torchspan.devices import _redirect
from torchspan.devices._callers import asked_by_torch, is_torchs
from torchspan.devices._memories import DEVICE, Memory, mark, memory_of
from torchspan.devices._redirect import NARROW, Redirection
from torchspan.environment.facts import machine_memory
from torchspan.environment.patch import Patch, Redefinition

Function = Callable[..., Any]
is_compiling = torch.compiler.is_compiling
is_read_by_dynamo = torch.compiler.is_dynamo_compiling

# Functions of torch that make tensors and take a device.
FACTORIES = [
    "arange",
    "bartlett_window",
    "blackman_window",
    "empty",
    "empty_like",
    "empty_permuted",
    "empty_quantized",
    "empty_strided",
    "eye",
    "from_file",
    "full",
    "full_like",
    "hamming_window",
    "hann_window",
    "kaiser_window",
    "linspace",
    "logspace",
    "normal",
    "ones",
    "ones_like",
    "rand",
    "rand_like",
    "randint",
    "randint_like",
    "randn",
    "randn_like",
    "randperm",
    "range",
    "scalar_tensor",
    "sparse_bsc_tensor",
    "sparse_bsr_tensor",
    "sparse_compressed_tensor",
    "sparse_coo_tensor",
    "sparse_csc_tensor",
    "sparse_csr_tensor",
    "tensor",
    "tril_indices",
    "triu_indices",
    "zeros",
    "zeros_like",
    "_empty_affine_quantized",
    "_empty_per_channel_affine_quantized",
]

BESIDE = ("_like", "torch.tensor", "torch.normal")  # made where their argument is, if that is a tensor

# Methods that make a tensor where another is, if no device is named.
NEW = ["new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"]


def stand_ins(owner: str, module: str, functions: Mapping[str, Function]) -> Iterable[Patch]:
    """Patches that make functions of `module` behave as these, each of which takes what the original takes."""
    for name, function in functions.items():
        yield Redefinition(owner, module, name, partial(_constant, function))


def _constant(value: Function, old: object) -> Function:
    return value


def unless_torch_asks(function: Function, old: Function, *, name: str = "") -> Function:
    """`function` for the program; torch's own code gets what `old` says, which is an error where torch expects one.

    With `name`, what torch calls for the program is the program's, as `asked_by_torch` says.
    """

    def query(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs) if asked_by_torch(name) else function(*args, **kwargs)

    return query


def named_like(new: Function, old: Any, module: str) -> Function:
    """`new` with the name and the documentation of `old`, which is found in `module`; so it is pickled by that name."""
    new.__module__ = module
    new.__name__ = old.__name__
    new.__qualname__ = old.__name__ if module == "torch" else f"Tensor.{old.__name__}"
    new.__doc__ = old.__doc__
    return new


def placing(redirection: Redirection, old: Function, name: str, module: str = "torch") -> Function:
    """A function that makes a tensor, `old`, with a device or pinned memory that is not here redirected.

    Without ``device`` and ``pin_memory`` it is one call of `old`. The branch for compilers is what dynamo reads: plain values,
    no bookkeeping.
    """
    kinds, target = redirection.kinds, torch.device(redirection.target)
    traced = partial(_note_traced, redirection, name)
    made_where = _where_its_argument_is if name.startswith("Tensor.") or name.endswith(BESIDE) else None

    def note_traced(context: Any) -> None:
        traced(context)

    def function(*args: Any, **kwargs: Any) -> Any:
        if not kwargs or ("device" not in kwargs and "pin_memory" not in kwargs):
            result = old(*args, **kwargs) if kwargs else old(*args)
            if is_read_by_dynamo() or not redirection.in_use or "out" in kwargs:  # dynamo guards on what it reads
                return result
            return mark(result, redirection.default_memory() if made_where is None else made_where(redirection, args))
        if is_compiling():
            device = kwargs.get("device")
            if _redirect.comptime is not None:
                _redirect.comptime(note_traced, lambda: _note_run(redirection, name, device))
            return old(*args, **_constants(kwargs, kinds, target))
        return _place(redirection, old, name, made_where, args, kwargs)

    if redirection.lacks_float64:
        function = in_single(redirection, function, old, name, is_beside=made_where is not None)
    redirection.originals[id(function)] = old
    return named_like(function, old, module)


def in_single(redirection: Redirection, factory: Function, old: Function, name: str, *, is_beside: bool) -> Function:
    """`factory`, in single precision where it would make double on a target that has none.

    What type it would make is asked of `old` on the device ``meta``, where nothing is computed.
    """

    def function(*args: Any, **kwargs: Any) -> Any:
        if is_compiling() or not _is_for_target(redirection, args, kwargs, is_beside):
            return factory(*args, **kwargs)
        dtype = kwargs.get("dtype") or _dtype_made(old, args, kwargs)
        if dtype in NARROW:
            kwargs["dtype"] = redirection.narrowed(name, dtype)
        return factory(*args, **kwargs)

    return function


def _is_for_target(redirection: Redirection, args: tuple[Any, ...], kwargs: dict[str, Any], is_beside: bool) -> bool:
    """Whether what is made will be on the accelerator that stands in for CUDA."""
    device = kwargs.get("device")
    if device is None and is_beside and args and isinstance(args[0], torch.Tensor):
        return redirection.is_on_target(args[0])
    if device is None:
        context = redirection._default_context()
        device = None if context is None else context.device
    if device is None:
        return False
    return redirection.lookup(device) is not None or torch.device(device).type == redirection.target_kind


def _dtype_made(old: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    named = {key: value for key, value in kwargs.items() if key not in ("generator", "pin_memory", "out", "requires_grad")}
    return old(*args, **{**named, "device": "meta"}).dtype


def _where_its_argument_is(redirection: Redirection, args: tuple[Any, ...]) -> Memory | None:
    if args and isinstance(args[0], torch.Tensor):
        return memory_of(args[0])
    return redirection.default_memory()


def _note_traced(redirection: Redirection, name: str, context: Any) -> None:
    """Called by dynamo while it reads the wrapper: records the line of the program that it is reading."""
    reader = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    device = context.get_local("device").as_python_constant()
    while reader.parent is not None and is_torchs(reader.f_globals, reader.f_code):
        reader = reader.parent
    if redirection.lookup(device) is not None:
        redirection.note_at(f"{reader.f_code.co_filename}:{reader.lineno}", name, device)


def _note_run(redirection: Redirection, name: str, device: object) -> None:
    """Called where the wrapper is run, not read, for a compiler."""
    if redirection.lookup(device) is not None:
        redirection.note(name, device)


def _constants(kwargs: dict[str, Any], kinds: tuple[str, ...], target: torch.device) -> dict[str, Any]:
    kwargs.pop("pin_memory", None)
    device = kwargs.get("device")
    if isinstance(device, torch.device):
        kind = device.type
    elif isinstance(device, str):
        kind = device.split(":")[0]
    else:
        kind = "cuda" if isinstance(device, int) else ""
    if kind in kinds:
        kwargs["device"] = target
    return kwargs


def _place(
    redirection: Redirection,
    old: Function,
    name: str,
    made_where: Callable[[Redirection, tuple[Any, ...]], Memory | None] | None,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    if _redirect.in_force is not redirection:
        return old(*args, **kwargs)
    device = kwargs.get("device")
    target = redirection.lookup(device)
    is_pinned = kwargs.pop("pin_memory", False)
    if is_pinned and redirection.has_target_module:
        return old(*args, **kwargs).pin_memory()
    if is_pinned:
        reason = "memory is not pinned without an accelerator"
        redirection.note(f"{name}(pin_memory=True)", None, reason, standing=Standing.SIMULATED)
    elif target is not None:
        redirection.note(name, device, depth=3)
        kwargs["device"] = target
    tensor = old(*args, **kwargs) if target is None else _or_out_of_memory(old, args, kwargs)
    if is_pinned:
        tensor.untyped_storage()._torchspan_pinned = True
    if not redirection.in_use or "out" in kwargs:
        return tensor
    if device is None:
        return mark(tensor, redirection.default_memory() if made_where is None else made_where(redirection, args))
    is_device = target is not None and redirection.mode != "torchdevice"  # there, the CPU itself may have been asked for
    return mark(tensor, DEVICE if is_device else redirection.memory_asked(device, depth=3))


def _or_out_of_memory(old: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return old(*args, **kwargs)
    except RuntimeError as cause:
        raise_out_of_memory(cause)
        raise


def raise_out_of_memory(cause: RuntimeError) -> None:
    """Where the CPU's memory did not suffice, raise what a program for a GPU catches, by type or by its text; else return.

    Raises:
        torch.OutOfMemoryError: `cause` says that memory could not be allocated.
    """
    match = re.search(r"you tried to allocate (\d+) bytes", str(cause))
    if match is None and "allocate memory" not in str(cause):
        return
    size = f"{int(match[1]) / 2**30:.2f} GiB" if match else "more than there is"
    memory = machine_memory()
    here = f"{memory.total / 2**30:.2f} GiB, of which {memory.available / 2**30:.2f} GiB are free"
    raise torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {size}. The CPU, which stands in for the GPU, has {here}. ({cause})"
    ) from cause
