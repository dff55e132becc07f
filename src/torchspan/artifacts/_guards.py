"""Guards of an artifact: checked at every call, without dynamo; and the graph's inputs, gathered on the same walk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from operator import attrgetter, contains, itemgetter
from pathlib import Path as FilePath
from types import ModuleType
from typing import Any

import torch
from torch.utils import _device

from torchspan.artifacts._code import digest_class, digest_function, is_own_code, is_torch_code
from torchspan.artifacts._sizes import Sizes
from torchspan.artifacts._values import STEPS, Path, decode, decode_path, name_of, show_path
from torchspan.core.errors import IntegrityError

Check = Callable[[Any], "str | None"]


class Failed(Exception):
    """A guard does not hold; carries what to say. Never leaves this folder."""


# one check: from what an artifact says to a function that gives None, or what was expected and found


def describe_tensor(tensor: torch.Tensor) -> dict[str, Any]:
    """What a tensor guard compares, as JSON."""
    return {
        "type": name_of(type(tensor)),
        "dtype": str(tensor.dtype),
        "device": str(tensor.device),
        "layout": str(tensor.layout),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()) if tensor.layout is torch.strided else [],
        "requires_grad": tensor.requires_grad,
        "flags": [tensor.is_conj(), tensor.is_neg()],
    }


def _tensor(expected: Any) -> Check:
    if None in (*expected["shape"], *expected["stride"]):
        return _tensor_of_any_size(expected)
    shape, stride = torch.Size(expected["shape"]), tuple(expected["stride"])
    dtype = decode({"dtype": expected["dtype"].removeprefix("torch.")})
    device, wants_grad, type_name = torch.device(expected["device"]), expected["requires_grad"], expected["type"]
    plain = expected["layout"] == "torch.strided" and expected["flags"] == [False, False]
    kinds: set[type] = set()

    def check(value: Any) -> str | None:
        kind = type(value)
        if kind not in kinds:
            if name_of(kind) != type_name:
                return f"expected a {type_name.partition(':')[2]}, found a {kind.__qualname__}"
            kinds.add(kind)
        same = value.dtype is dtype and value.shape == shape and value.device == device
        same = same and (wants_grad is None or value.requires_grad is wants_grad)
        if same and plain and value.layout is torch.strided and value.stride() == stride and not _is_lazy(value):
            return None
        found = describe_tensor(value)
        compared = [key for key in expected if key != "requires_grad" or wants_grad is not None]
        differ = [f"{key} {found[key]} (expected {expected[key]})" for key in compared if found[key] != expected[key]]
        return f"has {', '.join(differ)}" if differ else None

    return check


def _tensor_of_any_size(expected: Any) -> Check:
    """Of a tensor with dynamic dimensions, which are None in its shape and strides: conditions on sizes hold those."""

    def fits(name: str, found: Any) -> bool:
        wanted = expected[name]
        if name not in ("shape", "stride"):
            return bool(found == wanted)
        return len(found) == len(wanted) and all(size in (None, is_now) for size, is_now in zip(wanted, found))

    def check(value: Any) -> str | None:
        if not isinstance(value, torch.Tensor):
            return f"expected a tensor, found a {type(value).__qualname__}"
        found = describe_tensor(value)
        differ = [f"{key} {found[key]} (expected {_any(expected[key])})" for key in expected if not fits(key, found[key])]
        return f"has {', '.join(differ)}" if differ else None

    return check


def _any(expected: Any) -> Any:
    if not isinstance(expected, list):
        return expected
    return f"[{', '.join('any' if item is None else str(item) for item in expected)}]"


def _is_lazy(tensor: torch.Tensor) -> bool:
    """Whether a tensor's numbers are the conjugates or the negatives of what its memory holds."""
    return tensor.is_conj() or tensor.is_neg()


def _constant(expected: Any) -> Check:
    wanted = decode(expected)
    kind, is_nan, written = type(wanted), wanted != wanted, repr(wanted) if _is_equal_to_others(wanted) else None

    def check(value: Any) -> str | None:
        if type(value) is kind and (value == wanted or (is_nan and value != value)) and written in (None, repr(value)):
            return None
        return f"is {value!r:.80}, expected {wanted!r:.80}"

    return check


def _is_equal_to_others(constant: Any) -> bool:
    """Whether something of the same type is equal and yet another constant, such as -0.0, or (True,) beside (1,)."""
    return isinstance(constant, (tuple, list, dict)) or (isinstance(constant, (float, complex)) and not constant)


def _type(expected: Any) -> Check:
    name, digest = expected
    known: dict[type, Any] = {}

    def check(value: Any) -> str | None:
        kind = type(value)
        if kind in known:
            changed = known[kind] is not getattr(kind, "forward", None)
            return f"its class {kind.__qualname__} got another forward" if changed else None
        found = name_of(kind) if ":" in name else kind.__qualname__  # without a module: wherever the class is defined
        if found != name:
            return f"is a {found}, expected a {name}"
        is_module = hasattr(kind, "forward")  # also one of torch, whose forward somebody may have replaced
        if (digest is not None or is_module) and digest_class(kind) != digest:
            return f"the code of its class {name} is not what it was when the artifact was made"
        known[kind] = getattr(kind, "forward", None)
        return None

    return check


def _remembering(check: Check, key: Callable[[Any], Any] = lambda value: value) -> Check:
    """`check`, which is not made again of an object (by its `key`) that it has held for."""
    known: list[Any] = []

    def remembered(value: Any) -> str | None:
        seen = key(value)
        if any(seen is one for one in known):
            return None
        said = check(value)
        if said is None:
            known.append(seen)
        return said

    return remembered


def _function(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        if digest_function(value) != expected:
            return f"the code of {name_of(value)} is not what it was when the artifact was made"
        return None

    return _remembering(check, lambda value: getattr(value, "__code__", value))


def _named(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        found = identity_of(value)
        return None if found == expected else f"is {found}, expected {expected}"

    return _remembering(check)


def _torch_function(expected: Any) -> Check:
    """Of a function that torch has by that name: it is still torch's, or torchspan's in its place; not anybody else's."""
    module, name = expected

    def check(value: Any) -> str | None:
        is_builtin = not hasattr(value, "__code__")
        is_right = getattr(value, "__module__", None) == module if is_builtin else is_torch_made(value)
        is_right = is_right and getattr(value, "__name__", None) == name
        return None if is_right else f"is {name_of(value)}, not torch's {name}"

    return _remembering(check)


def is_torch_made(value: Any) -> bool:
    """Whether a Python function is torch's, or torchspan's stand-in for one of torch.

    >>> is_torch_made(torch.nn.functional.relu), is_torch_made(lambda x: x)
    (True, False)
    """
    code = value.__code__
    if code.co_filename == contextlib.__file__:  # a context manager: what it is made of counts
        return is_torch_made(value.__wrapped__)
    return is_torch_code(code) or is_own_code(code)


def identity_of(value: Any) -> list[str]:
    """What names an object that exists once in every process: a module, class, builtin or operator.

    >>> identity_of(torch.nn.functional), identity_of(len)
    (['module', 'torch.nn.functional'], ['builtin_function_or_method', 'builtins:len'])
    """
    kind = type(value).__qualname__
    if isinstance(value, ModuleType):
        return ["module", str(value.__name__)]
    is_text = kind.startswith("OpOverload") or kind.endswith(("UnionType", "GenericAlias"))
    return [kind, str(value) if is_text else name_of(value)]


def _length(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        return None if len(value) == expected else f"has length {len(value)}, expected {expected}"

    return check


def _keys(expected: Any) -> Check:
    wanted = decode(expected)

    def check(value: Any) -> str | None:
        return None if list(value) == wanted else f"has the keys {list(value)!r:.120}, expected {wanted!r:.120}"

    return check


def _contains(expected: Any) -> Check:
    key, wanted = decode(expected[0]), expected[1]

    def check(value: Any) -> str | None:
        return None if (key in value) is wanted else f"{'lacks' if wanted else 'has'} {key!r}"

    return check


def _own_attribute(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        return f"has an attribute {expected!r} of its own" if expected in vars(value) else None

    return check


def _has_attribute(expected: Any) -> Check:
    name, wanted = expected

    def check(value: Any) -> str | None:
        return None if hasattr(value, name) is wanted else f"{'lacks' if wanted else 'has'} the attribute {name!r}"

    return check


def _not_none(_: Any) -> Check:
    return lambda value: "is None" if value is None else None


def _file(expected: Any) -> Check:
    def check(value: Any) -> str | None:
        if hashlib.sha256(FilePath(value).read_bytes()).hexdigest() == expected:
            return None
        return f"({value}) is not the source that the artifact was made from"

    return check


CHECKS: Mapping[str, Callable[[Any], Check]] = {
    "tensor": _tensor,
    "constant": _constant,
    "type": _type,
    "function": _function,
    "named": _named,
    "length": _length,
    "keys": _keys,
    "contains": _contains,
    "own_attribute": _own_attribute,
    "has_attribute": _has_attribute,
    "not_none": _not_none,
    "file": _file,
    "torch_function": _torch_function,
}


# the ambient state: what a program may depend on without being given it


def ambient_state() -> dict[str, Any]:
    """What torch is set to here and now, as JSON; guards compare each entry.

    >>> ambient_state()["grad_mode"], ambient_state()["default_dtype"]
    (True, 'torch.float32')
    """
    return {
        "grad_mode": torch.is_grad_enabled(),
        "inference_mode": torch.is_inference_mode_enabled(),
        "autocast": _autocast_state(),
        "default_dtype": str(torch.get_default_dtype()),
        "deterministic": [torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()],
        "torch_function": torch._C._is_torch_function_enabled(),
        "torch_function_modes": _mode_stack(),
        "dispatch_modes": torch._C._len_torch_dispatch_stack(),
        "functorch": torch._C._functorch.peek_interpreter_stack() is not None,
        "global_module_hooks": sum(map(len, _global_hooks())),
    }


def _ambient_key() -> tuple[Any, ...]:
    """The same, as it is: quick to take and to compare, and equal only where `ambient_state` is equal."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch._C._is_torch_function_enabled(),
        torch._C._len_torch_function_stack(),
        torch._C._len_torch_dispatch_stack(),
        torch._C._functorch.peek_interpreter_stack(),
        *[len(hooks) for hooks in _global_hooks()],
    )


def _is_plain(key: tuple[Any, ...]) -> bool:
    """Whether a key says all: without autocast and without modes, of which `ambient_state` has more to say."""
    return not key[2] and key[7:10] == (0, 0, None)


def _global_hooks() -> list[Any]:
    module = torch.nn.modules.module
    return [getattr(module, name) for name in _GLOBAL_HOOKS if hasattr(module, name)]


_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
    "_global_parameter_registration_hooks",
)


def _autocast_state() -> dict[str, str]:
    kinds = ("cpu", "cuda")
    return {kind: str(torch.get_autocast_dtype(kind)) for kind in kinds if torch.is_autocast_enabled(kind)}


def _mode_stack() -> list[str]:
    """The modes of torch_function that are on, by name; that of a default device with the device."""
    modes = [torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack())]
    return [name_of(type(mode)) + (f" {mode.device}" if isinstance(mode, _device.DeviceContext) else "") for mode in modes]


# the walk


class _Place:
    """One object on the way: what is checked of it, as which input it is wanted, and what lies behind it."""

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
        wanted = {index: place.number for _, _, place in self._steps for index in place.inputs}
        self._wanted = [wanted[index] for index in range(len(wanted))]
        self._same = [(group[0], place) for group in groups for place in group[1:]]

    def _place(self, steps: Sequence[Sequence[Any]]) -> _Place:
        """The place that encoded `steps` lead to; what many lead through is decoded once."""
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
        """Raise Failed unless the guards that stand on `target` and on modules hold."""
        _walk(self._steps, {"target": target})

    def gather(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], dict[str, int]]:
        """The graph's inputs, in order, and the symbols of sizes that are dynamic.

        Raises:
            Failed: a guard does not hold; says which, what was expected and what was found.
        """
        found = self._find({"target": target, "args": args, "kwargs": kwargs})
        gathered = [found[number] for number in self._wanted]
        for one, other in self._same:
            if found[one.number] is not found[other.number]:
                raise Failed(f"{show_path(one.path)} and {show_path(other.path)} are one object no more")
        inputs, symbols = gathered[: self._num_inputs], dict(zip(self._sizes.names, gathered[self._num_inputs :]))
        self._refuse_aliases(inputs)
        failed = self._sizes.failed(symbols)
        if failed is not None:
            raise Failed(failed)
        return inputs, symbols

    def _find(self, root: Mapping[str, Any]) -> list[Any]:
        """The objects at all places, by number, all of whose guards hold, with torch as it has to be set."""
        key = _ambient_key()
        quick = self._quick.get(key)
        found = None if quick is None else quick.find(root)
        if found is not None:
            return found
        if quick is None:
            self._check_state()
        found = _walk(self._steps, root)
        if _is_plain(key):
            self._quick[key] = _Quick(self._steps, found)
        return found

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
    """What leads to each place behind `root`, those behind one beside each other; numbers them in this order, from 1."""
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
    found = [root]
    for above, step, place in steps:
        try:
            value = step(found[above])
        except (AttributeError, LookupError, TypeError) as cause:
            raise Failed(f"{show_path(place.path)} is not there ({type(cause).__name__}: {cause})") from None
        found.append(value)
        try:
            said = next((said for _, _, check in place.checks if (said := check(value)) is not None), None)
        except (AttributeError, LookupError, TypeError, ValueError, OSError) as cause:  # a check of what is of another kind
            said = f"is a {type(value).__qualname__} and was something else when the artifact was made ({cause})"
        if said is not None:
            raise Failed(f"{show_path(place.path)} {said}")
    return found


class _Quick:
    """What `_walk` does, once all has held: checks of one kind are one comparison of many objects, most of it in C.

    It holds for what is like what was `found`, which is narrower than the guards are: where it does not, `_walk` has the word.
    """

    def __init__(self, steps: Sequence[_Step], found: Sequence[Any]) -> None:
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
        self._types = list(map(type, self._typed(found)))
        self._forwards = [(kind, getattr(kind, "forward", None)) for kind in dict.fromkeys(self._types)]
        self._given, guards = _pick(tensors), torch._C._dynamo.guards
        self._fit = guards.TensorGuards(*self._given(found), dynamic_dims_sizes=None, dynamic_dims_strides=None).check

    def find(self, root: Any) -> list[Any] | None:
        """What `_walk` gives, or None where that has the word."""
        found = [root]
        try:
            for above, fetch, is_many in self._fetches:
                if is_many:
                    found += fetch(found[above])
                else:
                    found.append(fetch(found[above]))
            return found if self._holds(found) else None
        except (AttributeError, LookupError, TypeError):
            return None

    def _holds(self, found: list[Any]) -> bool:
        return (
            list(map(len, self._sized(found))) == self._lengths
            and list(map(type, self._typed(found))) == self._types
            and self._constant(found) == self._constants
            and not any(map(contains, map(vars, self._lack(found)), self._lacking))
            and all(getattr(kind, "forward", None) is forward for kind, forward in self._forwards)
            and self._fit(*self._given(found))
            and all(check(found[at]) is None for at, check in self._others)
        )


_AT_ONCE = ("length", "type", "constant", "own_attribute", "tensor")


def _is_at_once(kind: str, expected: Any) -> bool:
    if kind == "constant":
        return not _is_equal_to_others(decode(expected))
    return kind in _AT_ONCE and (kind != "tensor" or _is_static(expected))


def _is_static(expected: Mapping[str, Any]) -> bool:
    return None not in (*expected["shape"], *expected["stride"]) and expected["layout"] == "torch.strided"


def _pick(places: Iterable[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What takes the objects at `places` out of all that were found."""
    numbers = tuple(places)
    return itemgetter(*numbers) if len(numbers) > 1 else lambda found: tuple(found[at] for at in numbers)


def _fetches(steps: Sequence[_Step]) -> Iterator[tuple[int, Callable[[Any], Any], bool]]:
    """The `steps`, those that take several attributes, or items, of one object as one; whether it is several."""
    for (above, kind), group in groupby(steps, lambda step: (step[0], type(step[1]))):
        alike = list(group)
        if len(alike) > 1 and kind in (attrgetter, itemgetter):
            yield above, kind(*(place.path[-1][1] for _, _, place in alike)), True
        else:
            yield from ((above, step, False) for _, step, _ in alike)
