"""Capture a training step, forward, loss and backward, as one Graph, with make_fx: works on every supported torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from torchspan.capture._clean import clean, keep_checks
from torchspan.capture._functional import without_writes
from torchspan.capture._inputs import Inputs, keep_inputs
from torchspan.capture._layout import local
from torchspan.capture._optimizer import with_optimizer
from torchspan.capture._origins import copy_origins_to_backward, stamped_as_backward, stamped_with_module_paths
from torchspan.capture._state import Slot, call_for_loss, check_program, check_written, slots, tensors_of, values_told
from torchspan.capture._tracing import trace
from torchspan.core.graph import Graph, OutputSpec
from torchspan.core.program import Program
from torchspan.private import aot


def capture_train_step(program: Program, *, optimizer: Optimizer | None = None) -> Graph:
    """The training step of a module whose forward gives a scalar loss.

    The Graph takes the module's parameters and buffers (of a DTensor: this rank's part), then the tensors among the inputs, and
    gives the loss, the gradient of each parameter that has one, in the parameters' order, and the new value of each buffer that
    the step changes. It writes nothing itself. Traced on fake tensors: nothing is computed.

    >>> class Loss(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.ones(3))
    ...         self.register_buffer("seen", torch.zeros(()))
    ...     def forward(self, batch, scale):
    ...         self.seen.add_(len(batch["x"]))
    ...         return (self.weight * batch["x"] * scale).sum()
    >>> graph = capture_train_step(Program(Loss(), ({"x": torch.ones(3)},), {"scale": 2.0}))
    >>> [f"{spec.kind} {spec.name}" for spec in graph.inputs]
    ['parameter weight', 'buffer seen', 'input 0.x']
    >>> [f"{spec.kind} {spec.name}" for spec in graph.outputs]
    ['loss loss', 'gradient weight', 'mutation seen']

    What is no tensor among the inputs (``scale``) is a constant of the Graph. A size that depends on data, such as
    ``n = counts.sum().item()``, stays a symbol, so that one Graph serves every batch; what ``torch._check`` says of it is
    checked at every step. A tied parameter is one input and has one gradient.

    With `optimizer` the Graph ends with its step: it also takes the optimizer's states and the numbers of its groups, as
    tensors of no dimension, and gives each new parameter and state in place of the gradient. `BoundGraph` with the same
    optimizer then does a whole step. No ``.grad`` is left, what has no gradient in the step is not updated, and
    ``optimizer.state`` is what ``optimizer.step()`` leaves. The numbers are read from ``optimizer.param_groups`` at each call,
    as a scheduler sets them.

    >>> from torchspan.capture._state import BoundGraph
    >>> module = Loss()
    >>> optimizer = torch.optim.AdamW(module.parameters(), lr=0.5, weight_decay=0.0)
    >>> program = Program(module, ({"x": torch.ones(3)},), {"scale": 2.0})
    >>> graph = capture_train_step(program, optimizer=optimizer)
    >>> [spec.name for spec in graph.inputs if spec.kind == "optimizer"][:3]
    ['optimizer.exp_avg.weight', 'optimizer.exp_avg_sq.weight', 'optimizer.one_minus_beta1.0']
    >>> [spec.name for spec in graph.outputs if spec.kind == "mutation"]
    ['seen', 'weight', 'optimizer.exp_avg.weight', 'optimizer.exp_avg_sq.weight']
    >>> step = BoundGraph(graph, module, optimizer=optimizer)
    >>> step(*program.args, **program.kwargs), module.weight.data, module.weight.grad
    (tensor(6.), tensor([0.5000, 0.5000, 0.5000]), None)
    >>> optimizer.param_groups[0]["lr"] = 0.25  # or a scheduler's step()
    >>> _ = step(*program.args, **program.kwargs)
    >>> module.weight.data, optimizer.state[module.weight]["step"]
    (tensor([0.2500, 0.2500, 0.2500]), tensor(2.))

    ``torch.optim.SGD``, ``Adam`` and ``AdamW`` can be held, DTensors too; every bit is that of torch's loop over parameters,
    which is torch's choice on a CPU (on a GPU it chooses ``foreach``, which may round otherwise). Parameters of a group that
    have not taken as many steps get numbers of their own (``optimizer.beta2.1``). While the Graph runs, the old and the new
    parameters and states are there, as it writes nothing itself.

    InputError for an optimizer that a Graph cannot hold, and for inputs that a Graph cannot take; CaptureError where forward
    gives no scalar loss, writes into a parameter or an input, or decides by the value of a tensor.
    """
    module = check_program(program)
    inputs = Inputs.of(program)
    state = slots(module)
    with_gradient: list[str] = []

    def step(*flat: Tensor) -> list[Tensor]:
        held = _held(state, flat)
        arguments = inputs.wrap(flat[len(state) :])
        loss = call_for_loss(module, held, *inputs.unflatten(arguments))
        leaves = {slot.spec.name: held[slot.spec.name] for slot in state if slot.requires_grad}
        gradients = _gradients(loss, leaves)
        with_gradient[:] = gradients
        by_name = {slot.spec.name: slot for slot in state}
        return [loss.detach(), *(by_name[name].local_gradient(gradient) for name, gradient in gradients.items())]

    tensors = tensors_of(module)
    flat = [*(local(tensors[slot.spec.name]) for slot in state), *inputs.tensors(program.args, program.kwargs)]
    with values_told(program.name), stamped_with_module_paths(module):
        traced = trace(step, flat)
    copy_origins_to_backward(traced)
    clean(traced)
    keep_checks(traced)
    functional, written = without_writes(traced, trace)
    if functional is not traced:
        clean(functional)
    traced = functional
    keep_inputs(traced, inputs)
    specs = (*(slot.spec for slot in state), *inputs.specs)
    graph = Graph(
        module=traced,
        inputs=specs,
        outputs=(
            OutputSpec("loss", "loss"),
            *(OutputSpec("gradient", name) for name in with_gradient),
            *(OutputSpec("mutation", check_written(specs[index], program.name)) for index in written),
        ),
        kind="train_step",
    )
    graph.verify()
    return graph if optimizer is None else with_optimizer(graph, module, optimizer)


def _held(state: list[Slot], flat: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What the module holds during the trace: leaves of autograd, as its parameters are."""
    return {slot.spec.name: slot.wrap(t).detach().requires_grad_(slot.requires_grad) for slot, t in zip(state, flat)}


def _gradients(loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:

    aot.keep_forward_traces([loss])
    with stamped_as_backward(), torch.autograd.set_multithreading_enabled(False):
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(leaves, gradients) if gradient is not None}
