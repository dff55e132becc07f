"""A module's parameters and buffers as the flat, local tensors that a Graph takes, and the way back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchspan.core.errors import CaptureError, InputError
from torchspan.core.graph import Graph, InputSpec
from torchspan.core.program import Program


@dataclass(frozen=True)
class Layout:
    """How a DTensor is made of its local tensor."""

    mesh: DeviceMesh
    placements: tuple[Any, ...]
    shape: torch.Size
    stride: tuple[int, ...]

    def wrap(self, local: Tensor) -> Tensor:
        """The DTensor of which `local` is this rank's part."""
        from torch.distributed.tensor import DTensor

        return DTensor.from_local(
            local,
            self.mesh,
            self.placements,
            run_check=False,
            shape=self.shape,
            stride=self.stride,
        )


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
    found = [_slot("parameter", name, parameter) for name, parameter in module.named_parameters()]
    return found + [_slot("buffer", name, buffer) for name, buffer in module.named_buffers()]


def _slot(kind: str, name: str, tensor: Tensor) -> Slot:
    return Slot(InputSpec(kind, name), _layout(tensor), tensor.requires_grad)  # type: ignore[arg-type]


def _layout(tensor: Tensor) -> Layout | None:
    if not is_dtensor(tensor):
        return None
    return Layout(tensor.device_mesh, tuple(tensor.placements), tensor.shape, tensor.stride())  # type: ignore[attr-defined]


def is_dtensor(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor; imports torch.distributed.tensor only if someone else has."""
    return type(tensor) is not Tensor and hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def local(tensor: Tensor) -> Tensor:
    """This rank's part of `tensor`, outside of autograd."""
    return tensor.detach().to_local() if is_dtensor(tensor) else tensor.detach()  # type: ignore[attr-defined]


def check_program(program: Program) -> nn.Module:
    """The module of a program that a training step can be captured of; else InputError."""
    if not isinstance(program.target, nn.Module):
        raise InputError(f"a training step is captured of a module that returns its loss, not of {program.name}")
    if program.kwargs:
        raise InputError(f"a training step takes its inputs by position; found keywords: {', '.join(program.kwargs)}")
    for index, value in enumerate(program.args):
        if not isinstance(value, Tensor):
            raise InputError(f"input {index} of a training step is a {type(value).__name__}; expected a tensor")
    return program.target


def check_loss(loss: object, name: str) -> Tensor:
    """`loss` itself if it is a scalar that has a gradient; else CaptureError."""
    if not isinstance(loss, Tensor) or loss.ndim or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise CaptureError(f"{name} returned {found}; a training step needs a scalar loss that requires a gradient")
    return loss


class BoundGraph:
    """A Graph with the module whose parameters it takes: a training step as one call.

    Called with the inputs that the Graph was captured for, it runs the Graph on the module's parameters and buffers as they are
    now, puts the gradients in ``.grad`` (replacing what is there) and returns the loss.
    """

    def __init__(self, graph: Graph, module: nn.Module) -> None:
        self.graph = graph
        state: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        self._state = [state[spec.name] for spec in graph.inputs if spec.kind in ("parameter", "buffer")]
        self._kinds = [spec.kind for spec in graph.inputs]
        self._outputs = [spec.kind for spec in graph.outputs]
        self._targets = [state.get(spec.name) for spec in graph.outputs]

    @torch.no_grad()
    def __call__(self, *inputs: Tensor) -> Tensor:
        results = self.graph.module(*self._arguments(inputs))
        for kind, target, result in zip(self._outputs, self._targets, results):
            if kind == "gradient":
                assert target is not None
                layout = _layout(target)
                target.grad = result if layout is None else layout.wrap(result)
            elif kind == "mutation":
                assert target is not None
                local(target).copy_(result)
        loss: Tensor = results[self._outputs.index("loss")]
        return loss

    def _arguments(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        state, given = iter(self._state), iter(inputs)
        arguments: list[Tensor] = []
        for kind in self._kinds:
            if kind == "tangent":
                arguments.append(torch.ones(()))  # of a scalar loss: one
            else:
                arguments.append(next(given) if kind == "input" else local(next(state)))
        return arguments
