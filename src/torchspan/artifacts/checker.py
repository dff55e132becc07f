"""Guards of an artifact: checked at every call, without dynamo; and the graph's inputs, gathered on the same walk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter, contains, itemgetter
from typing import Any

import torch

from torchspan.artifacts.ambient import ambient_key, ambient_state, is_plain_state
from torchspan.artifacts.checks import CHECKS, Check, Failed, is_equal_to_others
from torchspan.artifacts.paths import STEPS, Path, decode_path, show_path
from torchspan.artifacts.size_conditions import Sizes
from torchspan.artifacts.values import decode
from torchspan.core.errors import IntegrityError

# one check: from what an artifact says to a function that gives None, or what was expected and found


# the ambient state: what a program may depend on without being given it


# the walk


class _Place:
    """An object that guards or inputs are reached through: its checks, the inputs that it is, and the places behind it."""

    __slots__ = ("behind", "checks", "inputs", "number", "path")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checks: list[tuple[str, Any, Check]] = []  # its kind, what it expects, itself
        self.inputs: list[int] = []
        self.number = 0
        self.behind: dict[Any, tuple[Callable[[Any], Any], _Place]] = {}


class Checker:
    """Checks the guards of one entry of an artifact, and gathers the inputs of its graph from the model and the arguments.

    `guards` are objects with the keys ``at`` (a path), ``check``, ``expected``; `same` are groups of paths that lead to one
    object; `ambient` is the state that torch must be in; `inputs` are the paths of the graph's inputs. Inputs must be distinct
    objects, and those of `unshared` may not share memory with any other. `sizes` are what `write_conditions` wrote.
    """

    def __init__(
        self,
        guards: Sequence[Mapping[str, Any]],
        same: Sequence[Sequence[Any]],
        ambient: Mapping[str, Any],
        inputs: Sequence[Any],
        unshared: Sequence[int] = (),
        sizes: Mapping[str, Any] | None = None,
    ) -> None:
        self._root = _Place(())
        self._ambient = dict(ambient)
        self._quick: dict[tuple[Any, ...], _Quick] = {}
        self._unshared = tuple(unshared)
        self._num_inputs = len(inputs)
        groups = [[self._place(steps) for steps in group] for group in same]
        for guard in guards:
            if guard.get("check") not in CHECKS:
                raise IntegrityError(f"an artifact holds a guard of the unknown kind {guard.get('check')!r}")
            kind, expected = guard["check"], guard["expected"]
            self._place(guard["at"]).checks.append((kind, expected, CHECKS[kind](expected)))
        for index, steps in enumerate(inputs):
            self._place(steps).inputs.append(index)
        self._sizes = Sizes(sizes or {})
        for index, steps in enumerate((sizes or {}).get("variables", {}).values(), start=len(inputs)):
            self._place(steps).inputs.append(index)
        self._steps = _flatten(self._root)
        numbers = {index: place.number for _, _, place in self._steps for index in place.inputs}
        self._input_numbers = [numbers[index] for index in range(len(numbers))]
        self._same = [(group[0], place) for group in groups for place in group[1:]]

    def _place(self, steps: Sequence[Sequence[Any]]) -> _Place:
        """The place that encoded `steps` lead to; steps that several paths have in common are decoded once."""
        if not steps:
            raise IntegrityError("an artifact holds an empty path")
        place = self._root
        for kind, key in steps:
            name = (kind, key) if type(key) is str else (kind, repr(key), None)
            if name not in place.behind:
                path = (*place.path, *decode_path([[kind, key]]))
                place.behind[name] = (STEPS[kind](path[-1][1]), _Place(path))
            place = place.behind[name][1]
        return place

    def check(self, target: Any) -> None:
        """Raise Failed unless the guards on `target` and on modules hold."""
        _walk(self._steps, {"target": target})

    def gather(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, int]]:
        """The graph's inputs, in order, and the symbols of sizes that are dynamic.

        Raises:
            Failed: a guard does not hold; says which, what was expected and what was found.
        """
        objects = self._find({"target": target, "args": args, "kwargs": kwargs})
        gathered = [objects[number] for number in self._input_numbers]
        for first, second in self._same:
            if objects[first.number] is not objects[second.number]:
                raise Failed(f"{show_path(first.path)} and {show_path(second.path)} are no longer the same object")
        inputs, symbols = gathered[: self._num_inputs], dict(zip(self._sizes.names, gathered[self._num_inputs :]))
        self._refuse_aliases(inputs)
        failed = self._sizes.failed(symbols)
        if failed is not None:
            raise Failed(failed)
        return inputs, symbols

    def _find(self, root: Mapping[str, Any]) -> list[Any]:
        """The objects at all places, by number; raises Failed unless every guard holds and torch is set as expected."""
        key = ambient_key()
        quick = self._quick.get(key)
        objects = None if quick is None else quick.find(root)
        if objects is not None:
            return objects
        if quick is None:
            self._check_state()
        objects = _walk(self._steps, root)
        if is_plain_state(key):
            self._quick[key] = _Quick(self._steps, objects)
        return objects

    def _check_state(self) -> None:
        state = ambient_state()
        for name, expected in self._ambient.items():
            if state.get(name) != expected:
                raise Failed(f"{name} is {state.get(name)}, expected {expected}")

    def _refuse_aliases(self, inputs: list[Any]) -> None:
        if len(set(map(id, inputs))) != len(inputs):
            raise Failed("two inputs are one tensor; they were two when the artifact was made")
        if not self._unshared:
            return
        memory = [_memory_of(tensor) for tensor in inputs]
        for index in self._unshared:
            if memory[index] and memory.count(memory[index]) > 1:
                raise Failed(f"input {index}, which is changed in place, shares its memory with another input")


def _memory_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


_Step = tuple[int, Callable[[Any], Any], _Place]


def _flatten(root: _Place) -> list[_Step]:
    """The step to each place behind `root`; places behind the same one are neighbours. Numbers them in this order, from 1."""
    steps: list[_Step] = []
    places = [root]
    for place in places:
        for step, behind in place.behind.values():
            steps.append((place.number, step, behind))
            behind.number = len(steps)
            places.append(behind)
    return steps


def _walk(steps: Sequence[_Step], root: Any) -> list[Any]:
    """The objects at all places, by number, `root` first; raises Failed at the first check that does not hold."""
    objects = [root]
    for above, step, place in steps:
        try:
            value = step(objects[above])
        except (AttributeError, LookupError, TypeError) as cause:
            raise Failed(f"{show_path(place.path)} is not there ({type(cause).__name__}: {cause})") from None
        objects.append(value)
        try:
            failure = next((failure for _, _, check in place.checks if (failure := check(value)) is not None), None)
        except (AttributeError, LookupError, TypeError, ValueError, OSError) as cause:  # a check of what is of another kind
            failure = f"is a {type(value).__qualname__} and was something else when the artifact was made ({cause})"
        if failure is not None:
            raise Failed(f"{show_path(place.path)} {failure}")
    return objects


class _Quick:
    """A faster `_walk`, for when one has succeeded: all checks of one kind are one comparison, most of it in C.

    It accepts what is like the `objects` that were found once, which is less than the guards accept: what it does not accept,
    `_walk` decides.
    """

    def __init__(self, steps: Sequence[_Step], objects: Sequence[Any]) -> None:
        self._fetches = list(_fetches(steps))
        of_kind: dict[str, dict[int, Any]] = {kind: {} for kind in CHECKS}
        self._others: list[tuple[int, Check]] = []
        for _, _, place in steps:
            for kind, expected, check in place.checks:
                if not _is_at_once(kind, expected) or place.number in of_kind[kind]:
                    self._others.append((place.number, check))
                else:
                    of_kind[kind][place.number] = expected
        lengths, lacking, constants, tensors = (of_kind[kind] for kind in ("length", "own_attribute", "constant", "tensor"))
        self._sized, self._lengths = _pick(lengths), list(lengths.values())
        self._lack, self._lacking = _pick(lacking), list(lacking.values())
        self._constant, self._constants = _pick(constants), tuple(map(decode, constants.values()))
        self._typed = _pick([*of_kind["type"], *constants])
        self._types = list(map(type, self._typed(objects)))
        self._forwards = [(kind, getattr(kind, "forward", None)) for kind in dict.fromkeys(self._types)]
        self._tensors, guards = _pick(tensors), torch._C._dynamo.guards
        self._fit = guards.TensorGuards(*self._tensors(objects), dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def find(self, root: Any) -> list[Any] | None:
        """What `_walk` gives, or None where `_walk` has to decide."""
        objects = [root]
        try:
            for above, fetch, is_many in self._fetches:
                if is_many:
                    objects += fetch(objects[above])
                else:
                    objects.append(fetch(objects[above]))
            return objects if self._holds(objects) else None
        except (AttributeError, LookupError, TypeError):
            return None

    def _holds(self, objects: list[Any]) -> bool:
        return (
            list(map(len, self._sized(objects))) == self._lengths
            and list(map(type, self._typed(objects))) == self._types
            and self._constant(objects) == self._constants
            and not any(map(contains, map(vars, self._lack(objects)), self._lacking))
            and all(getattr(kind, "forward", None) is forward for kind, forward in self._forwards)
            and self._fit(*self._tensors(objects))
            and all(check(objects[at]) is None for at, check in self._others)
        )


_AT_ONCE = ("length", "type", "constant", "own_attribute", "tensor")


def _is_at_once(kind: str, expected: Any) -> bool:
    if kind == "constant":
        return not is_equal_to_others(decode(expected))
    return kind in _AT_ONCE and (kind != "tensor" or _is_static(expected))


def _is_static(expected: Mapping[str, Any]) -> bool:
    return None not in (*expected["shape"], *expected["stride"]) and expected["layout"] == "torch.strided"


def _pick(places: Iterable[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """A function that picks the objects at `places` out of all objects."""
    numbers = tuple(places)
    return itemgetter(*numbers) if len(numbers) > 1 else lambda objects: tuple(objects[at] for at in numbers)


def _fetches(steps: Sequence[_Step]) -> Iterator[tuple[int, Callable[[Any], Any], bool]]:
    """The `steps`, where those that take attributes, or items, of the same object are one; and whether it is several."""
    for (above, kind), group in groupby(steps, lambda step: (step[0], type(step[1]))):
        alike = list(group)
        if len(alike) > 1 and kind in (attrgetter, itemgetter):
            yield above, kind(*(place.path[-1][1] for _, _, place in alike)), True
        else:
            yield from ((above, step, False) for _, step, _ in alike)
