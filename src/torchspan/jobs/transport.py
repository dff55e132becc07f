"""Sends a program to another process without its weights: tensors travel as descriptions, and arrive as zeros.

Aliasing is kept: tensors that share a storage (tied weights, views) share one on the other side. What a program may index
with or divide by (small integer tensors, small buffers) travels by value; parameters never do. Code of ``__main__`` and of
modules that the other process could not import travels by value, so that a script is never run again. A process group travels
by its name, see :mod:`.groups`. Objects of some classes travel apart, so that the rest is the same bytes whatever they hold.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import io
import os
import pickle
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import torch
from torch.nn.utils import parametrize

from torchspan.core.errors import InputError
from torchspan.core.memory import blank_storage
from torchspan.jobs.groups import Groups, is_group, reduced_group, why_it_stays
from torchspan.private import fx, inductor

VALUE_BYTES = {True: 64 * 1024, False: 4 * 1024 * 1024}  # is floating point → up to which size a tensor travels by value
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_STATE_HOOKS = ("_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks")


def _code_of_file(make: Callable[..., types.CodeType], arguments: tuple[Any, ...], file: str) -> types.CodeType:
    return make(*arguments).replace(co_filename=file)


class _Pickler(cloudpickle.Pickler):
    def __init__(
        self,
        file: io.BytesIO,
        keep_values: bool,
        has_module: Callable[[types.ModuleType], bool],
        apart: tuple[type, ...],
    ) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._apart = apart
        self.parts: list[bytes] = []
        self._has_module = has_module
        self._keep_values = keep_values
        self.storages: dict[int, tuple[int, str, bytes | None]] = {}
        self.by_value: list[types.ModuleType] = []
        self._alive: list[object] = []  # what is known by its address must not be freed meanwhile
        self._addresses: dict[int, int] = {}
        self._numbers: dict[int, int] = {}
        self._importable: dict[str, bool] = {}

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) in self._apart:
            self.parts.append(pickle.dumps(obj))
            return "apart", len(self.parts) - 1
        if type(obj) not in _PLAIN or obj.layout is not torch.strided or obj.is_quantized:
            return None
        is_parameter = type(obj) is torch.nn.Parameter
        key = None if obj.device.type == "meta" else self._storage(obj, is_parameter)
        self._alive.append(obj)
        number = self._numbers.setdefault(id(obj), len(self._numbers))
        layout = (obj.dtype, str(obj.device), tuple(obj.shape), obj.stride(), obj.storage_offset())
        return "tensor", number, key, layout, obj.requires_grad, is_parameter

    def reducer_override(self, obj: Any) -> Any:
        if is_group(obj):
            return reduced_group(obj)
        if isinstance(obj, torch._ops.OpOverload):
            namespace, _, name = obj._schema.name.partition("::")
            return _operator, (namespace, name, obj._overloadname)
        if isinstance(obj, torch._ops.HigherOrderOperator):
            return _higher_order_operator, (obj.name(),)
        if isinstance(obj, torch.nn.Module):
            return _reduced_module(obj)
        if isinstance(obj, types.CodeType):  # cloudpickle 3.1.3 leaves out the file, by which a failure's place is told
            make, arguments = self.dispatch_table[types.CodeType](obj)
            return _code_of_file, (make, arguments, obj.co_filename)
        if isinstance(obj, (type, types.FunctionType)):
            self._note_module(getattr(obj, "__module__", None))
        if isinstance(obj, type) and _is_renamed(obj):
            return getattr, (sys.modules[obj.__module__], obj.__name__)
        if isinstance(obj, types.FunctionType):
            self.globals_ref.setdefault(id(obj.__globals__), _Globals(obj.__globals__))
        reduced = super().reducer_override(obj)
        if isinstance(obj, types.FunctionType) and isinstance(reduced, tuple) and len(reduced) == 6 and self._is_there(obj):
            reduced[2][1]["__globals__"] = {}  # the other process imports them: a copy of what they hold may not be possible
        if isinstance(obj, type) and isinstance(reduced, tuple) and len(reduced) == 6:
            reduced[2][0].setdefault("__qualname__", obj.__qualname__)  # which cloudpickle leaves out of a class by value
            if issubclass(obj, torch.nn.Module):
                return (_module_class, (reduced[0], *reduced[1]), *reduced[2:])
        return reduced

    def _storage(self, tensor: torch.Tensor, is_parameter: bool) -> int:
        storage = tensor.untyped_storage()
        key = self._addresses.setdefault(storage._cdata, len(self._addresses))
        if key not in self.storages:
            self._alive.append(storage)
            small = not is_parameter and storage.nbytes() <= VALUE_BYTES[tensor.is_floating_point() or tensor.is_complex()]
            content = _content(tensor) if small or self._keep_values else None
            self.storages[key] = (storage.nbytes(), str(tensor.device), content)
        return key

    def _is_there(self, function: types.FunctionType) -> bool:
        """Whether the globals of a function that is sent by value are a module's that the other process can import."""
        name = str(function.__globals__.get("__name__"))
        module = sys.modules.get(name)
        if module is None or name == "__main__" or vars(module) is not function.__globals__:
            return False
        return self._importable.setdefault(name, module not in self.by_value and self._has_module(module))

    def _note_module(self, name: str | None) -> None:
        module = sys.modules.get(name or "")
        if module is None or name == "__main__" or module in self.by_value or self._has_module(module):
            return
        cloudpickle.register_pickle_by_value(module)
        self.by_value.append(module)


def _module_class(make: Callable[..., type], *arguments: Any) -> type:
    """Make a class that was sent by value, also where a base refuses subclasses that are made from name and bases alone."""
    try:
        return make(*arguments)
    except Exception:  # noqa: BLE001 - of an __init_subclass__ or a metaclass of the program's own
        _, name, bases, names, tracked, _ = arguments
        cls = type(name, (torch.nn.Module,), dict(names))
        cls.__bases__ = bases
        registered: type = cloudpickle.cloudpickle._lookup_class_or_track(tracked, cls)
        return registered


def _reduced_module(module: torch.nn.Module) -> Any:
    """What pickle is to write for a module; NotImplemented: what it writes by itself. Raises InputError for DDP and FSDP."""
    why_not = why_it_stays(module)
    if why_not is not None:
        raise InputError(f"{type(module).__name__} {why_not}")
    if _is_parametrized(module):
        names = tuple(vars(module)["_modules"]["parametrizations"])
        return _parametrized, (parametrize.type_before_parametrizations(module), names), vars(module)
    return _without_state_hooks(module) if any(vars(module).get(name) for name in _STATE_HOOKS) else NotImplemented


def _is_parametrized(module: torch.nn.Module) -> bool:
    """Whether torch has made a subclass for this module alone, to parametrize it; such a class refuses to be pickled."""
    return "__getstate__" in vars(type(module)) and parametrize.is_parametrized(module)


def _without_state_hooks(module: torch.nn.Module) -> Any:
    """What pickle is to write for it without the hooks on its state_dict, which no call runs; FSDP's cannot be sent."""
    reduced = module.__reduce_ex__(pickle.HIGHEST_PROTOCOL)
    state = reduced[2] if isinstance(reduced, tuple) and len(reduced) > 2 else None
    if not isinstance(state, dict):  # of a __reduce__ or __getstate__ of its own
        return reduced
    empty = {name: type(state[name])() for name in _STATE_HOOKS if name in state}
    return (*reduced[:2], {**state, **empty}, *reduced[3:])


def _parametrized(own: type[torch.nn.Module], names: tuple[str, ...]) -> torch.nn.Module:
    """A module without state of the class that torch makes of `own` where these of its tensors are parametrized."""
    module = own.__new__(own)
    fx._inject_new_class(module)
    for name in names:
        fx._inject_property(module, name)
    return module


def _is_renamed(cls: type) -> bool:
    """Whether a class's module has it by its short name only, as torch has SDPBackend: pickle looks for the full name."""
    return cls.__name__ != cls.__qualname__ and getattr(sys.modules.get(cls.__module__), cls.__name__, None) is cls


class _Globals:
    """The globals of functions that are sent by value: on the other side those of a module, where dynamo's guards look."""

    def __init__(self, names: dict[str, Any]) -> None:
        self._identity = {key: names[key] for key in ("__name__", "__file__", "__package__") if key in names}

    def __reduce__(self) -> Any:
        return _module_globals, (self._identity,)


def _module_globals(identity: dict[str, Any]) -> dict[str, Any]:
    name = identity.get("__name__") or "__main__"
    module = sys.modules.get(name) or _imported(name)
    if module is None or vars(module).get("__file__") != identity.get("__file__"):
        module = sys.modules[name] = types.ModuleType(name)
        vars(module).update(identity)
        if name == "__main__":
            sys.modules["__mp_main__"] = module  # multiprocessing's name for it
    return vars(module)


def _imported(name: str) -> types.ModuleType | None:
    """The module of that name, if it can be imported: others of its functions may be sent by reference."""
    if name == "__main__":
        return None
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: Content) -> None:
        super().__init__(io.BytesIO(content.value))
        self._described = content.storages
        self._parts = content.parts
        self._built: dict[int, torch.UntypedStorage] = {}
        self._tensors: dict[int, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> Any:
        if pid[0] == "apart":
            return pickle.loads(self._parts[pid[1]])
        _, number, key, layout, requires_grad, is_parameter = pid
        if number not in self._tensors:
            tensor = self._tensor(key, *layout)
            if is_parameter:
                tensor = torch.nn.Parameter(tensor, requires_grad=requires_grad)
            self._tensors[number] = tensor.requires_grad_(requires_grad)
        return self._tensors[number]

    def _tensor(
        self, key: int | None, dtype: torch.dtype, device: str, shape: tuple[int, ...], stride: tuple[int, ...], offset: int
    ) -> torch.Tensor:
        if key is None:
            return torch.empty_strided(shape, stride, dtype=dtype, device="meta")
        return torch.empty(0, dtype=dtype, device=device).set_(self._storage(key), offset, shape, stride)

    def _storage(self, key: int) -> torch.UntypedStorage:
        if key not in self._built:
            num_bytes, device, content = self._described[key]
            if content:
                self._built[key] = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(device).untyped_storage()
            elif device == "cpu":
                self._built[key] = blank_storage(num_bytes)
            else:
                self._built[key] = torch.zeros(num_bytes, dtype=torch.uint8, device=device).untyped_storage()
        return self._built[key]


@dataclass(frozen=True)
class Content:
    """What is sent: the pickled `value`, the `storages` of its tensors (bytes, device, content), what travels apart, groups."""

    storages: dict[int, tuple[int, str, bytes | None]]
    value: bytes
    parts: list[bytes]
    groups: Groups | None


def dumps(
    value: object,
    *,
    keep_values: bool = False,
    is_for_elsewhere: bool = False,
    groups: Groups | None = None,
    apart: tuple[type, ...] = (),
) -> bytes:
    """`value` as bytes, tensors described; with `keep_values` every tensor travels whole.

    With `is_for_elsewhere` the other process has installed packages only, not what lies beside the program. `groups` are the
    process groups that it is to have, see `groups_of`. Objects of the classes `apart` are pickled by themselves.

    Raises InputError, naming the cause, for what cannot be sent.
    """
    file = io.BytesIO()
    pickler = _Pickler(file, keep_values, _is_installed if is_for_elsewhere else is_importable, apart)
    with _by_value(pickler.by_value), torch.no_grad():
        try:
            pickler.dump(value)
        except Exception as cause:  # whatever a user's own __reduce__ or __getstate__ raises
            raise InputError(f"the program cannot be sent to the compile process: {cause or type(cause).__name__}") from cause
    return pickle.dumps((pickler.storages, file.getvalue(), pickler.parts, groups))


def opened(content: bytes) -> Content:
    """The parts of what :func:`dumps` gave; none of the program's own classes is loaded."""
    return Content(*pickle.loads(content))


def loads(content: bytes) -> Any:
    """What :func:`dumps` was given, with zeros where weights were."""
    with torch.no_grad():
        return _Unpickler(opened(content)).load()


def groups_of(content: bytes) -> Groups | None:
    """The process groups of the rank that sent this, where it was one of several."""
    return opened(content).groups


def is_importable(module: types.ModuleType) -> bool:
    """Whether another process with the same ``sys.path`` would import this very module by its name."""
    file = getattr(module, "__file__", None)
    if file is None:  # built in, frozen, a namespace, or made by a backport: nothing better than its name is known
        return getattr(module, "__spec__", None) is not None
    path: Any = None
    spec = None
    name = ""
    for part in module.__name__.split("."):
        name = f"{name}.{part}" if name else part
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return spec is not None and spec.origin is not None and os.path.realpath(spec.origin) == os.path.realpath(file)


def _is_installed(module: types.ModuleType) -> bool:
    """Whether this very module is of Python's library, of a package that is installed, or ours."""
    if not is_importable(module):
        return False
    file = getattr(module, "__file__", None)
    if file is None:
        return True
    installed = [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    roots = [*installed, os.path.dirname(torch.__file__), str(Path(__file__).parents[1])]
    return any(Path(os.path.realpath(file)).is_relative_to(os.path.realpath(root)) for root in roots)


@contextmanager
def _by_value(modules: list[types.ModuleType]) -> Iterator[None]:
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def _content(tensor: torch.Tensor) -> bytes:
    whole = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    whole.set_(tensor.detach().untyped_storage())
    return whole.cpu().numpy().tobytes()


_OWN_OPERATORS = ("torchspan.models._grouped", "torchspan.parallel._all_to_all")


def _operator(namespace: str, name: str, overload: str) -> Any:
    if not hasattr(getattr(torch.ops, namespace), name):
        _define(namespace)
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _define(namespace: str) -> None:
    """Import what makes the operators of a namespace: torch has them only after that."""
    if namespace == "prims":
        inductor.define_prims()
    elif namespace == "torchspan":
        for module in _OWN_OPERATORS:
            importlib.import_module(module)


def _higher_order_operator(name: str) -> Any:
    return getattr(torch.ops.higher_order, name)
