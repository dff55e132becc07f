"""How a program that dynamo traced changes objects that it was given, and which of them it returns."""

from __future__ import annotations

from typing import Any

from torchspan.private import dynamo, fx


def tracing_state() -> tuple[Any, tuple[Any, ...], tuple[str, ...], tuple[tuple[str, Any], ...], tuple[str, ...]]:
    """Inside a dynamo backend: the tracing context, the code traced so far, and the Python objects that will be changed.

    Then the attributes that are set and put back in the end, with the constants that they have then and had before; last where
    those parts of the result are found that the program did not make.
    """
    context = fx.TracingContext.get()
    translator = dynamo.InstructionTranslator.current_tx()
    effects = translator.output.side_effects
    changed, restored = list[str](), list[tuple[str, Any]]()
    for item in effects.id_to_variable.values():
        if not _is_changed_outside(effects, item):
            continue
        name, put_back = dynamo.source_name(item.source), _put_back(effects, item)
        if put_back is None:
            changed.append(name)
        else:
            restored += [(f"{name}.{attribute}", value) for attribute, value in put_back.items()]
    if effects.tensor_hooks:
        changed.append("a hook on a tensor")
    returned: dict[str, None] = {}
    _find_sources(translator.stack[-1:], effects, returned, {})
    return context, tuple(context.traced_code), tuple(changed), tuple(restored), tuple(returned)


def _find_sources(value: Any, effects: Any, sources: dict[str, None], seen: dict[int, Any]) -> None:
    """Note where the parts of a traced value are found, from the outermost inwards; on those dynamo need not have guards.

    Torch 2.13 and later put off a guard on a constant until its value is needed, and to return it that is never so.
    """
    if id(value) in seen:
        return
    seen[id(value)] = value
    computed = getattr(getattr(value, "_cache", None), "lazy_vars", None)  # torch 2.15: of constants, when it is called
    parts: list[Any] = []
    if isinstance(value, (list, tuple)):
        parts = list(value)
    elif isinstance(value, dict):
        parts = [*value, *value.values()]
    elif not isinstance(value, dynamo.VariableTracker):
        parts = [value.vt] if hasattr(value, "vt") else []  # a key of a dict
    elif value.source is not None and not _is_new(value):
        sources[dynamo.source_name(value.source)] = None
    elif computed is not None:
        parts = list(computed)
    else:
        fields = [part for name, part in vars(value).items() if name not in value._nonvar_fields]
        parts = [*fields, *effects.store_attr_mutations.get(value, {}).values()]
    for part in parts:
        _find_sources(part, effects, sources, seen)


def _is_new(item: Any) -> bool:
    """Whether the program makes an object itself."""
    return isinstance(item.mutation_type, (dynamo.AttributeMutationNew, dynamo.ValueMutationNew))


def _is_changed_outside(effects: Any, item: Any) -> bool:
    """Whether running the program changes a variable that it was given; not one that it made itself."""
    if item.source is None or _is_new(item):
        return False
    return bool(effects.is_modified(item))


def _put_back(effects: Any, item: Any) -> dict[str, Any] | None:
    """The constants that all attributes that were set on an object have in the end, if those are what they were before."""
    stored, value = effects.store_attr_mutations.get(item), getattr(item, "value", None)
    if not stored:
        return None
    constants = {}
    for name, end in stored.items():
        if not end.is_python_constant() or not hasattr(value, name) or end.as_python_constant() is not getattr(value, name):
            return None
        constants[name] = end.as_python_constant()
    return constants
