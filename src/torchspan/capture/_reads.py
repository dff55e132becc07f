"""What dynamo leaves unguarded of what a program reads: noted, so that a guard can be made of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch

from torchspan.capture._kernels import TRACING
from torchspan.private import dynamo

Note = Callable[[str, str, Any, Mapping[str, Any]], None]


@contextmanager
def reads_noted(note: Note) -> Iterator[None]:
    """Note what dynamo leaves unguarded: what a module, an object or a dict lacks; in 2.8, constants of classes."""

    def of_module(variable: Any, _: Any, name: str) -> None:
        if not variable.is_torch and not hasattr(variable.value, name):
            note(dynamo.source_name(variable.source), "HASATTR", variable.value, {"attr": name})

    def of_object(variable: Any, _: Any, name: str) -> None:
        if not name.startswith("__") and _lacks(variable.value, name):
            note(dynamo.source_name(variable.source), "HASATTR", variable.value, {"attr": name})

    def of_class(variable: Any, _: Any, name: str) -> None:
        value = inspect.getattr_static(variable.value, name, None)
        if type(value) in (bool, int, float, str) and not name.startswith("__"):
            note(f"{dynamo.source_name(variable.source)}.{name}", "CONSTANT_MATCH", value, {})

    def of_dict(variable: Any, _: Any, key: Any) -> None:
        if key.is_python_constant() and not any(_is_key(known, key) for known in variable.items):
            note(dynamo.source_name(variable.source), "DICT_NOT_CONTAINS", {}, {"key": key.as_python_constant()})

    names = ("call_obj_hasattr", "var_getattr", "tp_getattro_impl")  # the last one since torch 2.14
    watched: list[tuple[Any, str, Any]] = [(dynamo.PythonModuleVariable, name, of_module) for name in names]
    watched += [(dynamo.UserDefinedClassVariable, name, of_class) for name in names[1:]]
    watched += [
        (kind, name, of_object)
        for kind in (dynamo.UserDefinedObjectVariable, dynamo.UnspecializedNNModuleVariable)
        for name in names[1:]
    ]
    watched += [(dynamo.ConstDictVariable, "getitem_const_raise_exception_if_absent", of_dict)]
    with TRACING:  # dynamo's classes are those of all threads
        before = [(kind, name, vars(kind)[name], listener) for kind, name, listener in watched if name in vars(kind)]
        for kind, name, function, listener in before:
            setattr(kind, name, _telling(function, listener))
        try:
            yield
        finally:
            for kind, name, function, _listener in before:
                setattr(kind, name, function)


@contextmanager
def absences_guarded() -> Iterator[None]:
    """In torch 2.8, a guard that an attribute is absent can be looked at: there a list of all guards gets each one's value."""
    builder = dynamo.GuardBuilder
    get: Any = builder.get
    if "name" not in inspect.signature(get).parameters:
        yield
        return

    def get_if_there(self: Any, name: str, *rest: Any) -> Any:
        try:
            return get(self, name, *rest)
        except AttributeError:
            return None

    with TRACING:
        builder.get = get_if_there
        try:
            yield
        finally:
            builder.get = get


def _telling(function: Any, listener: Any) -> Any:
    @wraps(function)
    def call(variable: Any, *args: Any, **kwargs: Any) -> Any:
        if variable.source is not None and len(args) > 1:
            listener(variable, *args[:2])
        return function(variable, *args, **kwargs)

    return call


def _lacks(value: Any, name: str) -> bool:
    """Whether an object has no attribute of that name, as far as can be told without running code of its class."""
    missing = object()
    find = inspect.getattr_static(type(value), "__getattr__", None)
    if inspect.getattr_static(value, name, missing) is not missing or find not in (None, torch.nn.Module.__getattr__):
        return False
    return not hasattr(value, name)


def _is_key(known: Any, key: Any) -> bool:
    """Whether a key of a traced dict is that constant."""
    return bool(known.vt.is_python_constant() and known.vt.as_python_constant() == key.as_python_constant())
