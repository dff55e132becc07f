"""Where compiled code has no usable backward, the graph runs again eagerly, and its gradients are eager's.

AOTAutograd's backward can neither be differentiated (``create_graph=True``: a gradient penalty, a Hessian) nor batched by vmap
(``is_grads_batched=True``), and its kernels may fail. Each of these shows only when autograd reaches the backward, long after
the forward. So the entry point of the autograd node that holds the backward is replaced: where the compiled backward cannot be
used, the graph runs again on the inputs of its forward, from the random state of the forward.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from torchspan.core.numerics import tensors
from torchspan.private import aot
from torchspan.regions import caching
from torchspan.regions.ambient import autocast_state

_NODE = "CompiledFunctionBackward"  # AOTAutograd's, in torch 2.8 to 2.15
_MAX_VIEWS = 8  # between an output and what computed it
TWICE = "its gradients are differentiated again (create_graph=True), which compiled code cannot be"
BATCHED = "its gradients are batched (is_grads_batched=True, vmap), which compiled code cannot be"

GiveUp = Callable[[str], None]

_MAX_UNDONE_BYTES = 1 << 20  # of an argument that a call without gradients puts back where its graph raises


def saves_are_hooked() -> bool:
    """Whether saved tensors pass through hooks, as in activation checkpointing: then arguments must not be kept here."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def is_in_backward() -> bool:
    """Whether autograd runs a backward in this thread: activation checkpointing ends its recomputation there by raising."""
    return torch._C._current_graph_task_id() != -1


@dataclass(slots=True)
class _Forward:
    """What it takes to run the graph again: its arguments, the old values of those that it changed, random state, autocast."""

    args: tuple[Any, ...]
    random: tuple[Tensor, list[Tensor]] | None
    before: Mapping[int, Tensor]
    autocast: tuple[tuple[str, torch.dtype, bool], ...]
    unkept: Mapping[int, int]  # of the first call: the versions of the tensors whose old values are not in `before`
    versions: int = 0


class EagerBackward:
    """Runs `compiled`, the code of `graph`; where its backward cannot be used, eager's takes its place.

    If `compiled` raises in the forward, the random numbers that it drew and the arguments that it wrote into are restored, so
    that eager can start over. `give_up` is called with the reason when the compiled code is not to be used any longer.
    """

    def __init__(self, graph: Callable[..., Any], compiled: Callable[..., Any], give_up: GiveUp) -> None:
        self._graph = graph
        self._compiled = compiled
        self._give_up = give_up
        self._changed: tuple[int, ...] | None = None  # which arguments the graph writes into; None before its first call
        self._is_random = True

    def __call__(self, *args: Any) -> Any:
        has_backward = torch.is_grad_enabled() and not saves_are_hooked()
        if not has_backward and self._changed == () and not self._is_random:
            return self._compiled(*args)
        forward = self._remembered(args, has_backward)
        first = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
        try:
            outputs = self._compiled(*args)
        except Exception:
            if not is_in_backward():
                _undo(forward)
            raise
        lost = _written(forward) if forward.unkept else ()
        if self._changed is None:
            self._learn(forward, lost)
        if not has_backward or lost:
            return outputs
        forward.versions = _versions(args)
        sources = [(output, _node_of(output, first)) for output in _outputs(outputs)]
        nodes = {id(node): node for _, node in sources if node is not None}
        if len(nodes) == 1:
            _Backward(self, forward, nodes.popitem()[1], sources)
        return outputs

    def _remembered(self, args: tuple[Any, ...], has_backward: bool) -> _Forward:
        if self._changed == () and not self._is_random:
            return _Forward(args, None, {}, autocast_state(), {})
        if self._changed is None:
            before = _copies(args, [i for i, arg in enumerate(args) if _may_be_written(arg)])
            unkept = {i: _version(arg) for i, arg in enumerate(args) if i not in before}
        else:
            # without a backward they are only put back where the graph raises: not worth the memory of a cache
            indices = [i for i in self._changed if has_backward or args[i].nbytes <= _MAX_UNDONE_BYTES]
            before, unkept = _copies(args, [i for i in indices if not _is_placeholder(args[i])]), {}
        return _Forward(args, _random_state() if self._is_random else None, before, autocast_state(), unkept)

    def _learn(self, forward: _Forward, lost: tuple[int, ...]) -> None:
        """Note whether the graph draws random numbers, and which arguments it writes into: the same in all its calls.

        Parameters, which may be large, tell by their versions: `lost` are those that were written.
        """
        assert forward.random is not None
        drawn = not all(map(torch.equal, _flat(forward.random), _flat(_random_state())))
        self._is_random = drawn
        with torch.no_grad():
            changed = tuple(i for i, value in forward.before.items() if not torch.equal(value, forward.args[i]))
        self._changed = (*changed, *lost)
        forward.before = {i: forward.before[i] for i in changed}
        forward.random = forward.random if drawn else None

    def gradients(
        self, forward: _Forward, sources: list[Tensor], output_gradients: Mapping[int, Tensor]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `sources`, from those of the graph's outputs by number; they can be differentiated again."""
        is_kept = torch.is_grad_enabled()
        args = list(forward.args)
        with torch.enable_grad(), aot.outside_vmap(), _as_it_was(forward):
            for i, value in forward.before.items():
                args[i] = _AsItWas.apply(args[i], value)
            outputs = _outputs(self._graph(*args))
        chosen = [i for i in output_gradients if outputs[i].requires_grad]
        return torch.autograd.grad(
            [outputs[i] for i in chosen],
            sources,
            [output_gradients[i] for i in chosen],
            create_graph=is_kept,
            allow_unused=True,
        )

    def end(self, why: str) -> None:
        """Report that the compiled code is not to be used any longer."""
        self._give_up(why)


class _AsItWas(torch.autograd.Function):
    """A tensor with the value that it had before it was written; its gradients are those of the tensor."""

    @staticmethod
    def forward(ctx: Any, now: Tensor, before: Tensor) -> Tensor:
        return before.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Backward:
    """The new entry point of one call's backward."""

    __slots__ = ("_direct", "_forward", "_node", "_owner", "_through_views")

    def __init__(self, owner: EagerBackward, forward: _Forward, node: Any, outputs: Sequence[tuple[Tensor, Any]]) -> None:
        self._owner = owner
        self._forward: _Forward | None = forward
        self._node = weakref.ref(node)  # which holds this
        self._direct: dict[int, int] = {}  # the number of an output of the graph → that of the node's
        self._through_views: dict[int, Tensor] = {}
        for number, (output, source) in enumerate(outputs):
            if source is node and output.grad_fn is node:
                self._direct[number] = output.output_nr
            elif source is node:
                output.grad_fn.register_prehook(  # type: ignore[union-attr]
                    partial(self._note, number, output.output_nr)
                )
        node.apply = self._apply
        if hasattr(type(node), "apply_boxed"):  # torch 2.13 and later call this one
            node.apply_boxed = self._apply_boxed

    def _note(self, number: int, output_nr: int, gradients: Sequence[Tensor | None]) -> None:
        gradient = gradients[output_nr]
        if gradient is not None:
            self._through_views[number] = gradient

    def _apply(self, *gradients: Any) -> Any:
        return self._run("apply", gradients, list(gradients))

    def _apply_boxed(self, gradients: list[Any]) -> Any:
        return self._run("apply_boxed", (gradients,), gradients.copy())  # which compiled code empties

    def _run(self, name: str, gradients: tuple[Any, ...], output_gradients: list[Tensor | None]) -> Any:
        node = self._node()
        is_kept = torch._C._autograd._get_current_graph_task_keep_graph()
        try:
            why_not = self._why_not(output_gradients)
            if why_not is not None:
                instead = self._eagerly(node, output_gradients)
                if instead is not None:
                    self._owner.end(why_not)
                    return instead
            if is_kept:
                caching.note_kept_buffers(node)
            return self._compiled(node, name, gradients, output_gradients)
        finally:
            self._through_views.clear()
            if not is_kept:
                self._forward = None  # as autograd frees what it saved

    def _compiled(self, node: Any, name: str, gradients: tuple[Any, ...], output_gradients: list[Tensor | None]) -> Any:
        try:
            return getattr(type(node), name)(node, *gradients)
        except Exception as error:
            instead = self._eagerly(node, output_gradients) if self._forward is not None else None
            if instead is None:
                raise
            self._owner.end(f"compiled code raised {type(error).__name__} in its backward: {error}")
            return instead

    def _why_not(self, output_gradients: Sequence[Tensor | None]) -> str | None:
        for gradient in output_gradients:
            if gradient is not None and _is_batched(gradient):
                return BATCHED
        return TWICE if torch.is_grad_enabled() else None

    def _eagerly(self, node: Any, output_gradients: Sequence[Tensor | None]) -> tuple[Tensor | None, ...] | None:
        """Eager's gradients; None where they cannot be computed: the backward was freed, or inputs have changed since."""
        forward = self._forward
        if forward is None or _versions(forward.args) != forward.versions:
            return None
        sources = list({id(tensor): tensor for tensor in tensors(list(forward.args)) if tensor.requires_grad}.values())
        edges = [(fn, nr) for fn, nr in node.next_functions if fn is not None]
        places = [place for place, is_needed in enumerate(node.needs_input_grad) if is_needed]
        owners = {torch.autograd.graph.get_gradient_edge(source)[:2]: source for source in sources}
        if len(edges) != len(places) or not owners.keys() >= set(edges):
            return None
        by_number = {number: output_gradients[nr] for number, nr in self._direct.items()} | self._through_views
        gradients = self._owner.gradients(
            forward,
            [owners[edge] for edge in dict.fromkeys(edges)],
            {n: gradient for n, gradient in by_number.items() if gradient is not None},
        )
        by_edge = dict(zip(dict.fromkeys(edges), gradients, strict=True))
        result: list[Tensor | None] = [None] * len(node.needs_input_grad)
        for place, edge in zip(places, edges, strict=True):
            result[place] = by_edge.pop(edge, None)
        return tuple(result)


def _undo(forward: _Forward) -> None:
    """Restore the random state and the arguments of a forward that raised, so that eager can start over."""
    if forward.random is not None:
        _set_random_state(forward.random)
    with torch.no_grad():
        for number, value in forward.before.items():
            if not torch.equal(forward.args[number], value):
                forward.args[number].copy_(value)


@torch.no_grad()
def _copies(args: Sequence[Any], indices: Sequence[int]) -> dict[int, Tensor]:
    return {i: args[i].detach().clone() for i in indices}


def _written(forward: _Forward) -> tuple[int, ...]:
    """The arguments that were written since, and whose old values are not kept."""
    return tuple(i for i, version in forward.unkept.items() if _version(forward.args[i]) != version)


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _is_batched(value: Tensor) -> bool:
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(value) or functorch.is_legacy_batchedtensor(value)


def _outputs(outputs: Any) -> list[Any]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


def _node_of(output: Any, first: int) -> Any:
    """AOTAutograd's node that computed `output`, perhaps seen through views, if it is not older than `first`."""
    node = output.grad_fn if isinstance(output, Tensor) else None
    for _ in range(_MAX_VIEWS):
        if node is None or node._sequence_nr() < first:
            return None
        if type(node).__name__ == _NODE:
            return node
        node = node.next_functions[0][0] if node.next_functions else None
    return None


def _may_be_written(value: Any) -> bool:
    """Whether a graph may write into `value` without autograd seeing it, as into a buffer."""
    return isinstance(value, Tensor) and not value.requires_grad and not isinstance(value, torch.nn.Parameter)


def _is_placeholder(value: Tensor) -> bool:
    """Whether dynamo made it for a parameter that the graph creates: it has a size and no memory to be read."""
    return value.numel() > 0 and value.untyped_storage().nbytes() == 0


def _versions(args: Sequence[Any]) -> int:
    try:
        return sum([arg._version for arg in args if isinstance(arg, Tensor)])
    except RuntimeError:  # inference tensors have none
        return sum(map(_version, args))


def _random_state() -> tuple[Tensor, list[Tensor]]:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []


def _flat(state: tuple[Tensor, list[Tensor]]) -> Iterator[Tensor]:
    yield state[0]
    yield from state[1]


@contextmanager
def _as_it_was(forward: _Forward) -> Iterator[None]:
    """Put the forward's autocast and random state in force for a block; the current ones come back after it."""
    now = _random_state()
    with ExitStack() as stack:
        for device, dtype, is_cached in forward.autocast:
            stack.enter_context(torch.autocast(device, dtype=dtype, cache_enabled=is_cached))
        if forward.random is not None:
            _set_random_state(forward.random)
        try:
            yield
        finally:
            _set_random_state(now)


def _set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
