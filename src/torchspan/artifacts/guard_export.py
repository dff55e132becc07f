"""dynamo's guards in a form that outlives the process: each with its path, its kind of check, and what it expects."""

from __future__ import annotations

import enum
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import takewhile
from pathlib import Path as FilePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch

from torchspan.artifacts.ambient import ambient_state
from torchspan.artifacts.checks import describe_tensor, identity_of, is_torch_made
from torchspan.artifacts.code_digest import Seen, digest_class, digest_function, is_own_code, is_torch_code
from torchspan.artifacts.paths import STEPS, Path, encode_path, follow, parse_path
from torchspan.artifacts.shapes import shapes_of
from torchspan.artifacts.size_conditions import is_size, write_conditions
from torchspan.artifacts.values import encode, name_of
from torchspan.capture.dynamo import Frame, Guard, Guards
from torchspan.core.errors import UnsupportedError
from torchspan.core.program import Program

# What dynamo keeps as guards on torch's state is held by `ambient_state`, those on shapes by `portable_sizes`.
_AMBIENT = {
    "GRAD_MODE",
    "DETERMINISTIC_ALGORITHMS",
    "GLOBAL_STATE",
    "TORCH_FUNCTION_STATE",
    "DEFAULT_DEVICE",
    "AUTOGRAD_SAVED_TENSORS_HOOKS",
    "FUNCTORCH_STACK_MATCH",
    "DUAL_LEVEL",
    "SHAPE_ENV",
}
# The artifact is held to one torch: what dynamo looks up in its own modules cannot differ, and they are not imported at load.
_PINNED = (
    "torch._dynamo",
    "torch._functorch",
    "torch._higher_order_ops",
    "torch._inductor",
    "torch._guards",
    "torch.utils._pytree",  # a registry that imports add to, in their order
)

# Kinds of objects that exist once in every process, by a name: they are the same if that is.
_NAMED = (
    "builtin_function_or_method",
    "OpOverload",
    "OpOverloadPacket",
    "method_descriptor",
    "SpecialForm",
    "UnionType",
    "GenericAlias",
    "Logger",
    "ufunc",
)

_SIZE = r"\.(size|stride)\(\)\[|\.storage_offset\(\)"  # a part of a tensor, on which a guard stands

Portable = tuple[str, Any]


def _constant(guard: Guard) -> Portable:
    return "constant", encode(guard.value)


def _type(guard: Guard, seen: Seen) -> Portable:
    return "type", [name_of(type(guard.value)), digest_class(type(guard.value), seen)]


def _is_own_object(guard: Guard) -> bool:
    """Whether a guard is on the identity of an object of the model or its arguments, such as a configuration."""
    value = guard.value
    kinds = (type, enum.Enum, FunctionType, MethodType, ModuleType, torch.nn.Module, torch.Tensor)
    return (
        guard.kind == "ID_MATCH"
        and guard.source.startswith("L[")
        and hasattr(value, "__dict__")
        and not isinstance(value, kinds)
    )


def _identity(guard: Guard, seen: Seen) -> Portable:
    value = guard.value
    if value is None or isinstance(
        value, (bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)
    ):
        return _constant(guard)
    if isinstance(value, (FunctionType, MethodType, CodeType)):
        return "function", digest_function(value, seen)
    if isinstance(value, type):
        digest_class(value, seen)
        return "named", identity_of(value)
    if isinstance(value, ModuleType) or type(value).__qualname__.endswith(_NAMED):
        return "named", identity_of(value)
    if _is_own_object(guard):
        return _type(guard, seen)  # what matters is which others are the same one
    return _constant(guard)  # an enum or another constant; anything else is refused there


def _key(guard: Guard) -> Any:
    return next((guard.arguments[name] for name in ("key", "item", "0") if name in guard.arguments), None)


def _contains(guard: Guard) -> Portable:
    if re.search(r"hooks\w*$", guard.source):  # keys are numbers that count the hooks of a process
        return "length", len(guard.value)
    return "contains", [encode(_key(guard)), _key(guard) in guard.value]


_CONVERTERS: Mapping[str, Callable[[Guard, Seen], Portable]] = {
    "TENSOR_MATCH": lambda guard, _: ("tensor", describe_tensor(guard.value)),
    "TYPE_MATCH": _type,
    "SEQUENCE_LENGTH": lambda guard, _: ("length", len(guard.value)),
    "EMPTY_NN_MODULE_HOOKS_DICT": lambda guard, _: ("length", 0),
    "NOT_PRESENT_IN_GENERIC_DICT": lambda guard, _: ("own_attribute", guard.arguments["attr"]),
    "HASATTR": lambda guard, _: ("has_attribute", [guard.arguments["attr"], hasattr(guard.value, guard.arguments["attr"])]),
    "NOT_NONE": lambda guard, _: ("not_none", True),
    "WEAKREF_ALIVE": lambda guard, _: ("not_none", True),
    **dict.fromkeys(
        ("DICT_KEYS_MATCH", "DICT_KEYS", "DICT_CONST_KEYS", "MAPPING_KEYS_CHECK"),
        lambda guard, _: ("keys", encode(list(guard.value))),
    ),
    **dict.fromkeys(
        ("DICT_CONTAINS", "DICT_NOT_CONTAINS", "SET_CONTAINS", "SET_NOT_CONTAINS"),
        lambda guard, _: _contains(guard),
    ),
    **dict.fromkeys(
        ("CONSTANT_MATCH", "EQUALS_MATCH", "BOOL_MATCH", "NONE_MATCH", "FLOAT_IS_NAN", "COMPLEX_IS_NAN"),
        lambda guard, seen: _identity(guard, seen),
    ),
    **dict.fromkeys(
        (
            "ID_MATCH",
            "MODULE_MATCH",
            "PYMODULE_MATCH",
            "BUILTIN_MATCH",
            "CLASS_MATCH",
            "FUNCTION_MATCH",
            "CLOSURE_MATCH",
            "CODE_MATCH",
        ),
        _identity,
    ),
}


def portable_guards(guards: Guards, paths: list[Path]) -> dict[str, Any]:
    """What a `Checker` needs, as JSON: the guards of a capture, in every grad mode that it may be called in.

    Raises:
        UnsupportedError: a guard that a fresh process could not check; names it.
    """
    seen = Seen()
    entries: dict[str, dict[str, Any]] = {}
    tensors = shapes_of(guards.frame.context).tensors
    expected: Any
    same: list[list[Any]] = []
    identities: dict[int, list[Any]] = {}
    for frame in guards.frames:
        for guard in frame.guards:
            if guard.kind in _AMBIENT or _is_of_a_namedtuple(guard.source, frame.scope):
                continue
            at = _resolved(parse_path(guard.source, frame.scope), guard.value)
            if _dotted(at).startswith(_PINNED):
                continue
            if guard.kind == "DUPLICATE_INPUT":
                same.append([encode_path(at), encode_path(parse_path(guard.arguments["source_b"], frame.scope))])
                continue
            if (
                guard.kind == "HASATTR" and "attr" not in guard.arguments
            ):  # torch 2.8 has the attribute as the end of the source
                at, guard = _attribute_guard(at, guard, guards.program)
            if _passes_own(at):
                continue  # what torchspan's own wrapper of a torch function holds
            if _is_own_object(guard):
                identities.setdefault(id(guard.value), []).append(encode_path(at))
            if _is_torch_function(guard.value):
                check, expected = "torch_function", [guard.value.__module__, guard.value.__name__]
            else:
                check, expected = _convert(guard, seen)
            if guard.source in tensors and check == "tensor":
                expected = _of_any_size(expected, tensors[guard.source])
            entry = {"at": encode_path(at), "check": check, "expected": expected, "kind": guard.kind}
            entries.setdefault(json.dumps([entry["at"], check, expected]), entry)
        for source, value in frame.restored:  # nothing is done about these: they must be what they are put back to
            entry = {"at": encode_path(parse_path(source, frame.scope)), "check": "constant", "expected": encode(value)}
            entries.setdefault(json.dumps([entry["at"], "restored"]), {**entry, "kind": "RESTORED"})
        for at, value in returned_values(frame, guards.program):
            if is_constant(value):  # of other objects the result has themselves, whatever they hold by then
                entry = {"at": encode_path(at), "check": "constant", "expected": encode(value)}
                entries.setdefault(json.dumps([entry["at"], "constant", entry["expected"]]), {**entry, "kind": "RETURNED"})
        _cover_traced(frame, guards.program, seen, entries)
    ambient = ambient_state()
    _refuse_modes(ambient)
    if len(guards.frames) > 1:
        del ambient["grad_mode"]  # the program does the same in both
    else:
        ambient["grad_mode"] = guards.frame.grad_mode
    same += [paths for paths in identities.values() if len(paths) > 1]
    once, always = _split(list(entries.values()))
    return {
        "always": always,
        "at_load": once,
        "same": same,
        "ambient": ambient,
        "inputs": [encode_path(path) for path in paths],
    }


def returned_values(frame: Frame, program: Program) -> list[tuple[Path, Any]]:
    """The parts of the result that the program found and did not make: where, and what is there now."""
    values = {"target": program.target, "args": program.args, "kwargs": dict(program.kwargs)}
    sources = [
        source for source in frame.returned if not (re.search(_SIZE, source) or _is_of_a_namedtuple(source, frame.scope))
    ]
    paths = [parse_path(source, frame.scope) for source in sources]
    return [(path, follow(path, values)) for path in paths]


def is_constant(value: Any) -> bool:
    """Whether a value is the same as any equal one, and can be written down."""
    if isinstance(value, (tuple, frozenset)):
        return all(map(is_constant, value))
    kinds = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format)
    return value is None or value is Ellipsis or isinstance(value, kinds)


def _dotted(path: Path) -> str:
    """The name of what a path leads to from a module, as far as it leads by attributes; empty if it begins elsewhere."""
    if path[0][0] != "module":
        return ""
    return ".".join(str(key) for _, key in takewhile(lambda step: step[0] in ("module", "attr"), path))


def _is_of_a_namedtuple(source: str, scope: Mapping[str, Any]) -> bool:
    """Whether a source is among the globals of the code that ``namedtuple`` generates: the class is guarded on its own."""
    match = re.match(r"G\['(___unnamed_scope_\w+)'\]", source)
    return match is not None and str(scope[match[1]].get("__name__", "")).startswith("namedtuple_")


def _resolved(at: Path, value: Any) -> Path:
    """A path to a constant that a base class has, as the attribute of the class: a subclass may come to have it, too.

    >>> base = (("type", None), ("attr", "__mro__"), ("item", 1), ("attr", "__dict__"), ("item", "scale"))
    >>> _resolved((("local", "target"), *base), 2.0)
    (('local', 'target'), ('type', None), ('attr', 'scale'))
    """
    looked_up = len(at) > 4 and (at[-5], at[-4], at[-2]) == (("type", None), ("attr", "__mro__"), ("attr", "__dict__"))
    return (*at[:-4], ("attr", at[-1][1])) if looked_up and is_constant(value) else at


def _of_any_size(expected: Any, fake: Any) -> Any:
    """What is expected of a tensor with dynamic dimensions: None for those, in its shape and strides."""

    def kept(known: list[int], now: Any) -> list[int | None]:
        return [
            None if is_size(number) and number.node.expr.free_symbols else size for size, number in zip(known, now, strict=True)
        ]

    return {**expected, "shape": kept(expected["shape"], fake.shape), "stride": kept(expected["stride"], fake.stride())}


def portable_sizes(guards: Guards) -> dict[str, Any]:
    """The conditions on dynamic sizes, as `Sizes` takes them; empty if all are static. Call this when all is compiled.

    Raises:
        UnsupportedError: a dynamic dimension was fixed, or a condition cannot be checked elsewhere.
    """
    all_shapes = [shapes_of(frame.context) for frame in guards.frames]
    if not all_shapes[0].symbols:
        return {}
    conditions = [condition for shapes in all_shapes for condition in shapes.conditions()]
    return write_conditions(conditions, all_shapes[0].sources, guards.frame.scope)


def _is_torch_function(value: Any) -> bool:
    if isinstance(value, BuiltinFunctionType):
        return (value.__module__ or "torch").partition(".")[0] == "torch"  # those of torch._C._nn have no module
    return isinstance(value, FunctionType) and is_torch_made(value) and value.__name__ != "<lambda>"


def _passes_own(path: Path) -> bool:
    """Whether a path leads into a function of torchspan, such as a device rule's wrapper, which is not always in force."""
    if path[0][0] != "module":
        return False
    holder: Any = {}
    for kind, key in path[:-1]:
        holder = STEPS[kind](key)(holder)
        if isinstance(holder, FunctionType) and is_own_code(holder.__code__):
            return True
    return False


def _attribute_guard(at: Path, guard: Guard, program: Program) -> tuple[Path, Guard]:
    values = {"target": program.target, "args": program.args, "kwargs": program.kwargs}
    return at[:-1], replace(guard, value=follow(at[:-1], values), arguments={"attr": at[-1][1]})


def _convert(guard: Guard, seen: Seen) -> Portable:
    converter = _CONVERTERS.get(guard.kind)
    if converter is None:
        raise UnsupportedError(
            f"an artifact cannot check the guard {guard.kind} on {guard.source}; compile it with torch.compile"
        )
    try:
        return converter(guard, seen)
    except UnsupportedError as cause:
        raise UnsupportedError(
            f"an artifact cannot check the guard {guard.kind} on {guard.source} in another process: {cause}"
        ) from cause


def _refuse_modes(ambient: Mapping[str, Any]) -> None:
    modes = [*ambient["torch_function_modes"], *(["a TorchDispatchMode"] if ambient["dispatch_modes"] else [])]
    foreign = [mode for mode in modes if not mode.startswith(("torchspan.", "torch.utils._device:"))]
    if foreign or ambient["functorch"]:
        raise UnsupportedError(
            f"an artifact cannot be made inside {', '.join(foreign) or 'a functorch transform'}: "
            "make it outside, without the mode"
        )


def _split(guards: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Guards on torch's own functions and modules, checked once at load, and all others, checked at every call."""
    once = [guard for guard in guards if guard["check"] == "file" or _is_in_torch(guard["at"])]
    return once, [guard for guard in guards if guard not in once]


def _is_in_torch(at: list[list[Any]]) -> bool:
    return at[0][0] == "module" and str(at[0][1]).partition(".")[0] == "torch"


# code that was inlined, and that no guard reaches


def _cover_traced(frame: Frame, program: Program, seen: Seen, entries: dict[str, dict[str, Any]]) -> None:
    """Add a check of the source file of each function that was inlined and that no other guard covers."""
    target = program.target
    if isinstance(target, torch.nn.Module):
        for module in target.modules():
            digest_class(type(module), seen)
    else:
        digest_function(target, seen)
    for code in frame.traced:
        is_generated = code.co_filename.startswith("<")  # such as a dataclass's __init__: it follows from code that is covered
        if is_torch_code(code) or is_own_code(code) or is_generated or code in seen:
            continue
        name, digest = _source_of(code)
        entry = {"at": [["module", name], ["attr", "__file__"]], "check": "file", "expected": digest, "kind": "INLINED"}
        entries.setdefault(f"file {name}", entry)


def _source_of(code: CodeType) -> tuple[str, str]:
    for name, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) == code.co_filename:
            digest = hashlib.sha256(FilePath(code.co_filename).read_bytes()).hexdigest()
            return "__main__" if name == "__mp_main__" else name, digest
    raise UnsupportedError(
        f"an artifact cannot tell in another process whether {code.co_name} ({code.co_filename}:{code.co_firstlineno}) "
        "is the same code; define it in a module or in the model's class"
    )
