"""Builds the graph of a file that `_recorded` wrote, and runs the pass that failed on it: no model, no data, no other ranks."""

from __future__ import annotations

import importlib
import re
import runpy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from torchspan.core.errors import InputError
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.core.report import Report
from torchspan.passes._base import PassContext
from torchspan.passes._values import SHORT
from torchspan.private import distributed, fx

_DTYPES = {short: dtype for dtype, short in SHORT.items()}
_VALUE = re.compile(r"(?P<dtype>\w+)\[(?P<sizes>.*?)\](?: stride \((?P<stride>.*?)\))?(?: on (?P<device>\S+))?$")
_NOTHING: Any = object()
_OF_SYMBOLS = {"Max": torch.sym_max, "Min": torch.sym_min, "Mod": lambda a, b: a % b, "PythonMod": lambda a, b: a % b}


def load_recording(path: Path) -> Recording:
    """The recording in a file; the file is code, and is run.

    Raises:
        InputError: there is no such file, or it records nothing.
    """
    if not path.is_file():
        raise InputError(f"no file {str(path)!r} to replay; expected one that a failing pass left")
    recording = runpy.run_path(str(path)).get("RECORDING")
    if not isinstance(recording, Recording):
        raise InputError(f"{str(path)!r} records no pass; expected a file that a failing pass left")
    return recording


class Builder:
    """Builds one graph, a call a node."""

    def __init__(self, value: Callable[[Any], Any]) -> None:
        self._value = value
        self.module = GraphModule(torch.nn.Module(), FxGraph())
        self._meta: dict[str, Any] = {}

    def meta(self, **meta: Any) -> None:
        """The metadata of the nodes that follow."""
        self._meta = meta

    def placeholder(self, name: str, target: str, gives: Any = _NOTHING, **more: Any) -> Node:
        """An input."""
        return self._node("placeholder", name, target, (), {}, gives, **more)

    def get_attr(self, name: str, target: str, gives: Any = _NOTHING, **more: Any) -> Node:
        """A tensor or submodule of the module."""
        return self._node("get_attr", name, target, (), {}, gives, **more)

    def call_module(self, name: str, target: str, *args: Any, gives: Any = _NOTHING, seq_nr: Any = None, **kwargs: Any) -> Node:
        """A call of a submodule."""
        return self._node("call_module", name, target, args, kwargs, gives, seq_nr)

    def call_method(self, name: str, target: str, *args: Any, gives: Any = _NOTHING, seq_nr: Any = None, **kwargs: Any) -> Node:
        """A call of a method."""
        return self._node("call_method", name, target, args, kwargs, gives, seq_nr)

    def call(
        self,
        name: str,
        target: str,
        *args: Any,
        gives: Any = _NOTHING,
        seq_nr: Any = None,
        finds_out: bool = False,
        **kwargs: Any,
    ) -> Node:
        """A call of an operator or function."""
        return self._node("call_function", name, _found(target), args, kwargs, gives, seq_nr, finds_out)

    def output(self, value: Any) -> None:
        """What the graph returns."""
        self.module.graph.output(value)
        self.module.recompile()

    def constant(self, name: str, gives: str, values: Any = None) -> None:
        """A tensor of the module; one whose values were not written is of zeros."""
        like = self._value(gives)
        tensor = torch.zeros(like.shape, dtype=like.dtype) if values is None else torch.tensor(values, dtype=like.dtype)
        self._hold(name, tensor)

    def opaque(self, name: str, kind: str) -> None:
        """A submodule that was not written: what a compiler gave."""
        self._hold(name, _Opaque(name, kind))

    @contextmanager
    def submodule(self, name: str) -> Iterator[Builder]:
        """A graph within this one."""
        inner = Builder(self._value)
        yield inner
        self._hold(name, inner.module)

    def _hold(self, name: str, value: Any) -> None:
        path, _, last = name.rpartition(".")
        owner: torch.nn.Module = self.module
        for part in filter(None, path.split(".")):
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = getattr(owner, part)
        setattr(owner, last, value)

    def _node(
        self,
        op: str,
        name: str,
        target: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        gives: Any,
        seq_nr: Any = None,
        finds_out: bool = False,
    ) -> Node:
        node = self.module.graph.create_node(op, target, args, kwargs, name)
        node.meta = dict(self._meta)
        if gives is not _NOTHING:
            node.meta["val"] = self._value(gives)
        if seq_nr is not None:
            node.meta["seq_nr"] = seq_nr
        if finds_out:
            node.meta["unbacked_bindings"] = {}
        return node


class Recording(Builder):
    """A pass as text, and the graph on which it failed, which the calls that follow build."""

    def __init__(
        self,
        written: str,
        *,
        error: str,
        torch: str,
        strict: bool,
        kind: Any,
        notes: Sequence[str],
        rank: int,
        groups: dict[str, list[int]],
        report: Sequence[str],
    ) -> None:
        super().__init__(self.value)

        self.written, self.error, self.torch, self.report = written, error, torch, tuple(report)
        self._strict, self._kind, self._notes, self._rank, self._groups = strict, kind, tuple(notes), rank, groups
        self._mode = fx.fake_mode()
        self._symbols: dict[str, Any] = {}
        self._inputs: list[InputSpec] = []
        self._outputs: list[OutputSpec] = []

    def placeholder(self, name: str, target: str, gives: Any = _NOTHING, **more: Any) -> Node:
        """An input, and what it stands for."""
        self._inputs.append(InputSpec(more.pop("kind"), more.pop("stands_for")))
        return super().placeholder(name, target, gives, **more)

    def symbol(self, name: str, least: int | None = None, most: int | None = None) -> Any:
        """A size that is known at run time only."""
        symbol = self._mode.shape_env.create_unbacked_symint()
        if least is not None:
            torch._check(symbol >= least)
        if most is not None:
            torch._check(symbol <= most)
        self._symbols[name] = symbol
        return symbol

    def returns(self, outputs: Sequence[tuple[Any, str, Any]]) -> None:
        """What the graph returns, and what each stands for."""
        self._outputs = [OutputSpec(kind, name) for kind, name, _ in outputs]
        self.output([value for _, _, value in outputs])

    def value(self, written: Any) -> Any:
        """The example value that a text stands for."""
        if isinstance(written, (tuple, list)):
            return [self.value(part) for part in written]
        if not isinstance(written, str):
            return written
        if written.startswith("size "):
            return self._size(written.removeprefix("size "))
        match = _VALUE.match(written)
        if match is None:
            return written
        sizes, stride = self._sizes(match["sizes"]), self._sizes(match["stride"])
        dtype = _DTYPES.get(match["dtype"]) or getattr(torch, match["dtype"])
        with self._mode:
            device = match["device"] or "cpu"
            if match["stride"] is None:
                return torch.empty(sizes, dtype=dtype, device=device)
            return torch.empty_strided(sizes, stride, dtype=dtype, device=device)

    def _sizes(self, text: str | None) -> list[Any]:
        return list(eval(f"[{text}]", {**_OF_SYMBOLS, **self._symbols})) if text else []

    def _size(self, text: str) -> Any:
        return eval(text, {**_OF_SYMBOLS, **self._symbols})

    @property
    def graph(self) -> Graph:
        """The graph."""
        return Graph(self.module, tuple(self._inputs), tuple(self._outputs), self._kind, self._notes)

    def replay(self) -> Graph:
        """Run the pass on the graph, between the same checks; what it raises is what was raised where it failed."""
        from torchspan.passes._pipeline import Pipeline

        started = bool(self._groups) and not dist.is_initialized()
        if started:
            distributed.start_fake_groups(self._rank, self._groups)
        try:
            return Pipeline.parse(self.written).run(self.graph, PassContext(Report(), strict=self._strict))
        finally:
            if started:
                dist.destroy_process_group()


class _Opaque(torch.nn.Module):
    """Stands for a submodule that cannot be written as text."""

    def __init__(self, name: str, kind: str) -> None:
        super().__init__()
        self._refusal = f"{name} was a {kind}, of which a recorded graph has the call alone; it cannot be run"

    def forward(self, *_: Any) -> Any:
        """It cannot be called."""
        raise InputError(self._refusal)


def _found(target: str) -> Any:
    """What a written target names."""
    if ":" in target:
        module, _, name = target.partition(":")
        return attrgetter(name)(importlib.import_module(module))
    try:
        return attrgetter(target)(torch.ops)
    except AttributeError:
        raise InputError(
            f"torch {torch.__version__} has no operator {target!r} here; import the module that registers it at the top "
            "of the file, or use the torch that the file names"
        ) from None
