"""The inputs that a training step is captured for: nested as the program takes them, flat as a Graph does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_flatten_with_path, tree_unflatten

from torchspan.capture._layout import Layout, layout_of, local
from torchspan.core.errors import GraphError, GuardError, InputError
from torchspan.core.graph import Graph, InputSpec
from torchspan.core.program import Program

_KEY = "torchspan_inputs"
_CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


@dataclass(frozen=True)
class TensorInput:
    """One tensor among the inputs, as the capture saw it; shape and stride are those of this rank's part."""

    name: str
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    layout: Layout | None

    def take(self, value: Any) -> Tensor:
        """This rank's part of what is given, with the strides of the capture; GuardError if it is another kind of tensor."""
        if not isinstance(value, Tensor):
            raise GuardError(_told(self.name, f"is {_shown(value)}", "for a tensor there"))
        if value.requires_grad:
            raise GuardError(f"input {self.name} requires a gradient, and a captured step gives none to inputs; detach it")
        if layout_of(value) != self.layout:
            raise GuardError(_told(self.name, f"is laid out as {layout_of(value)}", f"for {self.layout}"))
        part = local(value)
        actual, expected = (part.shape, part.dtype, part.device), (self.shape, self.dtype, self.device)
        for what, actual_value, expected_value in zip(("shape", "dtype", "device"), actual, expected):
            if actual_value != expected_value:
                raise GuardError(_told(self.name, f"has {what} {_plain(actual_value)}", f"for {_plain(expected_value)}"))
        return part if part.stride() == self.stride else self._copied(part)

    def _copied(self, part: Tensor) -> Tensor:
        """The same values in memory as the graph's views expect them."""
        if any(step == 0 and size > 1 for step, size in zip(self.stride, self.shape)):
            raise GuardError(
                f"input {self.name} has strides {part.stride()}; the step was captured for a tensor that repeats one value in "
                f"memory, with strides {self.stride}; capture it with {self.name}.contiguous()"
            )
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device).copy_(part)


@dataclass(frozen=True)
class ConstantInput:
    """One value among the inputs that is not a tensor: the graph holds what the program computed from it."""

    name: str
    value: Any

    def check(self, value: Any) -> None:
        """Raise GuardError unless `value` is that of the capture."""
        if type(value) is not type(self.value) or repr(value) != repr(self.value):
            raise GuardError(_told(self.name, f"is {_shown(value)}", f"for {self.value!r}"))


_ADVICE = "capture the step again for it"


@dataclass(frozen=True)
class Inputs:
    """The structure, the constants and the tensors of ``(args, kwargs)``.

    >>> inputs = Inputs.of(Program(print, (torch.ones(2), {"mask": None}), {"scale": 2.0}))
    >>> [leaf.name for leaf in inputs.leaves]
    ['0', '1.mask', 'scale']
    >>> inputs.tensors((torch.ones(2), {"mask": None}), {"scale": 3.0})
    Traceback (most recent call last):
    torchspan.core.errors.GuardError: input scale is 3.0; the step was captured for 2.0; capture the step again for it
    """

    structure: TreeSpec
    leaves: tuple[TensorInput | ConstantInput, ...]
    containers: Mapping[str, Any]

    @classmethod
    def of(cls, program: Program) -> Inputs:
        """The inputs of a program; InputError for a value that can be neither a tensor of the graph nor a constant."""
        arguments = (program.args, dict(program.kwargs))
        parts = dict(_parts(arguments))
        names = [name for name, part in parts.items() if isinstance(part, _Leaf)]
        values, structure = tree_flatten(arguments)
        leaves = tuple(_leaf(name, value) for name, value in zip(names, values, strict=True))
        return cls(structure, leaves, {name: part for name, part in parts.items() if not isinstance(part, _Leaf)})

    @property
    def specs(self) -> tuple[InputSpec, ...]:
        """What a Graph's signature says of the tensors."""
        return tuple(InputSpec("input", leaf.name) for leaf in self.leaves if isinstance(leaf, TensorInput))

    def tensors(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors of a call, flat, this rank's part of each; GuardError says what differs from the capture."""
        values, structure = tree_flatten((args, dict(kwargs)))
        if structure != self.structure:
            values = self._in_order((args, dict(kwargs)))
        tensors: list[Tensor] = []
        for leaf, value in zip(self.leaves, values, strict=True):
            if isinstance(leaf, TensorInput):
                tensors.append(leaf.take(value))
            else:
                leaf.check(value)
        return tensors

    def unflatten(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments of the program, made of its flat tensors and the constants."""
        remaining = iter(tensors)
        values = [next(remaining) if isinstance(leaf, TensorInput) else leaf.value for leaf in self.leaves]
        args, kwargs = tree_unflatten(values, self.structure)
        return args, kwargs

    def wrap(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The program's tensors, made of this rank's part of each."""
        layouts = [leaf.layout for leaf in self.leaves if isinstance(leaf, TensorInput)]
        return [tensor if layout is None else layout.wrap(tensor) for layout, tensor in zip(layouts, tensors, strict=True)]

    def _in_order(self, arguments: Any) -> list[Any]:
        """The leaves in the order of the capture: dicts may be filled in another one. GuardError if they are other leaves."""
        parts = dict(_parts(arguments))
        expected: dict[str, Any] = {**self.containers, **{leaf.name: None for leaf in self.leaves}}
        for name in [name for name in parts if name in expected]:
            if _kind(parts[name]) is not _kind(expected[name]):
                raise GuardError(_told(name, f"is {_shown_part(parts[name])}", f"for {_shown_part(expected[name])}"))
        for name in {**expected, **parts}:
            if name not in parts:
                raise GuardError(_told(name, "is missing", "with it"))
            if name not in expected:
                raise GuardError(_told(name, "was given", "without it"))
        for name, container in self.containers.items():
            if parts[name] != container:
                raise GuardError(_told(name, f"is {_shown_part(parts[name])}", f"for {_shown_part(container)}"))
        return [parts[leaf.name].value for leaf in self.leaves]


def _told(name: str, actual: str, expected: str) -> str:
    return f"input {name} {actual}; the step was captured {expected}; {_ADVICE}"


@dataclass(frozen=True)
class _Leaf:
    value: Any


def _parts(value: Any, name: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Every leaf as a _Leaf, and every container as its type and what the type keeps beside its children, by name."""
    children, structure = tree_flatten_with_path(value, is_leaf=lambda part: part is not value)
    if len(children) == 1 and not children[0][0]:
        yield name, _Leaf(value)
        return
    yield _container_name(name, depth, value), _container(value, structure)
    for (key,), child in children:
        shown = "" if depth == 0 else str(getattr(key, "idx", getattr(key, "key", getattr(key, "name", key))))
        yield from _parts(child, ".".join(filter(None, (name, shown))), depth + 1)


def _container_name(name: str, depth: int, value: Any) -> str:
    """`name`; the outermost containers, args and kwargs, have none of their own."""
    if depth == 0:
        return ""
    return name or ("(args)" if isinstance(value, tuple) else "(kwargs)")


def _container(value: Any, structure: TreeSpec) -> Any:
    """The type of a container; with what the type keeps beside the children, unless their names tell it."""
    return (type(value), None if isinstance(value, (dict, list, tuple)) else structure.context)


def _kind(part: Any) -> Any:
    """The type of a container; None for a leaf."""
    return part[0] if isinstance(part, tuple) else None


def _shown_part(part: Any) -> str:
    """A container by its type and what that keeps, a leaf by its value."""
    if not isinstance(part, tuple):
        return _shown(part.value) if isinstance(part, _Leaf) else "one value"
    kind, context = part
    return f"a {kind.__name__}" + ("" if context is None else f" with {context!r}")


def _shown(value: Any) -> str:
    """A value in a message: a tensor by its shape."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, torch.Size) else value


def _leaf(name: str, value: Any) -> TensorInput | ConstantInput:
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise InputError(f"input {name} requires a gradient, and a captured step gives none to inputs; detach it")
        part = local(value)
        return TensorInput(name, part.shape, part.stride(), part.dtype, part.device, layout_of(value))
    if not isinstance(value, _CONSTANTS):
        raise InputError(
            f"input {name} of a training step is a {type(value).__name__}; expected tensors, numbers, text or None, in tuples, "
            "lists, dicts or classes that are registered with torch.utils._pytree (torch.utils._pytree.register_dataclass)"
        )
    return ConstantInput(name, value)


def keep_inputs(module: torch.fx.GraphModule, inputs: Inputs) -> None:
    """Note on a graph's module what it was captured for."""
    module.meta[_KEY] = inputs


def inputs_of(graph: Graph) -> Inputs:
    """What a graph was captured for; GraphError if a pass has lost it."""
    inputs = graph.module.meta.get(_KEY)
    if not isinstance(inputs, Inputs):
        raise GraphError(
            "the graph does not say which inputs it was captured for; a pass keeps module.meta "
            f"(these ran: {', '.join(graph.notes) or 'none'})"
        )
    return inputs
