"""The kinds of guards: what each checks of a value, and what it says when the check fails."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import torch

from torchspan.artifacts.code_digest import digest_class, digest_function, is_own_code, is_torch_code
from torchspan.artifacts.values import decode, name_of

Check = Callable[[Any], "str | None"]


class Failed(Exception):
    """A guard does not hold; its text says which, and why. It is caught in this folder."""


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor guard compares, as JSON."""
    return {
        "type": name_of(type(tensor)),
        "dtype": str(tensor.dtype),
        "device": str(tensor.device),
        "layout": str(tensor.layout),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()) if tensor.layout is torch.strided else [],
        "requires_grad": tensor.requires_grad,
        "flags": [tensor.is_conj(), tensor.is_neg()],
    }


def _tensor(expected: Any) -> Check:
    if None in (*expected["shape"], *expected["stride"]):
        return _tensor_of_any_size(expected)
    shape, stride = torch.Size(expected["shape"]), tuple(expected["stride"])
    dtype = decode({"dtype": expected["dtype"].removeprefix("torch.")})
    device, wants_grad, type_name = torch.device(expected["device"]), expected["requires_grad"], expected["type"]
    plain = expected["layout"] == "torch.strided" and expected["flags"] == [False, False]
    kinds: set[type] = set()

    def check(value: Any) -> str | None:
        kind = type(value)
        if kind not in kinds:
            if name_of(kind) != type_name:
                return f"expected a {type_name.partition(':')[2]}, found a {kind.__qualname__}"
            kinds.add(kind)
        same = value.dtype is dtype and value.shape == shape and value.device == device
        same = same and (wants_grad is None or value.requires_grad is wants_grad)
        if same and plain and value.layout is torch.strided and value.stride() == stride and not _is_lazy(value):
            return None
        actual = describe_tensor(value)
        compared = [key for key in expected if key != "requires_grad" or wants_grad is not None]
        differ = [f"{key} {actual[key]} (expected {expected[key]})" for key in compared if actual[key] != expected[key]]
        return f"has {', '.join(differ)}" if differ else None

    return check


def _tensor_of_any_size(expected: Any) -> Check:
    """The check of a tensor with dynamic dimensions: None in its shape and strides; conditions on sizes check those."""

    def fits(name: str, actual_value: Any) -> bool:
        expected_value = expected[name]
        if name not in ("shape", "stride"):
            return bool(actual_value == expected_value)
        return len(actual_value) == len(expected_value) and all(
            size in (None, is_now) for size, is_now in zip(expected_value, actual_value)
        )

    def check(value: Any) -> str | None:
        if not isinstance(value, torch.Tensor):
            return f"expected a tensor, found a {type(value).__qualname__}"
        actual = describe_tensor(value)
        differ = [f"{key} {actual[key]} (expected {_any(expected[key])})" for key in expected if not fits(key, actual[key])]
        return f"has {', '.join(differ)}" if differ else None

    return check


def _any(expected: Any) -> Any:
    if not isinstance(expected, list):
        return expected
    return f"[{', '.join('any' if item is None else str(item) for item in expected)}]"


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are the conjugates or the negatives of what its memory holds."""
    return tensor.is_conj() or tensor.is_neg()


def _constant(expected: Any) -> Check:
    constant = decode(expected)
    kind, is_nan, written = type(constant), constant != constant, repr(constant) if is_equal_to_others(constant) else None

    def check(value: Any) -> str | None:
        if type(value) is kind and (value == constant or (is_nan and value != value)) and written in (None, repr(value)):
            return None
        return f"is {value!r:.80}, expected {constant!r:.80}"

    return check


def is_equal_to_others(constant: Any) -> bool:
    """Whether ``==`` cannot tell a constant from another one of its type: -0.0 from 0.0, or (True,) from (1,)."""
    return isinstance(constant, (tuple, list, dict)) or (isinstance(constant, (float, complex)) and not constant)


def _type(expected: Any) -> Check:
    name, digest = expected
    known: dict[type, Any] = {}

    def check(value: Any) -> str | None:
        kind = type(value)
        if kind in known:
            changed = known[kind] is not getattr(kind, "forward", None)
            return f"the forward of its class {kind.__qualname__} was replaced" if changed else None
        actual_name = name_of(kind) if ":" in name else kind.__qualname__  # without a module: wherever the class is defined
        if actual_name != name:
            return f"is a {actual_name}, expected a {name}"
        is_module = hasattr(kind, "forward")  # also one of torch, whose forward somebody may have replaced
        if (digest is not None or is_module) and digest_class(kind) != digest:
            return f"the code of its class {name} is not what it was when the artifact was made"
        known[kind] = getattr(kind, "forward", None)
        return None

    return check


def _remembering(check: Check, key: Callable[[Any], Any] = lambda value: value) -> Check:
    """`check`, which accepts an object again without looking if it accepted it before; `key` tells objects apart."""
    known: list[Any] = []

    def remembered(value: Any) -> str | None:
        seen = key(value)
        if any(seen is entry for entry in known):
            return None
        failure = check(value)
        if failure is None:
            known.append(seen)
        return failure

    return remembered


def _function(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        if digest_function(value) != expected:
            return f"the code of {name_of(value)} is not what it was when the artifact was made"
        return None

    return _remembering(check, lambda value: getattr(value, "__code__", value))


def _named(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        actual = identity_of(value)
        return None if actual == expected else f"is {actual}, expected {expected}"

    return _remembering(check)


def _torch_function(expected: Any) -> Check:
    """The check that torch's function of that name is still torch's own, or torchspan's replacement of it."""
    module, name = expected

    def check(value: Any) -> str | None:
        is_builtin = not hasattr(value, "__code__")
        is_right = getattr(value, "__module__", None) == module if is_builtin else is_torch_made(value)
        is_right = is_right and getattr(value, "__name__", None) == name
        return None if is_right else f"is {name_of(value)}, not torch's {name}"

    return _remembering(check)


def is_torch_made(value: Any) -> bool:
    """Whether a Python function is torch's, or torchspan's stand-in for one of torch.

    >>> is_torch_made(torch.nn.functional.relu), is_torch_made(lambda x: x)
    (True, False)
    """
    code = value.__code__
    if code.co_filename == contextlib.__file__:  # a context manager: what it is made of counts
        return is_torch_made(value.__wrapped__)
    return is_torch_code(code) or is_own_code(code)


def identity_of(value: Any) -> list[str]:
    """What names an object that exists once in every process: a module, class, builtin or operator.

    >>> identity_of(torch.nn.functional), identity_of(len)
    (['module', 'torch.nn.functional'], ['builtin_function_or_method', 'builtins:len'])
    """
    kind = type(value).__qualname__
    if isinstance(value, ModuleType):
        return ["module", str(value.__name__)]
    is_text = kind.startswith("OpOverload") or kind.endswith(("UnionType", "GenericAlias"))
    return [kind, str(value) if is_text else name_of(value)]


def _length(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        return None if len(value) == expected else f"has length {len(value)}, expected {expected}"

    return check


def _keys(expected: Any) -> Check:
    keys = decode(expected)

    def check(value: Any) -> str | None:
        return None if list(value) == keys else f"has the keys {list(value)!r:.120}, expected {keys!r:.120}"

    return check


def _contains(expected: Any) -> Check:
    key, is_there = decode(expected[0]), expected[1]

    def check(value: Any) -> str | None:
        return None if (key in value) is is_there else f"{'lacks' if is_there else 'has'} {key!r}"

    return check


def _own_attribute(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        return f"has an attribute {expected!r} of its own" if expected in vars(value) else None

    return check


def _has_attribute(expected: Any) -> Check:
    name, is_there = expected

    def check(value: Any) -> str | None:
        return None if hasattr(value, name) is is_there else f"{'lacks' if is_there else 'has'} the attribute {name!r}"

    return check


def _not_none(_: Any) -> Check:
    return lambda value: "is None" if value is None else None


def _file(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        if hashlib.sha256(FilePath(value).read_bytes()).hexdigest() == expected:
            return None
        return f"({value}) is not the source that the artifact was made from"

    return check


CHECKS: Mapping[str, Callable[[Any], Check]] = {
    "tensor": _tensor,
    "constant": _constant,
    "type": _type,
    "function": _function,
    "named": _named,
    "length": _length,
    "keys": _keys,
    "contains": _contains,
    "own_attribute": _own_attribute,
    "has_attribute": _has_attribute,
    "not_none": _not_none,
    "file": _file,
    "torch_function": _torch_function,
}
