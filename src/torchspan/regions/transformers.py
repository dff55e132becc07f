"""What torchspan knows about Transformers: its caches of keys and values, and the results that it gathers from blocks.

A block finds its layer of a cache by a number (``layer_idx``), and dynamo guards on that number and on the whole cache: code
that was compiled for one block would serve no other. So a block is called through a stand-in that shares everything with it but
the number, and with a cache that holds its layer only, as if it were the first block. Transformers is not imported here: where
a program has not imported it, there is no such cache.
"""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

_INDEX = "layer_idx"
# the attributes of a cache that can be divided by layer; a cache with others is left alone
_KNOWN = {"layers", "layer_class_to_replicate", "offloading", "self_attention_cache", "cross_attention_cache", "is_updated"}
_CAPTURING = "transformers.utils.output_capturing"
_calls = threading.local()


def layer_index(block: torch.nn.Module) -> int | None:
    """The number by which `block` finds its layer of a cache; None if it has none, or several.

    >>> layer_index(torch.nn.Linear(1, 1))
    """
    indices = {vars(module).get(_INDEX) for module in block.modules()} - {None}
    index = next(iter(indices)) if len(indices) == 1 else None
    return index if type(index) is int else None


class OwnLayer:
    """One call of `block`, whose layer of a cache has the number `index`: the stand-in, and the arguments that it is given."""

    def __init__(self, block: torch.nn.Module, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.original = (block, args, kwargs)
        self._index = index
        self._caches: dict[int, tuple[Any, Any]] = {}
        self._twins: list[tuple[torch.nn.Module, torch.nn.Module]] = []
        self.block = self._twin(block)
        self.args = tuple(self._cache(value) for value in args)
        self.kwargs = {name: self._cache(value) for name, value in kwargs.items()}
        self._is_stale = False

    @contextmanager
    def running(self) -> Iterator[None]:
        """Calls of the stand-in inside the block are this call; afterwards the whole cache gets what its layer got."""
        before = getattr(_calls, "current", None)
        _calls.current = self
        try:
            yield
        finally:
            _calls.current = before
            if not self._is_stale:
                self._give_back()

    def undone(self) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        """The original call, to be run instead of the stand-in's."""
        self._is_stale = True
        return self.original

    def whole(self, outputs: Any) -> Any:
        """`outputs`, with the whole cache where the block returns the one that it was given."""
        if isinstance(outputs, tuple) and any(id(value) in self._owned for value in outputs):
            return tuple(self._owned.get(id(value), value) for value in outputs)
        return outputs

    @property
    def _owned(self) -> dict[int, Any]:
        return {id(own): cache for cache, own in self._caches.values()}

    def _twin(self, module: torch.nn.Module) -> torch.nn.Module:
        """A module that shares all with `module` but the number, which is 0; `module` itself if it holds no number."""
        inner = {name: child and self._twin(child) for name, child in module._modules.items()}
        state = vars(module)
        if _INDEX not in state and all(inner[name] is child for name, child in module._modules.items()):
            return module
        twin: torch.nn.Module = object.__new__(type(module))
        vars(twin).update(state, _modules=inner)
        if _INDEX in state:
            vars(twin)[_INDEX] = 0
        vars(twin).pop("_compiled_call_impl", None)
        self._twins.append((module, twin))
        return twin

    def _cache(self, value: Any) -> Any:
        if not may_be_divided(value):
            return value
        if id(value) not in self._caches:
            own = copy.copy(value)
            self._caches[id(value)] = value, own
            for name, attribute in vars(value).items():
                if name == "layers":
                    own.layers = attribute[self._index : self._index + 1]
                elif name == "is_updated":
                    own.is_updated = {0: attribute[self._index]} if self._index in attribute else {}
                else:
                    setattr(own, name, self._cache(attribute))
        return self._caches[id(value)][1]

    def _give_back(self) -> None:
        for cache, own in self._caches.values():
            if vars(own).get("layers"):
                _put(cache, self._index, own.layers[0])
            if vars(own).get("is_updated"):
                cache.is_updated[self._index] = own.is_updated[0]
        for module, twin in self._twins:
            state = vars(module)
            for name, value in vars(twin).items():
                if name not in (_INDEX, "_modules") and state.get(name) is not value:
                    state[name] = value


def own_layer(block: torch.nn.Module, index: int | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> OwnLayer | None:
    """The call of `block` with its own layer of the cache that it is given; None if it is given none."""
    if index is None or "transformers.cache_utils" not in sys.modules:
        return None
    if not any(may_be_divided(value) for value in (*args, *kwargs.values())):
        return None
    return OwnLayer(block, index, args, kwargs)


def as_called(target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
    """The original call, if `target` is the stand-in that this thread runs now; else the call as it is."""
    current: OwnLayer | None = getattr(_calls, "current", None)
    return current.undone() if current is not None and current.block is target else (target, args, kwargs)


def may_be_divided(value: Any) -> bool:
    """Whether `value` is a cache of Transformers whose every part by layer is known here."""
    cache_utils = sys.modules.get("transformers.cache_utils")
    if cache_utils is None or not isinstance(value, cache_utils.Cache) or not _KNOWN.issuperset(vars(value)):
        return False
    inner = [vars(value).get(name) for name in ("self_attention_cache", "cross_attention_cache")]
    return not vars(value).get("offloading") and all(may_be_divided(cache) for cache in inner if cache is not None)


def _put(cache: Any, index: int, layer: Any) -> None:
    """Put `layer` at its place in the cache, with empty layers before it, as the cache itself does."""
    while len(cache.layers) < index:
        cache.layers.append(cache.layer_class_to_replicate())
    cache.layers[index : index + 1] = [layer]


def is_gathering() -> bool:
    """Whether hooks in this call gather what blocks compute, in a list outside of the model.

    The compile of one block would depend on what other blocks have put into that list.
    """
    capturing = sys.modules.get(_CAPTURING)
    active = getattr(capturing, "_active_collector", None)
    return active is not None and bool(active.get())


def register(program: Any) -> None:
    """Register what Transformers can gather from the models in `program`: making a model does that, unpickling does not."""
    registry = getattr(sys.modules.get(_CAPTURING), "_CAN_RECORD_REGISTRY", None)
    owner = getattr(program, "__self__", program)
    if registry is None or not isinstance(owner, torch.nn.Module):
        return
    for module in owner.modules():
        if hasattr(module, "_can_record_outputs"):
            registry[module] = module._can_record_outputs
