"""A module's parameters and buffers as the flat, local tensors that a Graph takes, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torchspan.capture._inputs import inputs_of
from torchspan.capture._layout import Layout, layout_of, local
from torchspan.capture._optimizer import Update, bound_optimizer
from torchspan.core.errors import CaptureError, GuardError, InputError
from torchspan.core.graph import Graph, InputSpec
from torchspan.core.program import Program
from torchspan.private import fx

log = logging.getLogger("torchspan")


@dataclass(frozen=True)
class Slot:
    """One parameter or buffer: its spec in a Graph's signature, and its layout if it is a DTensor."""

    spec: InputSpec
    layout: Layout | None
    requires_grad: bool

    def wrap(self, local: Tensor) -> Tensor:
        """The tensor that the module holds, from this rank's part of it."""
        return local if self.layout is None else self.layout.wrap(local)

    def local_gradient(self, gradient: Tensor) -> Tensor:
        """This rank's part of a gradient, laid out as the parameter is; a partial one is summed."""
        if self.layout is None:
            return gradient
        if getattr(gradient, "placements", None) is None:
            raise CaptureError(f"the gradient of {self.spec.name} is a {type(gradient).__name__}; expected a DTensor, as it is")
        return gradient.redistribute(placements=self.layout.placements).to_local()  # type: ignore[attr-defined]


def slots(module: nn.Module) -> list[Slot]:
    """Parameters, then buffers, each once (a tied one under its first name)."""
    parameters = [_slot("parameter", name, parameter) for name, parameter in module.named_parameters()]
    return parameters + [_slot("buffer", name, buffer) for name, buffer in module.named_buffers()]


def _slot(kind: str, name: str, tensor: Tensor) -> Slot:
    return Slot(InputSpec(kind, name), layout_of(tensor), tensor.requires_grad)  # type: ignore[arg-type]


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module by name, each once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def check_program(program: Program) -> nn.Module:
    """The module of a program that a training step can be captured of; else InputError."""
    if not isinstance(program.target, nn.Module):
        raise InputError(f"a training step is captured of a module that returns its loss, not of {program.name}")
    return program.target


def check_written(spec: InputSpec, name: str) -> str:
    """The name of what forward writes into, if it is a buffer; else CaptureError."""
    if spec.kind == "buffer":
        return spec.name
    advice = "update it after the step, as an optimizer does" if spec.kind == "parameter" else "clone it first"
    raise CaptureError(f"{name} writes into {spec.kind} {spec.name}; a training step may change buffers only; {advice}")


def check_loss(loss: object, name: str) -> Tensor:
    """`loss` itself if it is a scalar that has a gradient; else CaptureError."""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        description = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise CaptureError(f"{name} returned {description}; a training step needs a scalar loss that requires a gradient")
    return loss


def call_for_loss(module: nn.Module, held: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The loss of `module` with the tensors of `held`; what it assigns anew (``self.ema = ...``) is written into those."""
    name = type(module).__name__
    constant = [key for key, value in held.items() if not value.requires_grad]
    after = dict(held)  # torch.func.functional_call puts what is assigned in it
    with _keeping_no_tensor(module):
        loss = check_loss(torch.func.functional_call(module, after, args, kwargs), name)
    assigned = {key: after[key] for key in held if after[key] is not held[key]}
    for key, value in assigned.items():
        _check_assigned(key, held, after, name)
        assigned[key] = value.clone()  # before any of them is written: one may be what another was
    with torch.no_grad():
        for key, value in assigned.items():
            held[key].copy_(value)
    for key in constant:
        if held[key].requires_grad:
            raise CaptureError(f"{name} writes what requires a gradient into {key}; detach it, or write under torch.no_grad()")
    return loss


@contextmanager
def _keeping_no_tensor(module: nn.Module) -> Iterator[None]:
    """Take what forward sets to a tensor of the trace out of the module again; CaptureError for a buffer that was None."""
    before = [(path, part, dict(vars(part)), dict(part._buffers)) for path, part in module.named_modules()]
    try:
        yield
    finally:
        attributes = [f"{path}.{key}".strip(".") for path, part, earlier, _ in before for key in _restored(vars(part), earlier)]
        buffers = [f"{path}.{key}".strip(".") for path, part, _, earlier in before for key in _restored(part._buffers, earlier)]
    name = type(module).__name__
    if buffers:
        raise CaptureError(f"{name} sets {buffers[0]}, which is None before the step; register a tensor there first")
    if attributes:
        log.warning("%s sets %s; a captured step does not: register it as a buffer to have it", name, ", ".join(attributes))


def _restored(held: dict[str, Any], earlier: Mapping[str, Any]) -> list[str]:
    """The keys under which `held` has a tensor that it had not `earlier`, after that was undone."""
    keys = [key for key, value in held.items() if isinstance(value, Tensor) and value is not earlier.get(key)]
    for key in keys:
        if key in earlier:
            held[key] = earlier[key]
        else:
            del held[key]
    return keys


def _check_assigned(key: str, held: Mapping[str, Tensor], after: Mapping[str, Any], name: str) -> None:
    before, value = held[key], after[key]
    if not isinstance(value, Tensor):
        raise CaptureError(f"{name} sets {key} to {value!r}; a captured step needs a tensor there, as it was")
    if (value.shape, value.dtype, value.device) != (before.shape, before.dtype, before.device):
        actual, expected = (f"{tuple(t.shape)} of {t.dtype} on {t.device}" for t in (value, before))
        raise CaptureError(f"{name} sets {key} to a tensor {actual}; a captured step needs {expected}, as it was")
    if value.requires_grad:
        raise CaptureError(f"{name} sets {key} to a tensor that requires a gradient; detach it: {key} = value.detach()")
    same = [other for other in after if other != key and after[other] is value]
    if same:
        raise CaptureError(f"{name} makes {key} and {same[0]} one tensor; clone it: a captured step keeps them apart")


@contextmanager
def values_told(name: str) -> Iterator[None]:
    """Tell a trace that ends because the program asks for the value of a tensor as what it is, a CaptureError."""

    try:
        yield
    except fx.value_errors() as cause:
        first = (str(cause).strip().splitlines() or [type(cause).__name__])[0]
        raise CaptureError(
            f"{name} decides by the value of a tensor, which a graph for every batch cannot ({first}); use torch.where, "
            "or, for a number that is a size, torch._check what it may be"
        ) from cause


class BoundGraph:
    """A Graph with the module whose parameters it takes: a training step as one call.

    Called as the program was, it runs the Graph on the module's parameters and buffers as they are now, updates the buffers
    that the step changes, puts the gradients in ``.grad`` and returns the loss, detached. A gradient replaces what is there;
    with ``accumulate=True`` it is added, as ``loss.backward()`` does. What has no gradient in the step keeps its ``.grad``.

    >>> from torchspan.capture.train_step import capture_train_step
    >>> class Loss(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    ...     def forward(self, x, *, power):
    ...         return (self.weight * x).pow(power).sum()
    >>> module, x = Loss(), torch.tensor([1.0, 1.0])
    >>> step = BoundGraph(capture_train_step(Program(module, (x,), {"power": 2})), module, accumulate=True)
    >>> step(x, power=2), step(2 * x, power=2), module.weight.grad
    (tensor(5.), tensor(20.), tensor([10., 20.]))

    A Graph that was captured with an optimizer is bound with one: ``BoundGraph(graph, module, optimizer=optimizer)``. A call
    then also updates the parameters and ``optimizer.state``, and leaves no ``.grad`` (see `capture_train_step`). Gradients
    cannot be accumulated in it: InputError with ``accumulate=True``, GuardError where a ``.grad`` is left from before.

    A call that differs from what was captured, in structure, in a constant, or in a tensor's shape, dtype or device, is a
    GuardError that names the input:

    >>> step(torch.ones(3), power=2)
    Traceback (most recent call last):
    torchspan.core.errors.GuardError: input 0 has shape (3,); the step was captured for (2,); capture the step again for it
    """

    def __init__(
        self, graph: Graph, module: nn.Module, *, accumulate: bool = False, optimizer: Optimizer | None = None
    ) -> None:
        if accumulate and optimizer is not None:
            raise InputError(
                "accumulate=True adds gradients up over calls, and a step of the optimizer in the graph uses them at once; "
                "leave accumulate out, or capture the step without the optimizer"
            )
        self.graph = graph
        self._inputs = inputs_of(graph)
        self._accumulate = accumulate
        places = _places(module)
        names = [spec.name for spec in graph.inputs if spec.kind in ("parameter", "buffer")]
        missing = [name for name in names if name not in places]
        if missing:
            raise InputError(f"{type(module).__name__} has no {missing[0]}, which the graph takes; bind the captured module")
        self._state = [places[name] for name in names]
        self._places = places
        self._modes = [(path, part, part.training) for path, part in module.named_modules()]
        self._frozen = {name: not place.get().requires_grad for name, place in places.items()}
        self._optimizer = bound_optimizer(graph, optimizer, lambda name: places[name].get())
        self._loss = [spec.kind for spec in graph.outputs].index("loss")
        self._tangents = [
            torch.ones((), dtype=node.meta["val"].dtype, device=node.meta["val"].device)  # of a scalar loss: one
            for node, spec in zip(graph.placeholders(), graph.inputs)
            if spec.kind == "tangent"
        ]

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        update = None if self._optimizer is None else self._optimizer.begin()
        arguments = self._arguments(args, kwargs, update)
        results = self.graph.module(*arguments)
        memories = {_memory(argument) for argument in arguments}
        # a value that is another buffer's is kept before that one is written
        results = [
            result.clone() if spec.kind == "mutation" and _memory(result) in memories else result
            for spec, result in zip(self.graph.outputs, results, strict=True)
        ]
        states = {} if update is None else update.targets
        for spec, result in zip(self.graph.outputs, results):
            if spec.kind == "gradient":
                self._give_gradient(self._places[spec.name].get(), result, memories)
            elif spec.kind == "mutation":
                held = states[spec.name] if spec.name in states else local(self._places[spec.name].get())
                held.copy_(result)
        if update is not None:
            update.finish()
        loss: Tensor = results[self._loss]
        return loss

    @torch.no_grad()
    def arguments(self, *args: Any, **kwargs: Any) -> list[Tensor]:
        """What the Graph would be called with now, in the order of its inputs; nothing is run and nothing updated."""
        return self._arguments(args, kwargs, None if self._optimizer is None else self._optimizer.begin())

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any], update: Update | None) -> list[Tensor]:
        inputs = self._inputs.tensors(args, kwargs)
        self._check_module()
        of_optimizer = [] if update is None else update.arguments
        return [*(local(place.get()) for place in self._state), *inputs, *self._tangents, *of_optimizer]

    def _check_module(self) -> None:
        """Raise GuardError where the module was changed so that the graph's step is no longer its own."""
        for path, part, training in self._modes:
            if part.training != training:
                mode = "training" if part.training else "evaluation"
                raise GuardError(f"{path or 'the module'} is in {mode} mode, in which it was not bound; capture the step again")
        for name, was_frozen in self._frozen.items():
            if self._places[name].get().requires_grad == was_frozen:
                raise GuardError(f"requires_grad of {name} was changed since the step was bound; capture the step again")

    def _give_gradient(self, parameter: Tensor, gradient: Tensor, memories: set[int]) -> None:
        """Put `gradient` in ``.grad``, or add it there: in memory of its own, laid out as the parameter, as autograd does."""
        if self._accumulate and parameter.grad is not None:
            local(parameter.grad).add_(gradient)
            return
        part, layout = local(parameter), layout_of(parameter)
        if gradient.stride() != part.stride() or _memory(gradient) in memories:
            gradient = torch.empty_like(part).copy_(gradient)
        memories.add(_memory(gradient))
        parameter.grad = gradient if layout is None else layout.wrap(gradient)


@dataclass(frozen=True)
class _Place:
    """Where a module holds a tensor."""

    holder: dict[str, Any]
    key: str

    def get(self) -> Tensor:
        """The tensor that is there now."""
        tensor: Tensor = self.holder[self.key]
        return tensor


def _places(module: nn.Module) -> dict[str, _Place]:
    """Where `module` holds each parameter and buffer, by name."""
    places: dict[str, _Place] = {}
    for name in tensors_of(module):
        path, _, key = name.rpartition(".")
        owner = module.get_submodule(path)
        places[name] = _Place(owner._parameters if key in owner._parameters else owner._buffers, key)
    return places


def _memory(tensor: Tensor) -> int:
    """A number that is equal for tensors in the same memory."""
    return tensor.untyped_storage()._cdata
