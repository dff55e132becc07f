"""The guards of a captured call: what a later call must have in common with it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import CodeType
from typing import Any

import torch
from torch import nn

from torchspan.artifacts.checks import describe_tensor
from torchspan.artifacts.code_digest import digest_class
from torchspan.artifacts.paths import encode_path, follow, parse_path
from torchspan.artifacts.values import encode, name_of
from torchspan.capture.call import CapturedCall, module_source
from torchspan.core.errors import UnsupportedError


def call_guards(call: CapturedCall, args: tuple[object, ...], parts: Any) -> dict[str, Any]:
    """The guards of an entry: on the class, code, parts and mode of modules, on the form of tensors, on all other values.

    Torch's own settings (gradients, autocast, default dtype) are not guarded: the captured operators do not depend on them.
    """
    guarded: dict[str, Any] = json.loads(parts.payloads[parts.program["guards"]])
    guarded["always"] = [*_of_arguments(args), *_of_tensors(call, args)]
    guarded["at_load"], guarded["ambient"] = [], {}
    guarded["same"] = [[encode_path(parse_path(first)), encode_path(parse_path(second))] for first, second in call.same]
    return guarded


def _guard(source: str, check: str, expected: Any) -> dict[str, Any]:
    return {"at": encode_path(parse_path(source)), "check": check, "expected": expected, "kind": check.upper()}


def _of_tensors(call: CapturedCall, args: tuple[object, ...]) -> Iterator[dict[str, Any]]:
    for source in call.sources:
        tensor = follow(parse_path(source), {"args": args})
        described = describe_tensor(tensor)
        yield _guard(source, "tensor", described if call.gradients else {**described, "requires_grad": None})


def _of_arguments(args: tuple[object, ...]) -> Iterator[dict[str, Any]]:
    yield _guard("L['args']", "length", len(args))
    for index, argument in enumerate(args):
        if isinstance(argument, nn.Module):
            for name, module in argument.named_modules():
                yield from _of_module(module_source(index, name), module)
        else:
            yield from _of_value(f"L['args'][{index}]", argument)


def _of_module(source: str, module: nn.Module) -> Iterator[dict[str, Any]]:
    yield _guard(source, "type", [type(module).__qualname__, digest_class(type(module))])
    for held in ("_modules", "_parameters", "_buffers"):
        yield _guard(f"{source}.{held}", "keys", encode([name for name, value in vars(module)[held].items()]))
    if _reads_mode(type(module)):
        yield _guard(f"{source}.training", "constant", module.training)


def _of_value(source: str, value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, torch.Tensor):
        return
    if isinstance(value, (list, tuple, dict)):
        yield _guard(source, "type", [name_of(type(value)), None])
        if isinstance(value, dict):
            yield _guard(source, "keys", encode(list(value)))
        else:
            yield _guard(source, "length", len(value))
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _of_value(f"{source}[{key!r}]", item)
        return
    try:
        yield _guard(source, "constant", encode(value))
    except UnsupportedError as cause:
        raise UnsupportedError(f"{source} cannot be an argument of a captured call: {cause}") from cause


def _reads_mode(cls: type) -> bool:
    """Whether a class of modules asks for its mode, training or not: others may be called in either.

    >>> _reads_mode(nn.Linear), _reads_mode(nn.Dropout)
    (False, True)
    """
    functions = (member for base in cls.__mro__ if base not in nn.Module.__mro__ for member in vars(base).values())
    return any("training" in _names(code) for function in functions if (code := getattr(function, "__code__", None)))


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))
