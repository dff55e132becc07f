"""What the rules share: the patches of a facade, and wrappers that torch's compilers can read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch

from torchspan.devices import _redirect
from torchspan.devices._redirect import Redirection, asked_by_torch
from torchspan.environment.patch import Patch, Redefinition

Function = Callable[..., Any]
is_compiling = torch.compiler.is_compiling

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


def placing(redirection: Redirection, old: Function, name: str, module: str = "torch", *, is_view: bool = False) -> Function:
    """A function that makes a tensor, `old`, with a device or pinned memory that is not here redirected.

    Without ``device`` and ``pin_memory`` it is one call of `old`. The branch for compilers is what dynamo reads: plain values,
    no bookkeeping. With `is_view`, `old` may give its argument back, where a GPU would have made a copy.
    """
    kinds, target = redirection.kinds, redirection.target
    traced = partial(_note_traced, redirection, name)

    def note_traced(context: Any) -> None:
        traced(context)

    def function(*args: Any, **kwargs: Any) -> Any:
        if not kwargs:
            return old(*args)
        if "device" not in kwargs and "pin_memory" not in kwargs:
            return old(*args, **kwargs)
        if is_compiling():
            device = kwargs.get("device")
            if _redirect.comptime is not None:
                _redirect.comptime(note_traced, lambda: _note_run(redirection, name, device))
            return old(*args, **_constants(kwargs, kinds, target))
        return _place(redirection, old, name, args, kwargs, is_view)

    redirection.originals[id(function)] = old
    return named_like(function, old, module)


def _note_traced(redirection: Redirection, name: str, context: Any) -> None:
    """Called by dynamo while it reads the wrapper: records the line of the program that it is reading."""
    reader = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    device = context.get_local("device").as_python_constant()
    while reader.parent is not None and _redirect.is_torchs(reader.f_globals, reader.f_code):
        reader = reader.parent
    if redirection.lookup(device) is not None:
        redirection.note_at(f"{reader.f_code.co_filename}:{reader.lineno}", name, device)


def _note_run(redirection: Redirection, name: str, device: object) -> None:
    """Called where the wrapper is run, not read, for a compiler."""
    if redirection.lookup(device) is not None:
        redirection.note(name, device)


def _constants(kwargs: dict[str, Any], kinds: tuple[str, ...], target: str) -> dict[str, Any]:
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
    redirection: Redirection, old: Function, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], is_view: bool
) -> Any:
    if _redirect.in_force is not redirection:
        return old(*args, **kwargs)
    device = kwargs.get("device")
    target = redirection.lookup(device)
    if kwargs.pop("pin_memory", False):
        redirection.note(f"{name}(pin_memory=True)", None, "simulated: memory is not pinned without an accelerator")
        tensor = old(*args, **kwargs)
        tensor.untyped_storage()._torchspan_pinned = True
        return tensor
    if target is None:
        return old(*args, **kwargs)
    kwargs["device"] = target
    redirection.note(name, device)
    if "dtype" in kwargs:
        kwargs["dtype"] = redirection.narrowed(name, kwargs["dtype"])
    try:
        tensor = old(*args, **kwargs)
    except RuntimeError as cause:
        if "allocate memory" not in str(cause):
            raise
        raise torch.OutOfMemoryError(f"{cause}") from cause  # what a program for a GPU catches
    if is_view and target.type == "cpu" and not _is_placed(redirection, args, kwargs):
        tensor = tensor.clone() if tensor.is_leaf and not tensor.requires_grad else tensor.to(tensor.device, copy=True)
    return redirection.mark(tensor)


def _is_placed(redirection: Redirection, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the data is a tensor that the program believes to be there already."""
    data = args[0] if args else kwargs.get("data", kwargs.get("obj"))
    return isinstance(data, torch.Tensor) and redirection.is_marked(data)
