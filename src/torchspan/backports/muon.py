"""``torch.optim.Muon``: momentum whose update is made nearly orthogonal, for the matrices of hidden layers."""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from torchspan.backports._base import Backport

# A, B: rows and columns of a parameter
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ADJUSTMENTS = ("original", "match_rms_adamw", "spectral_unclamped")


def _zeropower_via_newtonschulz(grad: Tensor, ns_coefficients: tuple[float, float, float], ns_steps: int, eps: float) -> Tensor:
    """`grad` with its singular values brought near 1, by Newton and Schulz's iteration in bfloat16 (Keller Jordan, 2024)."""
    if ns_steps >= 100:
        raise ValueError(f"Number of steps must be less than 100 for computational efficiency, got {ns_steps}")
    if grad.ndim != 2:
        raise ValueError(f"Input tensor gradient must be a 2D matrix, got shape {tuple(grad.shape)}")
    if len(ns_coefficients) != 3:
        raise ValueError(f"Coefficients must be a tuple of exactly 3 values, got {ns_coefficients}")
    a, b, c = ns_coefficients
    is_tall = grad.size(0) > grad.size(1)
    x_AB = grad.to(torch.bfloat16, copy=True)
    x_AB = x_AB.T if is_tall else x_AB
    x_AB.div_(x_AB.norm().clamp(min=eps))
    for _ in range(ns_steps):
        gram_AA = x_AB @ x_AB.T
        x_AB = torch.addmm(x_AB, torch.addmm(gram_AA, gram_AA, gram_AA, beta=b, alpha=c), x_AB, beta=a)
    return x_AB.T if is_tall else x_AB


def _adjust_lr(lr: float, adjust_lr_fn: str | None, param_shape: torch.Size) -> float:
    """The learning rate for a matrix of this shape."""
    num_rows, num_columns = param_shape[:2]
    if adjust_lr_fn is None or adjust_lr_fn == "original":
        return lr * math.sqrt(max(1, num_rows / num_columns))
    if adjust_lr_fn == "match_rms_adamw":
        return lr * (0.2 * math.sqrt(max(num_rows, num_columns)))
    return lr * (math.sqrt(num_rows / num_columns) if adjust_lr_fn == "spectral_unclamped" else 1.0)


def muon(
    params: list[Tensor],
    grads: list[Tensor],
    muon_momentum_bufs: list[Tensor],
    *,
    foreach: bool | None = None,
    lr: float,
    weight_decay: float,
    momentum: float,
    nesterov: bool,
    ns_coefficients: tuple[float, float, float],
    ns_steps: int,
    eps: float,
    adjust_lr_fn: str | None,
    has_complex: bool,
) -> None:
    """One step of Muon on lists of parameters ``(A, B)``, in place. Raises RuntimeError for `foreach`, as upstream."""
    if foreach:
        raise RuntimeError("Foreach is not supported for Muon yet")
    if has_complex:
        raise ValueError("Complex parameters are not supported")
    lr = lr.item() if isinstance(lr, Tensor) else lr
    for param, grad, buffer in zip(params, grads, muon_momentum_bufs):
        if grad.ndim != 2:
            raise ValueError(f"Param gradient must be a 2D matrix, got shape {tuple(grad.shape)}")
        buffer.lerp_(grad, 1 - momentum)
        update = grad.lerp(buffer, momentum) if nesterov else buffer
        update = _zeropower_via_newtonschulz(update, ns_coefficients, ns_steps, eps)
        param.mul_(1 - lr * weight_decay)
        param.add_(update, alpha=-_adjust_lr(lr, adjust_lr_fn, param.shape))


@functools.cache
def _optimizer() -> type:
    """The class Muon, made when it is asked for: its base brings dynamo's import."""

    class Muon(torch.optim.Optimizer):
        """Muon, for matrices; embeddings, biases and the like need another optimizer, such as AdamW.

        Args:
            params: parameters ``(A, B)``, or groups of them.
            lr: the learning rate; a tensor of one element may be given.
            weight_decay: how much of `lr` of each weight is taken off.
            momentum: how much of the average of gradients is kept.
            nesterov: whether the update looks ahead.
            ns_coefficients: of the quintic polynomial that is iterated.
            eps: the least norm to divide by.
            ns_steps: iterations, less than 100.
            adjust_lr_fn: how `lr` depends on the shape: "original" (the default), "match_rms_adamw" or "spectral_unclamped".

        Raises:
            ValueError: a setting that is negative, another `adjust_lr_fn`, or a parameter that is no matrix.
        """

        def __init__(
            self,
            params: Iterable[Any],
            lr: float = 1e-3,
            weight_decay: float = 0.1,
            momentum: float = 0.95,
            nesterov: bool = True,
            ns_coefficients: tuple[float, float, float] = _COEFFICIENTS,
            eps: float = 1e-7,
            ns_steps: int = 5,
            adjust_lr_fn: str | None = None,
        ) -> None:
            if isinstance(lr, Tensor) and lr.numel() != 1:
                raise ValueError("Tensor lr must be 1-element")
            for value, what in ((lr, "Learning rate"), (momentum, "momentum"), (weight_decay, "weight decay")):
                if not value >= 0.0:
                    raise ValueError(f"{what} should be >= 0 but is: {value}")
            if adjust_lr_fn is not None and adjust_lr_fn not in _ADJUSTMENTS:
                raise ValueError(f"Adjust learning rate function {adjust_lr_fn} is not supported")
            settings: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "nesterov": nesterov}
            settings |= {"ns_coefficients": ns_coefficients, "eps": eps, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
            super().__init__(params, settings)
            for param in (param for group in self.param_groups for param in group["params"]):
                if param.ndim != 2:
                    raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {param.size()}")

        @torch.no_grad()
        def step(self, closure: Callable[[], Any] | None = None) -> Any:
            """Update the parameters; returns what `closure` returns, which is called with gradients on."""
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            for group in self.param_groups:
                params = [param for param in group["params"] if param.grad is not None]
                grads, buffers = [param.grad for param in params], [self._buffer(param) for param in params]
                settings = {name: value for name, value in group.items() if name in self.defaults}
                muon(params, grads, buffers, **settings, has_complex=False)
            return loss

        def _buffer(self, param: Tensor) -> Tensor:
            if torch.is_complex(param):
                raise RuntimeError("Muon does not support complex parameters")
            if param.grad.is_sparse:  # type: ignore[union-attr]
                raise RuntimeError("Muon does not support sparse gradients")
            state = self.state[param]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(param.grad, memory_format=torch.preserve_format)  # type: ignore[arg-type]
            buffer: Tensor = state["momentum_buffer"]
            return buffer

    Muon.__module__, Muon.__qualname__ = "torch.optim", "Muon"
    return Muon


muon.__module__ = "torch.optim._muon"

BACKPORT = Backport(
    name="muon",
    summary="the optimizer Muon: momentum made orthogonal, for the matrices of hidden layers",
    target="torch.optim",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.9.0/torch/optim/_muon.py",
    names={"Muon": _optimizer, "_muon": lambda: importlib.import_module("torch.optim._muon")},
    elsewhere={
        "torch.optim._muon": {
            "Muon": _optimizer,
            "muon": lambda: muon,
            "_adjust_lr": lambda: _adjust_lr,
            "_zeropower_via_newtonschulz": lambda: _zeropower_via_newtonschulz,
        }
    },
)
