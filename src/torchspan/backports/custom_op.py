"""``torch.library.custom_op``: a single Tag, tags that this torch lacks, and types of opaque objects in a signature."""

from __future__ import annotations

import functools
import inspect
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport, Change
from torchspan.core.errors import UnsupportedError
from torchspan.core.report import current_report, user_site

_PLACE = "torch._library.custom_ops"


class _Tag:
    """A tag that this torch's dispatcher does not know; with a `meaning`, an operator cannot do without it."""

    def __init__(self, name: str, since: str, meaning: str = "") -> None:
        self.name, self.since, self.meaning = name, since, meaning

    def __repr__(self) -> str:
        return f"<Tag.{self.name}: torchspan's>"


_TAGS = {
    tag.name: tag
    for tag in (
        _Tag(
            "inplace",
            "2.13.0",
            "it returns the tensor that it changes, and this torch's custom operators return new tensors only",
        ),
        _Tag(
            "out",
            "2.13.0",
            "it returns the tensor that it writes to, and this torch's custom operators return new tensors only",
        ),
        _Tag("out_variant", "2.12.0"),
        _Tag("reduction", "2.10.0"),
    )
}


class _RefusedOperator:
    """What stands for an operator that cannot be: it takes registrations, and its call is an error that says why."""

    def __init__(self, name: str, function: Callable[..., Any], cause: str, since: str) -> None:
        functools.update_wrapper(self, function)
        self._message = f"custom operator {name}: {cause}; torch has it since {since}"
        self._name, self._cause = name, cause

    def __call__(self, *args: object, **kwargs: object) -> Any:
        report = current_report()
        if report is not None:
            report.decide("unsupported", f"torch.library.custom_op({self._name!r})", "an error", self._cause, user_site())
        raise UnsupportedError(self._message)

    def _take(self, *args: Any, **kwargs: Any) -> Any:
        functions = [argument for argument in args if inspect.isroutine(argument)]
        return functions[0] if functions else lambda function: function

    register_fake = register_kernel = register_vmap = register_torch_dispatch = _take

    def register_autograd(self, backward: Callable[..., Any], /, *, setup_context: Callable[..., Any] | None = None) -> None:
        """Take the backward, which cannot be called either."""


def _taking(custom_op: Callable[..., Any]) -> Callable[..., Any]:
    """custom_op, of a single Tag too; what cannot work is refused when it is called."""

    @functools.wraps(custom_op)
    def define(
        name: str,
        fn: Callable[..., Any] | None = None,
        /,
        *,
        mutates_args: Any,
        device_types: Any = None,
        schema: str | None = None,
        tags: Any = None,
    ) -> Any:
        if fn is None:
            options = {"mutates_args": mutates_args, "device_types": device_types, "schema": schema, "tags": tags}
            return functools.partial(define, name, **options)
        known, unknown = _sorted(tags)
        for cause, since in (*_meanings(unknown), *_opaque(fn if schema is None else None)):
            return _RefusedOperator(name, fn, cause, since)
        _report(name, tags, unknown)
        return custom_op(name, fn, mutates_args=mutates_args, device_types=device_types, schema=schema, tags=known)

    return define


def _sorted(tags: Any) -> tuple[tuple[Any, ...], list[_Tag]]:
    """The tags that this torch knows, and the others."""
    all_tags = () if tags is None else tuple(tags) if isinstance(tags, Sequence) else (tags,)
    return tuple(tag for tag in all_tags if not isinstance(tag, _Tag)), [tag for tag in all_tags if isinstance(tag, _Tag)]


def _meanings(tags: list[_Tag]) -> Iterator[tuple[str, str]]:
    return ((f"torch.Tag.{tag.name} says that {tag.meaning}", tag.since) for tag in tags if tag.meaning)


def _opaque(function: Callable[..., Any] | None) -> Iterator[tuple[str, str]]:
    """Why a function whose signature has opaque objects in it cannot be an operator here."""
    from torchspan.backports._base import get_backport, is_lacking

    if function is None or not is_lacking(get_backport("opaque_object")) or hasattr(torch._C, "_register_opaque_type"):
        return
    for name, hint in _hints(function).items():
        for part in (hint, *typing.get_args(hint)):
            if isinstance(part, type) and _is_opaque(part):
                yield f"{name} is an opaque {part.__name__}, a type that this torch's dispatcher does not have", "2.10.0"


def _opaque_in(schema: str) -> Iterator[tuple[str, str]]:
    """Why a schema that names classes of opaque objects cannot be an operator's here."""
    if hasattr(torch._C, "_register_opaque_type"):
        return
    for name in re.findall(r"[\w.<>]+\.\w+", schema):
        if _is_opaque(name):
            yield f"{name} is a class of opaque objects, a type that this torch's dispatcher does not have", "2.10.0"


def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(function)
    except NameError:  # a name that torch's own inference reports
        return {}


def _is_opaque(cls: type | str) -> bool:
    from torchspan.backports._base import get_backport

    is_custom_class: Any = get_backport("opaque_object").names["is_custom_class"]()
    return bool(is_custom_class(cls))


def _report(name: str, tags: Any, unknown: list[_Tag]) -> None:
    if isinstance(tags, torch.Tag):
        BACKPORT.record_use(f"custom_op({name!r}, tags={tags.name})")
    report = current_report()
    if report is None:
        return
    for tag in unknown:
        reason = f"this torch has no such tag; {tag.name} informs compilers of newer torch only"
        report.decide("backport", f"custom_op({name!r}, tags={tag.name})", "without the tag", reason, user_site())


def _defining(define: Callable[..., Any]) -> Callable[..., Any]:
    """Library.define, which refuses a tag with a meaning that this torch lacks, and does without others."""

    @functools.wraps(define)
    def with_tags(self: Any, schema: str, alias_analysis: str = "", *, tags: Any = ()) -> Any:
        known, unknown = _sorted(tags)
        for cause, since in _meanings(unknown):
            raise UnsupportedError(f"Library.define({schema!r}): {cause}; torch has it since {since}")
        for cause, since in _opaque_in(schema):
            raise UnsupportedError(
                f"Library.define({schema!r}): {cause}; torch has it since {since}; give it a tensor or a number"
            )
        _report(schema, None, unknown)
        return define(self, schema, alias_analysis, tags=known)

    return with_tags


def _lacks(module: ModuleType | None) -> bool:
    return "inplace" not in torch.Tag.__members__


BACKPORT = Backport(
    name="custom_op",
    summary="custom_op(tags=…) of a single Tag; torch.Tag.inplace, out, out_variant and reduction; opaque types in signatures",
    target=_PLACE,
    since="2.13.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/_library/custom_ops.py",
    differs=(
        "an operator with Tag.inplace or Tag.out, or with an opaque type in its signature, can be defined, and its call is an "
        "error; Tag.reduction and Tag.out_variant are left out, which the report says"
    ),
    redefines={"custom_op": _taking},
    also=(
        Change("torch", "Tag.inplace", lambda old: old or _TAGS["inplace"], create=True),
        Change("torch", "Tag.out", lambda old: old or _TAGS["out"], create=True),
        Change("torch", "Tag.out_variant", lambda old: old or _TAGS["out_variant"], create=True),
        Change("torch", "Tag.reduction", lambda old: old or _TAGS["reduction"], create=True),
        Change("torch.library", "Library.define", _defining),
    ),
    lacks=_lacks,
)
