"""Which dimensions of a program's inputs are dynamic: from a specification, to marks on the example tensors."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from torchspan.capture.dynamic_dims import Dynamic, dynamic_dims
from torchspan.core.errors import InputError, unknown_name
from torchspan.core.numerics import tensors
from torchspan.core.program import Program

Marks = list[tuple[torch.Tensor, dict[int, Dynamic]]]


def marks_of(program: Program, dynamic: Any) -> Marks:
    """The tensors of a program's example inputs that have dynamic dimensions, and those dimensions.

    `dynamic` is None, True (every dimension that the program leaves free), or what ``torch.export`` takes as dynamic_shapes: a
    mapping by name or position of the inputs, or a sequence, nested as the inputs are; for a tensor, a mapping from dimension
    to ``"name"``, ``(min, max)``, True or a ``torch.export.Dim``, or a set of dimensions.

    >>> marks_of(Program(torch.nn.Linear(2, 3), (torch.ones(4, 2),)), {"input": {0: (2, 64)}})[0][1]
    {0: Dynamic(minimum=2, maximum=64, is_wish=False)}

    Raises:
        InputError: it names what is not there, or an example is too small to stand for other sizes.
    """
    if dynamic is None or dynamic is False:
        return []
    if dynamic is True:
        wish = Dynamic(is_wish=True)
        examples = [*tensors(program.args), *tensors(dict(program.kwargs))]
        return [(tensor, {dim: wish for dim, size in enumerate(tensor.shape) if size > 1}) for tensor in examples]
    marks: Marks = []
    for value, spec, place in _top(program, dynamic):
        _collect(value, spec, place, marks)
    return marks


@contextmanager
def marked(marks: Marks) -> Iterator[None]:
    """Inside, dynamo captures the dimensions as symbols; at the end the marks on the tensors are removed."""
    with dynamic_dims([tensor for tensor, _ in marks], [dims for _, dims in marks]):
        yield


def _top(program: Program, dynamic: Any) -> Iterator[tuple[Any, Any, str]]:
    """The program's inputs that a specification speaks of."""
    if isinstance(dynamic, Sequence) and not isinstance(dynamic, str):
        dynamic = dict(enumerate(dynamic))
    if not isinstance(dynamic, Mapping):
        raise InputError(f"dynamic={dynamic!r} is a {type(dynamic).__name__}; expected True, a mapping by input, or a sequence")
    names = _positions(program)
    for key, spec in dynamic.items():
        if key in program.kwargs:
            yield program.kwargs[key], spec, f"input {key!r}"
            continue
        index = names.get(key, key)
        if type(index) is not int or not 0 <= index < len(program.args):
            raise unknown_name("input", str(key), [*names, *program.kwargs], "dynamic= names inputs by position or by name")
        yield program.args[index], spec, f"input {key!r}"


def _positions(program: Program) -> dict[str, int]:
    return {name: index for index, name in enumerate(list(_parameters(program.target))[: len(program.args)])}


def takes_keyword(target: Any, name: str) -> bool:
    """Whether a module or function has an input of that name.

    >>> takes_keyword(torch.nn.Linear(2, 2), "input"), takes_keyword(len, "dynamic")
    (True, False)
    """
    return name in _parameters(target)


def _parameters(target: Any) -> Mapping[str, Any]:
    return inspect.signature(target.forward if isinstance(target, torch.nn.Module) else target).parameters


def _collect(value: Any, spec: Any, place: str, marks: Marks) -> None:
    if spec is None:
        return
    if isinstance(value, torch.Tensor):
        dims = _dims(value, spec, place)
        if dims:
            marks.append((value, dims))
        return
    items = dict(spec) if isinstance(spec, Mapping) else dict(enumerate(spec)) if isinstance(spec, (list, tuple)) else None
    if items is None or not isinstance(value, (list, tuple, Mapping)):
        raise InputError(f"dynamic= says {spec!r:.80} of {place}, which is a {type(value).__name__}; expected a tensor there")
    for key, inner in items.items():
        try:
            member = value[key]
        except (LookupError, TypeError) as cause:
            raise InputError(f"dynamic= names {key!r} in {place}, which has none ({type(cause).__name__})") from cause
        _collect(member, inner, f"{place}[{key!r}]", marks)


def _dims(tensor: torch.Tensor, spec: Any, place: str) -> dict[int, Dynamic]:
    if isinstance(spec, (set, frozenset)):
        spec = dict.fromkeys(spec, True)
    elif isinstance(spec, (list, tuple)) and len(spec) == tensor.dim():
        spec = dict(enumerate(spec))
    if not isinstance(spec, Mapping):
        raise InputError(f"dynamic= says {spec!r:.80} of {place}, a tensor; expected its dimensions, such as {{0: 'batch'}}")
    dims = {}
    for dim, request in spec.items():
        if type(dim) is not int or not -tensor.dim() <= dim < tensor.dim():
            raise InputError(f"dynamic= names dimension {dim!r} of {place}, which has {tensor.dim()}")
        known = _dimension(request, place)
        if known is not None:
            dims[dim % tensor.dim()] = known
            _check_example(tensor.shape[dim], known, f"dimension {dim} of {place}")
    return dims


def _dimension(request: Any, place: str) -> Dynamic | None:
    """What is asked of one dimension; None if it is static."""
    if request is None or request is False or type(request) is int:
        return None
    if request is True or isinstance(request, str):
        return Dynamic()
    if isinstance(request, tuple) and len(request) == 2:
        return Dynamic(*request)
    kind = str(getattr(getattr(request, "type", None), "name", ""))  # Dim.AUTO, Dim.DYNAMIC, Dim.STATIC of torch.export
    if kind:
        return None if kind == "STATIC" else Dynamic(request.min, request.max, is_wish=kind == "AUTO")
    if hasattr(request, "min") and hasattr(request, "max"):  # torch.export.Dim("batch", min=2, max=64)
        return Dynamic(request.min or None, request.max if request.max < torch.iinfo(torch.int64).max else None)
    raise InputError(f"dynamic= says {request!r:.80} of {place}; expected a name, (min, max), True or a torch.export.Dim")


def _check_example(size: int, dynamic: Dynamic, place: str) -> None:
    if not dynamic.is_wish and size < 2:
        raise InputError(f"{place} has size {size} in the example, and is to be dynamic; give an example of 2 or more")
    if not (dynamic.minimum or 0) <= size <= (size if dynamic.maximum is None else dynamic.maximum):
        raise InputError(f"{place} has size {size} in the example, outside of {dynamic.minimum} to {dynamic.maximum}")
