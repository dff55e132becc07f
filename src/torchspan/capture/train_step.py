"""Capture a training step, forward, loss and backward, as one Graph, with make_fx: works on every supported torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchspan.capture._clean import clean
from torchspan.capture._origins import copy_origins_to_backward, stamped_as_backward, stamped_with_module_paths
from torchspan.capture._state import Slot, check_loss, check_program, local, slots
from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.core.program import Program


def capture_train_step(program: Program) -> Graph:
    """The training step of a module whose forward gives a scalar loss.

    The Graph takes the module's parameters and buffers (of a DTensor: this rank's part), then the inputs, and gives the loss
    and the gradient of each parameter that has one, in the parameters' order. Traced on fake tensors: nothing is computed.

    >>> class Loss(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(3))
    ...     def forward(self, x):
    ...         return (self.weight * x).sum()
    >>> graph = capture_train_step(Program(Loss(), (torch.ones(3),)))
    >>> [f"{spec.kind} {spec.name}" for spec in (*graph.inputs, *graph.outputs)]
    ['parameter weight', 'input 0', 'loss loss', 'gradient weight']
    """
    module = check_program(program)
    state = slots(module)
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    with_gradient: list[str] = []

    def step(*flat: Tensor) -> list[Tensor]:
        held = _held(state, flat)
        loss = _loss(module, held, flat[len(state) :])
        leaves = {slot.spec.name: held[slot.spec.name] for slot in state if slot.requires_grad}
        gradients = _gradients(loss, leaves)
        with_gradient[:] = gradients
        by_name = {slot.spec.name: slot for slot in state}
        return [loss.detach(), *(by_name[name].local_gradient(gradient) for name, gradient in gradients.items())]

    flat = [local(tensors[slot.spec.name]) for slot in state] + list(program.args)
    with stamped_with_module_paths(module):
        traced = _trace(step, flat, program.name)
    copy_origins_to_backward(traced)
    clean(traced)
    graph = Graph(
        module=traced,
        inputs=(*(slot.spec for slot in state), *(InputSpec("input", str(i)) for i in range(len(program.args)))),
        outputs=(OutputSpec("loss", "loss"), *(OutputSpec("gradient", name) for name in with_gradient)),
        kind="train_step",
    )
    graph.verify()
    return graph


def _held(state: list[Slot], flat: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the module holds during the trace: leaves of autograd, as its parameters are."""
    return {slot.spec.name: slot.wrap(t).detach().requires_grad_(slot.requires_grad) for slot, t in zip(state, flat)}


def _loss(module: nn.Module, held: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
    return check_loss(torch.func.functional_call(module, held, inputs), type(module).__name__)


def _gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    from torchspan.capture import _torch

    _torch.follow_backward(loss)
    with stamped_as_backward(), torch.autograd.set_multithreading_enabled(False):
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, found) if gradient is not None}


def _trace(step: object, flat: list[Tensor], name: str) -> torch.fx.GraphModule:
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.traceback import preserve_node_meta

    from torchspan.capture import _torch

    with _torch.kernels_kept_whole(), preserve_node_meta(), torch.enable_grad():
        return make_fx(step, tracing_mode="fake")(*flat)  # type: ignore[arg-type]
