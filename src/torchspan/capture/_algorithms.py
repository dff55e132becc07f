"""The algorithms of torch.optim that a Graph can hold, as functions of tensors and numbers that write nothing.

Each calls the operators that torch's own loop over parameters calls, in its order, and computes the numbers that they take as
that loop does, in Python: the results are the same bit for bit. What torch does over lists of tensors (``foreach``) or in one
kernel (``fused``) may round otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim import Adam as TorchAdam
from torch.optim import AdamW as TorchAdamW

from torchspan.core.errors import InputError

Group = Mapping[str, Any]
State = Mapping[str, Any]
States = Mapping[str, Tensor]
Numbers = Mapping[str, Any]


@dataclass(frozen=True)
class Adam:
    """``torch.optim.Adam`` and ``AdamW``: the options that decide which operators are called."""

    decoupled_weight_decay: bool
    has_weight_decay: bool
    amsgrad: bool
    maximize: bool

    @classmethod
    def of(cls, group: Group) -> Adam:
        """The algorithm that a group of parameters asks for."""
        options = (bool(group[name]) for name in ("decoupled_weight_decay", "weight_decay", "amsgrad", "maximize"))
        return cls(*options)

    @property
    def states(self) -> tuple[str, ...]:
        """The state tensors of a parameter, of its shape, that a step changes."""
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if self.amsgrad else ()))

    def fresh(self, parameter: Tensor) -> dict[str, Any]:
        """The state before the first step."""
        wide = torch.get_default_dtype() == torch.float64  # torch counts the steps in float32 otherwise
        step = torch.zeros((), dtype=torch.float64 if wide else torch.float32, device="cpu")
        return {"step": step, **{name: torch.zeros_like(parameter) for name in self.states}}

    def is_fresh(self, state: State) -> bool:
        """Whether a parameter has no state yet, for which torch makes one in the first step."""
        return not state

    def stage(self, state: State) -> float:
        """How many steps a parameter will have taken after this one."""
        return 1.0 if self.is_fresh(state) else float(state["step"] + 1)

    def numbers(self, group: Group, stage: float) -> dict[str, float]:
        """What the operators of a step take besides tensors, for parameters at one stage."""
        lr, weight_decay, (beta1, beta2) = group["lr"], group["weight_decay"], group["betas"]
        scalars = {
            "one_minus_beta1": 1 - beta1,
            "beta2": beta2,
            "one_minus_beta2": 1 - beta2,
            "bias_correction2_sqrt": (1 - beta2**stage) ** 0.5,
            "eps": group["eps"],
            "minus_step_size": -(lr / (1 - beta1**stage)),
        }
        if self.has_weight_decay:
            scalars |= {"decay": 1 - lr * weight_decay} if self.decoupled_weight_decay else {"weight_decay": weight_decay}
        return scalars

    def update(self, parameter: Tensor, gradient: Tensor, states: States, numbers: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and its states after a step."""
        gradient = -gradient if self.maximize else gradient
        if self.has_weight_decay and self.decoupled_weight_decay:
            parameter = parameter.mul(numbers["decay"])
        elif self.has_weight_decay:
            gradient = gradient.add(parameter, alpha=numbers["weight_decay"])
        exp_avg = states["exp_avg"].lerp(gradient, numbers["one_minus_beta1"])
        scaled = states["exp_avg_sq"].mul(numbers["beta2"])
        exp_avg_sq = scaled.addcmul(gradient, gradient, value=numbers["one_minus_beta2"])
        after = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
        if self.amsgrad:
            after["max_exp_avg_sq"] = torch.maximum(states["max_exp_avg_sq"], exp_avg_sq)
        root = after.get("max_exp_avg_sq", exp_avg_sq).sqrt()
        denominator = root.div(numbers["bias_correction2_sqrt"]).add(numbers["eps"])
        return parameter.addcdiv(exp_avg, denominator, value=numbers["minus_step_size"]), after

    def finish(self, state: State) -> None:
        """Count the step."""
        state["step"].add_(1)


@dataclass(frozen=True)
class Sgd:
    """``torch.optim.SGD``: the options that decide which operators are called."""

    has_weight_decay: bool
    has_momentum: bool
    nesterov: bool
    maximize: bool

    @classmethod
    def of(cls, group: Group) -> Sgd:
        """The algorithm that a group of parameters asks for."""
        return cls(*(bool(group[name]) for name in ("weight_decay", "momentum", "nesterov", "maximize")))

    @property
    def states(self) -> tuple[str, ...]:
        """The state tensors of a parameter, of its shape, that a step changes."""
        return ("momentum_buffer",) if self.has_momentum else ()

    def fresh(self, parameter: Tensor) -> dict[str, Any]:
        """The state before the first step: minus zero, to which the gradient is added and keeps each bit, a zero's sign too."""
        return {name: torch.zeros_like(parameter).neg_() for name in self.states}

    def is_fresh(self, state: State) -> bool:
        """Whether a parameter has no state yet, for which torch makes one in the first step."""
        return self.has_momentum and state.get("momentum_buffer") is None

    def stage(self, state: State) -> float:
        """0 in the first step with momentum, else 1."""
        return 0.0 if self.is_fresh(state) else 1.0

    def numbers(self, group: Group, stage: float) -> dict[str, float]:
        """What the operators of a step take besides tensors; the first step damps nothing."""
        scalars = {"minus_lr": -group["lr"]}
        if self.has_weight_decay:
            scalars["weight_decay"] = group["weight_decay"]
        if self.has_momentum:
            scalars |= {"momentum": group["momentum"], "one_minus_dampening": 1 - group["dampening"] if stage else 1.0}
        return scalars

    def update(self, parameter: Tensor, gradient: Tensor, states: States, numbers: Numbers) -> tuple[Tensor, dict[str, Tensor]]:
        """The parameter and its states after a step."""
        gradient = -gradient if self.maximize else gradient
        if self.has_weight_decay:
            gradient = gradient.add(parameter, alpha=numbers["weight_decay"])
        if not self.has_momentum:
            return parameter.add(gradient, alpha=numbers["minus_lr"]), {}
        moved = states["momentum_buffer"].mul(numbers["momentum"])
        buffer = moved.add(gradient, alpha=numbers["one_minus_dampening"])
        direction = gradient.add(buffer, alpha=numbers["momentum"]) if self.nesterov else buffer
        return parameter.add(direction, alpha=numbers["minus_lr"]), {"momentum_buffer": buffer}

    def finish(self, state: State) -> None:
        """Nothing is counted."""


Algorithm = Adam | Sgd
_ALGORITHMS: tuple[tuple[type[Optimizer], type[Algorithm]], ...] = ((SGD, Sgd), (TorchAdam, Adam), (TorchAdamW, Adam))
_INSTEAD = "or call its step() after a captured step without it"


def algorithms_of(optimizer: Optimizer) -> list[Algorithm]:
    """The algorithm of each group of parameters; InputError for an optimizer or an option that a Graph cannot hold.

    >>> algorithms_of(torch.optim.SGD([torch.ones(2)], lr=0.1, momentum=0.9))
    [Sgd(has_weight_decay=False, has_momentum=True, nesterov=False, maximize=False)]
    >>> algorithms_of(torch.optim.Adagrad([torch.ones(2)]))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    torchspan.core.errors.InputError: the optimizer is an Adagrad; a captured step can hold torch.optim.SGD, Adam and AdamW: ...
    """
    name = type(optimizer).__name__
    algorithm = next((entry for optimizer_class, entry in _ALGORITHMS if type(optimizer) is optimizer_class), None)
    if algorithm is None:
        article = "an" if name[:1] in "AEIOU" else "a"
        raise InputError(
            f"the optimizer is {article} {name}; a captured step can hold torch.optim.SGD, Adam and AdamW: use one of them, "
            f"{_INSTEAD}"
        )
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        raise InputError(f"the {name} has hooks on its step, which a captured step does not call; remove them, {_INSTEAD}")
    for index, group in enumerate(optimizer.param_groups):
        _check_group(name, index, group)
    return [algorithm.of(group) for group in optimizer.param_groups]


def _check_group(name: str, index: int, group: Group) -> None:
    """Raise InputError for what torch would not do in its loop over parameters, with Python's numbers."""
    for option in ("foreach", "fused", "capturable", "differentiable"):
        if group.get(option):
            raise InputError(
                f"group {index} of the {name} has {option}=True; a captured step computes as torch does without it, "
                f"which may round otherwise: leave it out, {_INSTEAD}"
            )
    numbers = {key: group[key] for key in ("lr", "weight_decay", "eps", "momentum", "dampening") if key in group}
    numbers |= {f"betas[{place}]": beta for place, beta in enumerate(group.get("betas", ()))}
    for key, value in numbers.items():
        if not isinstance(value, (int, float)):
            raise InputError(
                f"{key} of group {index} of the {name} is a {type(value).__name__}; a captured step takes Python numbers: "
                f"give it float({key}), {_INSTEAD}"
            )
