"""Running an entry of an artifact: forward and backward inside one autograd function, and what has to happen around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchspan.artifacts.checker import Checker
from torchspan.artifacts.checks import Failed
from torchspan.artifacts.instructions import Runner
from torchspan.artifacts.paths import decode_path, following, show_path
from torchspan.artifacts.size_conditions import read_sizes
from torchspan.artifacts.values import decode, find_name
from torchspan.core.errors import IntegrityError

Symbols = Mapping[str, int]
KEPT = ("non_alias", "unsafe_view_alias", "custom_function_view")


class Entry:
    """One compiled form of a program: for one set of shapes and settings, which its `checker` holds.

    `plan` is what `torchspan.artifacts.artifact` writes: which inputs are changed, how outputs are made, what backward takes.
    """

    def __init__(self, plan: Mapping[str, Any], checker: Checker, forward: Runner, backward: Runner | None) -> None:
        self.checker = checker
        self._forward = forward
        self._backward = backward
        self._mutated = tuple(plan["mutated"])
        self._outputs = tuple(_placing(output) for output in plan["outputs"])
        self._num_results = len(self._outputs) + int(plan["num_bases"])
        if self._num_results > forward.num_outputs:
            raise IntegrityError(
                f"an artifact's plan has {self._num_results} results of {forward.num_outputs} that it computes"
            )
        self._kept = [i for i in range(self._num_results) if i >= len(self._outputs) or self._outputs[i]["kind"] in KEPT]
        self._without_grad = [
            place for place, i in enumerate(self._kept) if i < len(self._outputs) and not self._outputs[i]["grad"]
        ]
        self._tangents = [_Tangent(spec, self._kept.index(spec["result"])) for spec in plan["tangents"]]
        self._backward_inputs = tuple((str(kind), int(index)) for kind, index in plan["backward_inputs"])
        self._result = result_builder(plan["result"])
        self._stores = [_storing(*store) for store in plan.get("stores", ())]

    def call(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The program's result.

        Raises:
            Failed: a guard does not hold.
        """
        inputs, symbols = self.checker.gather(target, args, kwargs)
        if self._backward is not None and torch.is_grad_enabled():
            kept = _Differentiable.apply(self, symbols, *inputs)
        else:
            with torch.no_grad():
                kept = self.run_forward(inputs, symbols)[0]
        outputs = self._all_outputs(kept, inputs, symbols)
        values = {"target": target, "args": args, "kwargs": kwargs}
        result = self._result(outputs, values)
        for place, key, value in [store(outputs, values) for store in self._stores]:
            place[key] = value
        return result

    def serves(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether its guards hold in this call; nothing is run."""
        try:
            self.checker.gather(target, args, kwargs)
        except Failed:
            return False
        return True

    def run_forward(self, inputs: Sequence[Tensor], symbols: Symbols) -> tuple[list[Tensor], list[Tensor]]:
        """What the program computes, and what its backward needs; inputs that it changes are changed."""
        with torch._C._DisableAutocast():
            values = self._forward(inputs, symbols)
        changes = values[: len(self._mutated)]
        results = values[len(changes) : len(changes) + self._num_results]
        saved = values[len(changes) + self._num_results :]
        if changes:
            memory = {inputs[index].untyped_storage().data_ptr() for index in self._mutated}
            saved = [value.clone() if value.untyped_storage().data_ptr() in memory else value for value in saved]
            for index, value in zip(self._mutated, changes):
                inputs[index].copy_(value)
        return [results[i] for i in self._kept], saved

    def without_grad(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Those of what the program computes through which no gradients flow."""
        return [kept[place] for place in self._without_grad if isinstance(kept[place], Tensor)]

    def run_backward(self, saved: Sequence[Tensor], gradients: Sequence[Tensor], symbols: Symbols) -> list[Tensor | None]:
        """The gradients of the inputs, None where there is none."""
        assert self._backward is not None, "a program without a backward has been asked for gradients"
        tangents = [tangent.of(gradients, symbols) for tangent in self._tangents]
        values = {"saved": saved, "tangent": tangents}
        with torch._C._DisableAutocast():
            return self._backward([values[kind][index] for kind, index in self._backward_inputs], symbols)

    def _all_outputs(self, kept: Sequence[Tensor], inputs: Sequence[Tensor], symbols: Symbols) -> list[Tensor]:
        """The program's outputs: what was computed, and views of it or of inputs, made as views again."""
        results: dict[int, Tensor] = dict(zip(self._kept, kept))
        for index, spec in enumerate(self._outputs):
            if index in results:
                continue
            kind, base = spec["kind"], spec["base"]
            if kind == "is_input":
                results[index] = inputs[base]
            elif kind == "alias_of_input":
                results[index] = _view(inputs[base], spec, symbols)
            elif kind == "alias_of_intermediate_base_is_user_output":
                results[index] = _view(results[base], spec, symbols)
            else:
                results[index] = _view(results[base + len(self._outputs)], spec, symbols)
        return [results[index] for index in range(len(self._outputs))]


def _view(base: Tensor, spec: Mapping[str, Any], symbols: Symbols) -> Tensor:
    source = base if spec["grad"] else base.detach()
    shape, stride, (offset,) = (sizes(symbols) for sizes in spec["placed"])
    return source.as_strided(shape, stride, base.storage_offset() + offset)


def _placing(spec: Mapping[str, Any]) -> Mapping[str, Any]:
    """How an output is made, with its shape, strides and offset in the base ready to be computed if it is a view."""
    if "shape" not in spec:
        return spec
    return {**spec, "placed": [read_sizes(numbers) for numbers in (spec["shape"], spec["stride"], [spec["offset"]])]}


class _Tangent:
    """The gradient of one output, as the backward was compiled to take it."""

    def __init__(self, spec: Mapping[str, Any], place: int) -> None:
        self._place = place
        self._shape, self._stride = read_sizes(spec["shape"]), read_sizes(spec["stride"])
        self._dtype = decode({"dtype": spec["dtype"]})

    def of(self, gradients: Sequence[Tensor], symbols: Symbols) -> Tensor:
        gradient, stride = gradients[self._place], self._stride(symbols)
        if gradient.stride() == stride and gradient.dtype is self._dtype:
            return gradient
        like = torch.empty_strided(self._shape(symbols), stride, dtype=self._dtype, device=gradient.device)
        return like.copy_(gradient)


class _Differentiable(torch.autograd.Function):
    """An entry as one step of autograd."""

    @staticmethod
    def forward(ctx: Any, entry: Entry, symbols: Symbols, *inputs: Tensor) -> tuple[Tensor, ...]:
        kept, saved = entry.run_forward(inputs, symbols)
        ctx.entry, ctx.symbols = entry, symbols
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(*entry.without_grad(kept))
        return tuple(kept)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return (None, None, *ctx.entry.run_backward(ctx.saved_tensors, gradients, ctx.symbols))


# the program's result, made of outputs and inputs


Builder = Callable[[Sequence[Tensor], Mapping[str, Any]], Any]


def result_builder(structure: Any) -> Builder:
    """A function that makes the result that `structure` describes."""
    if not isinstance(structure, dict):
        raise IntegrityError(f"an artifact's result is described by {structure!r:.80}")
    if "output" in structure:
        index = int(structure["output"])
        return lambda outputs, values: outputs[index]
    if "path" in structure:
        follow = following(decode_path(structure["path"]))
        return lambda outputs, values: follow(values)
    if "constant" in structure:
        constant = structure["constant"]
        decode(constant)  # what cannot be made is refused now
        return lambda outputs, values: decode(constant)
    if "call" in structure:
        return _calling(find_name(structure["call"]), structure)
    if "object" in structure:
        return _filling(find_name(structure["object"]), structure)
    return _container(structure)


def _storing(steps: Any, key: Any, structure: Any) -> Callable[..., tuple[dict[Any, Any], Any, Any]]:
    """A function that gives the dict that a call stores into, the key, and the value.

    `key` is a list with the key of a dict, or the name of an attribute. Only the model and its arguments are stored on, and
    only where that runs no code.
    """
    path = decode_path(steps)
    is_private = any(kind == "attr" and str(name).startswith("__") for kind, name in path)
    if path[0][0] != "local" or is_private or not (isinstance(key, (str, list)) and _is_storable(structure)):
        raise IntegrityError(
            f"the artifact stores {key!r:.80} on {show_path(path)}, where nothing may be stored; build it again"
        )
    find, build = following(path), result_builder(structure)
    name = decode(key[0]) if isinstance(key, list) else key

    def store(outputs: Sequence[Tensor], values: Mapping[str, Any]) -> tuple[dict[Any, Any], Any, Any]:
        holder = find(values)
        place = holder if isinstance(key, list) else vars(holder)
        if type(holder) in (type, ModuleType) or not isinstance(place, dict):
            raise IntegrityError(
                f"the artifact stores on {show_path(path)}, a {type(holder).__name__}, which has no attributes to set"
            )
        return place, name, build(outputs, values)

    return store


def _is_storable(structure: Any) -> bool:
    """Whether a value that is stored is made of what was computed and of plain constants."""
    if isinstance(structure, list):
        return all(map(_is_storable, structure))
    if not isinstance(structure, dict):
        return structure is None or isinstance(structure, (bool, int, float, str))
    return set(structure) <= {"output", "constant", "tuple", "list"} and all(map(_is_storable, structure.values()))


def is_record(kind: Any) -> bool:
    """Whether `kind` is a dataclass or a named tuple.

    >>> from torchspan.core.program import Program
    >>> is_record(torch.Size), is_record(Program)
    (False, True)
    """
    if not isinstance(kind, type):
        return False
    is_named_tuple = issubclass(kind, tuple) and isinstance(getattr(kind, "_fields", None), tuple)
    return is_named_tuple or isinstance(getattr(kind, "__dataclass_fields__", None), dict)


def _calling(function: Callable[..., Any], structure: Mapping[str, Any]) -> Builder:
    args = [result_builder(item) for item in structure["args"]]
    kwargs = [(str(name), result_builder(item)) for name, item in structure["kwargs"]]
    if not is_record(function):  # of any other class, such as subprocess.Popen, a call is not only a value
        raise IntegrityError(f"an artifact's result is made by {structure['call']}, neither a dataclass nor a named tuple")
    return lambda outputs, values: function(
        *(build(outputs, values) for build in args), **{name: build(outputs, values) for name, build in kwargs}
    )


def is_plain_class(kind: Any) -> bool:
    """Whether objects of a class consist of their attributes: no code of the class runs when one is made or dies.

    >>> from fractions import Fraction
    >>> is_plain_class(Entry), is_plain_class(Fraction), is_plain_class(torch.nn.Linear), is_plain_class(dict)
    (True, False, False, False)
    """
    if not isinstance(kind, type) or issubclass(kind, torch.nn.Module) or is_record(kind):
        return False
    has_only_attributes = kind.__dictoffset__ != 0 and not any(vars(base).get("__slots__") for base in kind.__mro__)
    is_made_plainly = kind.__new__ is object.__new__ and kind.__basicsize__ <= _Plain.__basicsize__
    return is_made_plainly and has_only_attributes and not hasattr(kind, "__del__") and type(kind).__call__ is type.__call__


class _Plain:
    """The smallest class: objects that take more memory than its own have more than attributes."""


def _filling(kind: Any, structure: Mapping[str, Any]) -> Builder:
    if not is_plain_class(kind):
        raise IntegrityError(f"an artifact's result has a {structure['object']}, whose objects have more than attributes")
    parts = [(str(name), result_builder(item)) for name, item in structure["attributes"]]

    def build(outputs: Sequence[Tensor], values: Mapping[str, Any]) -> Any:
        instance = object.__new__(kind)
        vars(instance).update((name, make(outputs, values)) for name, make in parts)
        return instance

    return build


def _container(structure: Mapping[str, Any]) -> Builder:
    from collections import OrderedDict

    ((kind, items),) = structure.items()
    if kind in ("tuple", "list"):
        parts = [result_builder(item) for item in items]
        make = tuple if kind == "tuple" else list
        return lambda outputs, values: make(build(outputs, values) for build in parts)
    if kind in ("dict", "OrderedDict"):
        pairs = [(decode(key), result_builder(item)) for key, item in items]
        mapping = dict if kind == "dict" else OrderedDict
        return lambda outputs, values: mapping((key, build(outputs, values)) for key, build in pairs)
    raise IntegrityError(f"an artifact's result is a {kind!r}, a kind that torchspan does not know: build it again")
