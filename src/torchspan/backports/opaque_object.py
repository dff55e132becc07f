"""``torch._library.opaque_object``: classes of a program's own whose objects custom operators take.

They can be registered and asked for; this torch's dispatcher has no type for them, so an operator that takes or returns one is
refused when it is called (see the backport `custom_op`).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType
from typing import Any, NewType
from weakref import WeakKeyDictionary

import torch

from torchspan.backports._base import Backport, has_module

_PLACE = "torch._library.opaque_object"
_OLD_TYPES = {"reference": "symbolic", "value": "constant"}  # what the two kinds were called before 2.14
OpaqueType = NewType("OpaqueType", torch._C.ScriptObject)
OpaqueTypeStr = "__torch__.torch.classes.aten.OpaqueObject"

log = logging.getLogger("torchspan")


class MemberType(Enum):
    """How a compiler treats a member of such an object: read at compile time, or traced."""

    USE_REAL = "use_real"
    INLINED = "inlined"


@dataclass
class _OpaqueTypeInfo:
    class_name: str
    opaque_typ: str
    guard_fn: Callable[[Any], list[Any]] | None = None
    members: dict[str, MemberType] = field(default_factory=dict)
    hoist: bool = False
    reconstruct_fn: Callable[..., Any] | None = None


_registered: WeakKeyDictionary[type, _OpaqueTypeInfo] = WeakKeyDictionary()


class CustomClassBaseMeta(type):
    """Of classes whose objects are opaque: an object of any that is registered is an instance of the base."""

    def __instancecheck__(cls, instance: object) -> bool:
        return is_custom_class_obj(instance) if cls is CustomClassBase else super().__instancecheck__(instance)


class CustomClassBase(metaclass=CustomClassBaseMeta):
    """What a class of opaque objects with a state of their own has as its base."""


def _info(cls: Any) -> _OpaqueTypeInfo | None:
    if isinstance(cls, str):
        return next((info for info in _registered.values() if info.class_name == cls), None)
    parents = cls.__mro__ if isinstance(cls, type) else ()
    return next((_registered[parent] for parent in parents if parent in _registered), None)


def register_custom_class(
    cls: Any,
    *,
    typ: str,
    hoist: bool = False,
    guard_fn: Callable[[Any], list[Any]] | None = None,
    members: dict[str, MemberType] | None = None,
    reconstruct_fn: Callable[..., Any] | None = None,
) -> None:
    """Make a class one of opaque objects.

    Args:
        cls: the class; no builtin, and no container that pytree knows.
        typ: "symbolic", for objects with a state, or "constant", for values; "reference" and "value" are older names.
        hoist: whether a compiled graph takes a constant as an input.
        guard_fn: what of a symbolic object a compiled graph depends on.
        members: how a compiler treats members, by name.
        reconstruct_fn: how a tracer gets at such an object.

    Raises:
        ValueError: a class that cannot be one of opaque objects.
        TypeError: one that lacks what its kind needs: the base class, or `__eq__`, `__hash__` and `__fx_repr__`.
    """
    from torch.utils import _pytree as pytree

    typ = _OLD_TYPES.get(typ, typ)
    if cls.__module__ == "builtins" or cls is torch.Tensor:
        raise ValueError(f"Unable to register built-in type {cls} as an opaque type; wrap it in a class and register that")
    if cls in pytree.SUPPORTED_NODES:
        raise ValueError(f"{cls} cannot be registered as an opaque object as it has been registered as a pytree")
    if typ not in ("symbolic", "constant"):
        raise AssertionError(f"Custom class type must be either 'symbolic' or 'constant', got {typ!r}")
    if typ == "symbolic" and not isinstance(cls, CustomClassBaseMeta):
        raise TypeError(f"Custom class {cls} must subclass torch._custom_class_base.CustomClassBase")
    if typ == "constant":
        _check_constant(cls, guard_fn)
    name = f"{cls.__module__}.{cls.__qualname__}"
    _registered[cls] = _OpaqueTypeInfo(name, typ, guard_fn, members or {}, hoist, reconstruct_fn)


def _check_constant(cls: Any, guard_fn: Callable[[Any], list[Any]] | None) -> None:
    is_enum = issubclass(cls, Enum)
    lacking = [
        name
        for name, is_there in (
            ("`__eq__`", is_enum or cls.__eq__ is not object.__eq__),
            ("`__hash__`", cls.__hash__ is not None),
            ("`__fx_repr__`", is_enum or hasattr(cls, "__fx_repr__")),
        )
        if not is_there
    ]
    if lacking:
        raise TypeError(
            f"Value-type opaque object of type {cls} is expected to have a {lacking[0]} of its own: by these a compiler guards "
            "on such objects, caches them and writes them into code"
        )
    if guard_fn is not None:
        raise TypeError(f"No need to specify `guard_fn` for value-type opaque class {cls}: it is guarded by its `__eq__`")


def unregister_custom_class(cls: Any) -> None:
    """Take `register_custom_class` back."""
    del _registered[cls]


def is_custom_class(cls: Any) -> bool:
    """Whether a class (or the name of one) is one of opaque objects, by itself or by what it is derived from."""
    return _info(cls) is not None


def is_custom_class_obj(value: object) -> bool:
    """Whether a value is an opaque object."""
    return is_custom_class(type(value))


def is_opaque_constant_type(cls: Any) -> bool:
    """Whether a class is one of opaque values."""
    info = _info(cls)
    return info is not None and info.opaque_typ == "constant"


def is_opaque_symbolic_type(cls: Any) -> bool:
    """Whether a class is one of opaque objects with a state."""
    info = _info(cls)
    return info is not None and info.opaque_typ == "symbolic"


def get_opaque_type_name(cls: Any) -> str:
    """The name by which a class is registered; raises ValueError if it is not."""
    info = _info(cls)
    if info is None:
        raise ValueError(f"Class {cls} is not registered as an opaque type. Call register_custom_class({cls.__name__}) first.")
    return info.class_name


def get_opaque_obj_info(cls: Any) -> _OpaqueTypeInfo | None:
    """What a class was registered with."""
    return _info(cls)


def get_member_type(cls: Any, member_name: str) -> MemberType | None:
    """How a compiler treats that member of objects of a class."""
    info = _info(cls)
    return None if info is None else info.members.get(member_name)


def has_members(cls: Any) -> bool:
    """Whether it was said of any member how a compiler treats it."""
    info = _info(cls)
    return info is not None and bool(info.members)


def should_hoist(cls: Any) -> bool:
    """Whether a compiled graph takes values of a class as inputs."""
    info = _info(cls)
    return info is not None and info.hoist


def get_reconstruct_fn(cls: Any) -> Callable[..., Any] | None:
    """How a tracer gets at objects of a class."""
    info = _info(cls)
    return None if info is None else info.reconstruct_fn


def get_opaque_obj_repr(obj: Any) -> tuple[str, dict[str, type]]:
    """A value as code, and what the names in that code are; raises TypeError if it does not say."""
    if isinstance(obj, Enum):
        return f"{type(obj).__name__}.{obj.name}", {type(obj).__name__: type(obj)}
    if not hasattr(obj, "__fx_repr__"):
        raise TypeError(f"Value-type opaque object of type {obj} is expected to have a `__fx_repr__` method of its own")
    text, names = obj.__fx_repr__()
    if not isinstance(text, str) or not isinstance(names, dict):
        raise TypeError(f"__fx_repr__ of {type(obj).__name__} must return a string and a dict, got {text!r} and {names!r}")
    return text, names


def _older(name: str, new: str) -> Callable[[], object]:
    """A function by the name that it had before 2.14; of a torch that has it by that name only, it is torch's own."""

    def build() -> object:
        function = globals()[new]

        @functools.wraps(function)
        def by_older_name(*args: Any, **kwargs: Any) -> Any:
            log.warning("%s is deprecated, use %s instead", name, new)
            return function(*args, **kwargs)

        return by_older_name

    return build


def _newer(name: str, old: str) -> Callable[[], object]:
    """A function by its newer name: torch's own by its older one, where this torch has that."""

    def build() -> object:
        native = _native(old)
        if native is None:
            return globals()[name]
        if name != "register_custom_class":
            return native

        def register(cls: Any, *, typ: str, **options: Any) -> None:
            native(cls, typ={new: older for older, new in _OLD_TYPES.items()}.get(typ, typ), **options)

        return functools.wraps(register_custom_class)(register)

    return build


def _native(name: str, place: str = _PLACE) -> Any:
    import importlib

    return vars(importlib.import_module(place)).get(name) if has_module(place) else None


def _base(name: str, old: str) -> Callable[[], object]:
    return lambda: _native(old, "torch._opaque_base") or globals()[name]


def _lacks(module: ModuleType | None) -> bool:
    return not has_module("torch._custom_class_base")


for _public in (CustomClassBase, CustomClassBaseMeta):
    _public.__module__ = "torch._custom_class_base"
register_custom_class(Enum, typ="constant")

# the names of torch 2.10 to 2.14, which 2.15 took away
_OLD_BASES = {
    "OpaqueBase": _base("CustomClassBase", "OpaqueBase"),
    "OpaqueBaseMeta": _base("CustomClassBaseMeta", "OpaqueBaseMeta"),
}

BACKPORT = Backport(
    name="opaque_object",
    summary="classes of opaque objects, which custom operators take: torch._library.opaque_object",
    target=_PLACE,
    since="2.10.0",
    came={
        "2.11.0": (
            "MemberType",
            "is_opaque_value",
            "get_opaque_obj_info",
            "get_opaque_obj_repr",
            "get_member_type",
            "has_members",
            "should_hoist",
            "torch._opaque_base",
        ),
        "2.11 to 2.13": (
            "OpaqueBase",
            "OpaqueBaseMeta",
        ),
        "2.12.0": ("get_reconstruct_fn",),
        "2.14.0": (
            "CustomClassBase",
            "CustomClassBaseMeta",
            "register_custom_class",
            "is_custom_class",
            "is_custom_class_obj",
            "is_opaque_constant_type",
            "is_opaque_symbolic_type",
            "torch._custom_class_base",
        ),
        "2.15.0": ("unregister_custom_class",),
    },
    first_forms={"2.10, 2.11": "asks more of a class, and refuses other classes"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/_library/opaque_object.py",
    differs="such classes can be registered and asked for; an operator that takes or returns one is refused when it is called",
    is_module=True,
    names={
        "CustomClassBase": _base("CustomClassBase", "OpaqueBase"),
        "CustomClassBaseMeta": _base("CustomClassBaseMeta", "OpaqueBaseMeta"),
        "MemberType": lambda: MemberType,
        **_OLD_BASES,
        "OpaqueType": lambda: OpaqueType,
        "OpaqueTypeStr": lambda: OpaqueTypeStr,
        "register_custom_class": _newer("register_custom_class", "register_opaque_type"),
        "unregister_custom_class": lambda: unregister_custom_class,
        "register_opaque_type": _older("register_opaque_type", "register_custom_class"),
        "is_custom_class": _newer("is_custom_class", "is_opaque_type"),
        "is_opaque_type": _older("is_opaque_type", "is_custom_class"),
        "is_custom_class_obj": _newer("is_custom_class_obj", "is_opaque_value"),
        "is_opaque_value": _older("is_opaque_value", "is_custom_class_obj"),
        "is_opaque_constant_type": _newer("is_opaque_constant_type", "is_opaque_value_type"),
        "is_opaque_value_type": _older("is_opaque_value_type", "is_opaque_constant_type"),
        "is_opaque_symbolic_type": _newer("is_opaque_symbolic_type", "is_opaque_reference_type"),
        "is_opaque_reference_type": _older("is_opaque_reference_type", "is_opaque_symbolic_type"),
        "get_opaque_type_name": lambda: get_opaque_type_name,
        "get_opaque_obj_info": lambda: get_opaque_obj_info,
        "get_opaque_obj_repr": lambda: get_opaque_obj_repr,
        "get_member_type": lambda: get_member_type,
        "get_reconstruct_fn": lambda: get_reconstruct_fn,
        "has_members": lambda: has_members,
        "should_hoist": lambda: should_hoist,
    },
    elsewhere={
        "torch._custom_class_base": {
            "CustomClassBase": _base("CustomClassBase", "OpaqueBase"),
            "CustomClassBaseMeta": _base("CustomClassBaseMeta", "OpaqueBaseMeta"),
            "OpaqueBase": _base("CustomClassBase", "OpaqueBase"),
            "OpaqueBaseMeta": _base("CustomClassBaseMeta", "OpaqueBaseMeta"),
        },
        "torch._opaque_base": {
            "OpaqueBase": _base("CustomClassBase", "OpaqueBase"),
            "OpaqueBaseMeta": _base("CustomClassBaseMeta", "OpaqueBaseMeta"),
        },
    },
    lacks=_lacks,
)
