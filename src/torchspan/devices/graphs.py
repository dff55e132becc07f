"""CUDA graphs: what is captured is written down operation by operation; a replay computes it again into the same tensors."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from torchspan.devices._memories import NO_STORAGE
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Redefinition, Replacement

WHAT = "operations are written down at the first run and computed again at each replay"

_capturing: list[Graph] = []


class Graph:
    """A stand-in for ``torch.cuda.CUDAGraph``, which it says it is an instance of."""

    def __init__(self, keep_graph: bool = False) -> None:
        self._recorder: _Recorder | None = None
        self._hooks: defaultdict[str, OrderedDict[int, Callable[[Graph], object]]] = defaultdict(OrderedDict)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.cuda.CUDAGraph

    def capture_begin(self, pool: object = None, capture_error_mode: str = "global") -> None:
        """Start writing down."""
        self._run_hooks("capture_start")
        self._recorder = _Recorder()
        self._recorder.begin()
        _capturing.append(self)

    def capture_end(self) -> None:
        """Stop, and undo what the captured operations changed: a capture has no results."""
        if self._recorder is None or self not in _capturing:
            raise RuntimeError("capture_end() was called without capture_begin()")
        _capturing.remove(self)
        self._recorder.end()
        self._run_hooks("capture_end")
        self._run_hooks("post_instantiate")

    def replay(self) -> None:
        """Compute what was captured, from what the captured tensors hold now, into the captured tensors.

        Raises:
            RuntimeError: nothing was captured.
        """
        if self._recorder is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        self._run_hooks("replay_start")
        self._recorder.replay()
        self._run_hooks("replay_end")

    def reset(self) -> None:
        """Forget what was captured."""
        self._recorder = None

    def pool(self) -> tuple[int, int]:
        """A token; memory is not pooled."""
        return (0, id(self))

    def instantiate(self) -> None:
        """Nothing to do."""

    def enable_debug_mode(self) -> None:
        """Nothing to do."""

    def register_generator_state(self, generator: object) -> None:
        """Nothing to do: a replay draws from the generators that there are."""

    def register_capture_start_hook(self, hook: Callable[[Graph], object]) -> RemovableHandle:
        """Run `hook` with this graph before a capture; its handle removes it."""
        return self._register("capture_start", hook)

    def register_capture_end_hook(self, hook: Callable[[Graph], object]) -> RemovableHandle:
        """Run `hook` with this graph after a capture."""
        return self._register("capture_end", hook)

    def register_post_instantiate_hook(self, hook: Callable[[Graph], object]) -> RemovableHandle:
        """Run `hook` with this graph when it can be replayed: after a capture."""
        return self._register("post_instantiate", hook)

    def register_replay_start_hook(self, hook: Callable[[Graph], object]) -> RemovableHandle:
        """Run `hook` with this graph before each replay."""
        return self._register("replay_start", hook)

    def register_replay_end_hook(self, hook: Callable[[Graph], object]) -> RemovableHandle:
        """Run `hook` with this graph after each replay."""
        return self._register("replay_end", hook)

    def _register(self, moment: str, hook: Callable[[Graph], object]) -> RemovableHandle:
        handle = RemovableHandle(self._hooks[moment])
        self._hooks[moment][handle.id] = hook
        return handle

    def _run_hooks(self, moment: str) -> None:
        for hook in list(self._hooks[moment].values()):
            hook(self)


class AcceleratorGraph(Graph):
    """A stand-in for ``torch.accelerator.Graph``, which captures inside a block of its own."""

    def __init__(self, keep_graph: bool = False, *, pool: Any = None, capture_error_mode: str = "default") -> None:
        super().__init__(keep_graph)
        self.graph_pool = pool
        self.capture_error_mode = capture_error_mode

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.accelerator.Graph

    def __enter__(self) -> None:
        self.capture_begin()

    def __exit__(self, *exc_info: object) -> None:
        self.capture_end()

    def debug_dump(self, debug_path: str) -> None:
        """Write the captured operations as text."""
        with open(debug_path, "w") as file:
            file.writelines(f"{call[0]}\n" for call in (self._recorder.calls if self._recorder else ()))


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[torch.Tensor]]] = []
        self._before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._new_memories: set[int] = set()
        self._random = torch.get_rng_state()

    def begin(self) -> None:
        self._random = torch.get_rng_state()
        self.__enter__()

    def end(self) -> None:
        self.__exit__(None, None, None)
        torch.set_rng_state(self._random)
        with torch.no_grad():
            for tensor, value in self._before.values():
                if tensor.untyped_storage().nbytes() == value.nbytes:  # what the program has freed since stays freed
                    tensor.copy_(value)
        self._before.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(_is_traced(tensor) for value in args for tensor in _tensors(value)):
            return func(*args, **kwargs)  # of a trace that runs inside: there is nothing to compute again
        for tensor in _written(func, args, kwargs):
            key = tensor.untyped_storage()._cdata
            if key not in self._new_memories and key not in self._before:
                whole = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[key] = (whole, whole.clone())
        out = func(*args, **kwargs)
        fresh = [] if _is_aliasing(func) else _tensors(out)
        self._new_memories.update(tensor.untyped_storage()._cdata for tensor in fresh)
        if fresh or any(True for _ in _written(func, args, kwargs)):
            self.calls.append((func, args, kwargs, fresh))
        return out

    def replay(self) -> None:
        with torch.no_grad():
            for func, args, kwargs, results in self.calls:
                for old, new in zip(results, _tensors(func(*args, **kwargs))):
                    if results:
                        old.copy_(new)


def _is_aliasing(func: Any) -> bool:
    """Whether what `func` gives back is its argument, changed or seen otherwise."""
    return any(result.alias_info is not None for result in func._schema.returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterable[torch.Tensor]:
    """The tensors among the arguments that `func` writes to."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from _tensors(value)


def _is_traced(tensor: torch.Tensor) -> bool:
    """Whether it has no numbers, as in a trace: such a tensor may say that it is on another device, its storage does not."""
    try:
        return tensor.untyped_storage().device.type == "meta"
    except NO_STORAGE:
        return False


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [item for item in value if isinstance(item, torch.Tensor)] if isinstance(value, (list, tuple)) else []


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The graph, its context manager, and the functions around them."""
    yield Replacement("graphs", "torch.cuda.graphs", "CUDAGraph.__new__", partial(_new_graph, redirection, Graph))
    if redirection.target == "cpu":
        yield Replacement(
            "graphs", "torch.accelerator.graphs", "Graph.__new__", partial(_new_graph, redirection, AcceleratorGraph)
        )
    context = {"__init__": _context_init, "__enter__": _context_enter, "__exit__": _context_exit}
    for name, function in context.items():
        yield Replacement("graphs", "torch.cuda.graphs", f"graph.{name}", partial(_given, function))
    yield from stand_ins("graphs", "torch.cuda.graphs", _functions(redirection))
    capturable = partial(_capturable, redirection)
    yield Redefinition("graphs", "torch.optim.optimizer", "_get_capturable_supported_devices", capturable)


def _capturable(redirection: Redirection, old: Any) -> Any:
    """Optimizers with ``capturable=True`` step on the target too, where a graph's replay steps again."""

    def devices(supports_xla: bool = True) -> list[str]:
        return [*old(supports_xla), redirection.target]

    return devices


def _given(function: Any, old: object) -> Any:
    return function


def _new_graph(redirection: Redirection, kind: type[Graph], old: object) -> staticmethod[..., Graph]:
    def new(cls: type, *args: Any, **kwargs: Any) -> Graph:
        redirection.simulate("torch.cuda.CUDAGraph()" if kind is Graph else "torch.accelerator.Graph()", WHAT)
        return kind(*args, **kwargs)

    return staticmethod(new)


def _context_init(self: Any, cuda_graph: Any, pool: Any = None, stream: Any = None, *_: Any, **__: Any) -> None:
    self.cuda_graph = cuda_graph
    self.stream_ctx = torch.cuda.stream(torch.cuda.Stream() if stream is None else stream)


def _context_enter(self: Any) -> None:
    self.stream_ctx.__enter__()
    self.cuda_graph.capture_begin()


def _context_exit(self: Any, *exc_info: object) -> None:
    self.cuda_graph.capture_end()
    self.stream_ctx.__exit__(*exc_info)


def _functions(redirection: Redirection) -> dict[str, Function]:
    def make_graphed_callables(
        callables: Callable[..., Any] | tuple[Callable[..., Any], ...], sample_args: Any, *_: Any, **__: Any
    ) -> Any:
        redirection.simulate("torch.cuda.make_graphed_callables()", "the callables themselves are given back")
        return callables

    def graph_pool_handle() -> tuple[int, int]:
        return (0, 1)

    def is_current_stream_capturing() -> bool:
        return bool(_capturing)

    return {
        "make_graphed_callables": make_graphed_callables,
        "graph_pool_handle": graph_pool_handle,
        "is_current_stream_capturing": is_current_stream_capturing,
    }
