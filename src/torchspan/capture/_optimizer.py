"""The optimizer's part of a captured step: appended to the Graph, and fed from ``torch.optim`` at each call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.optim import Optimizer

from torchspan.capture._algorithms import Algorithm, algorithms_of
from torchspan.capture._clean import clean
from torchspan.capture._layout import layout_of, local
from torchspan.capture._tracing import trace
from torchspan.core.errors import GuardError, InputError
from torchspan.core.graph import GRADIENT_OF, PHASE, Graph, InputSpec, OutputSpec, output_node

_KEY = "torchspan_optimizer"
_ADVICE = "capture the step again for it"


@dataclass(frozen=True)
class Share:
    """Parameters that one set of numbers serves: those of a group that have taken as many steps."""

    group: int
    algorithm: Algorithm
    parameters: tuple[str, ...]

    def state_names(self, parameter: str) -> dict[str, str]:
        """Each state tensor of a parameter with its name in a Graph's signature."""
        return {name: f"optimizer.{name}.{parameter}" for name in self.algorithm.states}


def shares_of(optimizer: Optimizer, module: nn.Module, with_gradient: Sequence[str]) -> tuple[Share, ...]:
    """How the optimizer's parameters that have a gradient share numbers; InputError for what a Graph cannot hold."""
    algorithms = algorithms_of(optimizer)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    groups: dict[tuple[int, float], list[str]] = {}
    for index, group in enumerate(optimizer.param_groups):
        for parameter in group["params"]:
            if id(parameter) not in names:
                raise InputError(
                    f"group {index} of the {type(optimizer).__name__} has a parameter of shape {tuple(parameter.shape)} that "
                    f"{type(module).__name__} has not; make the optimizer of the captured module's parameters alone"
                )
            name = names[id(parameter)]
            if parameter.is_complex():
                raise InputError(f"parameter {name} is complex; a captured step updates real ones: step the optimizer after it")
            if name in with_gradient:
                stage = algorithms[index].stage(optimizer.state.get(parameter, {}))
                groups.setdefault((index, stage), []).append(name)
    return tuple(Share(index, algorithms[index], tuple(parameters)) for (index, _), parameters in groups.items())


# the graph


def with_optimizer(graph: Graph, module: nn.Module, optimizer: Optimizer) -> Graph:
    """`graph`, a training step of `module`, with a step of `optimizer` after it; its module is changed in place.

    It also takes the optimizer's states and numbers, and gives the new parameters and states in place of their gradients.
    """
    gradients = {spec.name: v for spec, v in zip(graph.outputs, graph.output_values()) if spec.kind == "gradient"}
    parameters = {spec.name: v for spec, v in zip(graph.inputs, graph.placeholders()) if spec.kind == "parameter"}
    shares = shares_of(optimizer, module, tuple(gradients))
    names = [name for share in shares for name in share.parameters]
    held = [node for name in names for node in (parameters[name], gradients[name])]
    update = _traced(shares, optimizer, [node.meta["val"] for node in held])
    for name in names:
        gradients[name].meta[GRADIENT_OF] = name
    specs = tuple(InputSpec("optimizer", name) for name in _taken(shares, optimizer))
    results = _append(graph.module, update, held, specs)
    kept = [
        (spec, value)
        for spec, value in zip(graph.outputs, graph.output_values())
        if spec.kind != "gradient" or spec.name not in names
    ]
    output = output_node(graph.module.graph)
    output.args = ([*(value for _, value in kept), *results],)
    output.meta.pop("desc", None)  # in a joint graph, what it gave before
    graph.module.recompile()
    graph.module.meta[_KEY] = shares
    outputs = (*(spec for spec, _ in kept), *(OutputSpec("mutation", name) for name in _given(shares)))
    result = Graph(graph.module, (*graph.inputs, *specs), outputs, kind=graph.kind, notes=graph.notes)
    result.verify()
    return result


def _taken(shares: Sequence[Share], optimizer: Optimizer) -> Iterator[str]:
    """The names of what the graph takes of the optimizer: the states of each parameter, then the numbers of each share."""
    for share in shares:
        for parameter in share.parameters:
            yield from share.state_names(parameter).values()
    for index, share in enumerate(shares):
        for name in share.algorithm.numbers(optimizer.param_groups[share.group], 1.0):
            yield f"optimizer.{name}.{index}"


def _given(shares: Sequence[Share]) -> Iterator[str]:
    """The names of what the graph gives for the optimizer: each parameter, followed by its states."""
    for share in shares:
        for parameter in share.parameters:
            yield parameter
            yield from share.state_names(parameter).values()


def _traced(shares: Sequence[Share], optimizer: Optimizer, held: Sequence[Tensor]) -> GraphModule:
    """The update of each parameter, of `held`: parameters, each with its gradient; then states, then numbers."""
    algorithms = [share.algorithm for share in shares for _ in share.parameters]
    states = [torch.empty_like(tensor) for tensor, algorithm in zip(held[::2], algorithms) for _ in algorithm.states]
    groups = optimizer.param_groups
    numbers = [tensor for share in shares for tensor in _tensors(share.algorithm.numbers(groups[share.group], 1.0))]

    def update(*flat: Tensor) -> list[Tensor]:
        pairs, remaining = iter(flat[: len(held)]), iter(flat[len(held) :])
        given_states = [
            [{key: next(remaining) for key in share.algorithm.states} for _ in share.parameters] for share in shares
        ]
        results: list[Tensor] = []
        with torch.no_grad():
            for share, of_parameters in zip(shares, given_states, strict=True):
                names = share.algorithm.numbers(groups[share.group], 1.0)
                scalars = {name: next(remaining).item() for name in names}
                for given_state in of_parameters:
                    parameter, gradient = next(pairs), next(pairs)
                    gradient = _laid_out_as(parameter, gradient)
                    parameter, after = share.algorithm.update(parameter, gradient, given_state, scalars)
                    results += [parameter, *(after[key] for key in share.algorithm.states)]
        return results

    traced = trace(update, [*(tensor.detach() for tensor in held), *states, *numbers])
    clean(traced)
    return traced


def _tensors(numbers: dict[str, float]) -> list[Tensor]:
    """Numbers as a graph takes them: on the CPU, in double precision, as Python has them."""
    return [torch.tensor(number, dtype=torch.float64, device="cpu") for number in numbers.values()]


def _laid_out_as(parameter: Tensor, gradient: Tensor) -> Tensor:
    """A gradient with the strides of its parameter, as autograd leaves it in ``.grad``."""
    return gradient if gradient.stride() == parameter.stride() else torch.empty_like(parameter).copy_(gradient)


def _append(module: GraphModule, update: GraphModule, held: Sequence[Node], specs: Sequence[InputSpec]) -> list[Any]:
    """Put the nodes of `update` at the end of `module`'s graph, with placeholders for `specs`; what they return."""
    graph = module.graph
    placeholders = [node for node in update.graph.nodes if node.op == "placeholder"]
    copies: dict[Node, Node] = dict(zip(placeholders, held))
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node, spec in zip(placeholders[len(held) :], specs, strict=True):
        with graph.inserting_after(last):
            last = graph.placeholder(spec.name.replace(".", "_"))
        last.meta = {"val": node.meta["val"]}
        copies[node] = last
    with graph.inserting_before(output_node(graph)):
        for node in update.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copies[node] = graph.node_copy(node, lambda used: copies[used])
            copies[node].meta["custom"] = {PHASE: "optimizer"}
    return [copies[node] for node in output_node(update.graph).args[0]]


# the call


@dataclass
class Update:
    """One step of the optimizer: what the graph takes for it, and where its results go, by their names."""

    optimizer: Optimizer
    arguments: list[Tensor] = field(default_factory=list)
    targets: dict[str, Tensor] = field(default_factory=dict)
    states: list[tuple[Tensor, dict[str, Any], Algorithm]] = field(default_factory=list)

    def take(self, share: Share, name: str, parameter: Tensor, state: dict[str, Any]) -> None:
        """Add the states of one parameter; those that are not there yet are made, as torch makes them."""
        if parameter.grad is not None:
            raise GuardError(
                f"parameter {name} has a gradient from before, to which the captured step does not add; "
                "call optimizer.zero_grad()"
            )
        if share.algorithm.is_fresh(state):
            state = {**state, **share.algorithm.fresh(parameter)}
        self.states.append((parameter, state, share.algorithm))
        for key, full_name in share.state_names(name).items():
            value = state.get(key)
            if not isinstance(value, Tensor) or _form(value) != _form(parameter):
                raise GuardError(f"state {full_name} is {_shown(value)}; expected {_shown(parameter)}, as its parameter is")
            self.targets[full_name] = local(value)
            self.arguments.append(self.targets[full_name])

    def finish(self) -> None:
        """Leave in ``optimizer.state`` what the optimizer's own step leaves there."""
        for parameter, state, algorithm in self.states:
            if state:
                algorithm.finish(state)
                self.optimizer.state[parameter] = state
        self.optimizer._opt_called = True  # type: ignore[attr-defined]  # a scheduler warns without it


class BoundOptimizer:
    """The optimizer of a bound Graph; `find` gives the parameter of a name as the module holds it now."""

    def __init__(self, shares: tuple[Share, ...], optimizer: Optimizer, find: Callable[[str], Tensor]) -> None:
        self._shares = shares
        self._optimizer = optimizer
        self._find = find

    def begin(self) -> Update:
        """What the graph takes of the optimizer as it is now; GuardError if it is not as it was captured."""
        optimizer = self._optimizer
        algorithms = algorithms_of(optimizer)
        groups = {id(parameter): i for i, group in enumerate(optimizer.param_groups) for parameter in group["params"]}
        update = Update(optimizer)
        numbers: list[Tensor] = []
        for share in self._shares:
            self._check_options(share, algorithms)
            stage = self._take(update, share, groups)
            numbers += _tensors(share.algorithm.numbers(optimizer.param_groups[share.group], stage))
        update.arguments.extend(numbers)
        return update

    def _take(self, update: Update, share: Share, groups: Mapping[int, int]) -> float:
        """Add the states of a share's parameters to `update`; the stage that all of them are at."""
        stages: dict[float, str] = {}
        for name in share.parameters:
            parameter = self._find(name)
            if groups.get(id(parameter)) != share.group:
                raise GuardError(f"group {share.group} of the optimizer no longer has parameter {name}; {_ADVICE}")
            state = self._optimizer.state.get(parameter, {})
            stages.setdefault(share.algorithm.stage(state), name)
            update.take(share, name, parameter, state)
        if len(stages) > 1:
            first, second = list(stages.values())[:2]
            raise GuardError(
                f"parameters {first} and {second} have taken different numbers of steps, and equal ones when the step was "
                f"captured; {_ADVICE}"
            )
        return next(iter(stages))

    def _check_options(self, share: Share, algorithms: Sequence[Algorithm]) -> None:
        """Raise GuardError if a group's options call for other operators than those of the capture."""
        algorithm = algorithms[share.group] if share.group < len(algorithms) else None
        if algorithm != share.algorithm:
            raise GuardError(
                f"group {share.group} of the optimizer is {algorithm}; the step was captured for {share.algorithm}; {_ADVICE}"
            )


def _form(value: Tensor) -> tuple[Any, ...]:
    """What a state has in common with its parameter."""
    return value.shape, value.dtype, value.device, layout_of(value)


def _shown(value: Any) -> str:
    """A state or a parameter in a message."""
    if not isinstance(value, Tensor):
        return repr(value)
    placements = getattr(value, "placements", None)
    split = "" if placements is None else f", a DTensor laid out as {placements}"
    return f"{tuple(value.shape)} of {value.dtype} on {value.device}{split}"


def bound_optimizer(graph: Graph, optimizer: Optimizer | None, find: Callable[[str], Tensor]) -> BoundOptimizer | None:
    """The optimizer that `graph` was captured with; InputError if another kind, or none, is given."""
    shares = graph.module.meta.get(_KEY)
    if shares is None:
        if optimizer is not None:
            raise InputError("the graph was captured without an optimizer; capture it with capture_train_step(…, optimizer=…)")
        return None
    if optimizer is None:
        raise InputError("the graph holds a step of the optimizer; bind it with BoundGraph(graph, module, optimizer=…)")
    return BoundOptimizer(shares, optimizer, find)
