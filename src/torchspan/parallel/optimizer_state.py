"""An optimizer's state under the parameters' names and in their own shapes, whatever way SimpleFSDP stores them.

What was saved on any number of ranks loads on any other, in one process too: write it with ``torch.distributed.checkpoint``, or
gather it by ``full_tensor()`` and write it with ``torch.save``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from torchspan.core.errors import InputError
from torchspan.parallel.simple_fsdp import Stored, stored_layouts


def optimizer_state(module: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    """The state of each parameter of `module`, by the parameter's name; every rank of the job must call this.

    Tensors that are like the parameter have its own shape, as DTensors if it is sharded; others are as they are.

    >>> layer = nn.Linear(2, 2)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    >>> layer(torch.ones(2)).sum().backward(); optimizer.step()
    >>> optimizer_state(layer, optimizer)["weight"]["momentum_buffer"].shape
    torch.Size([2, 2])
    """
    layouts = stored_layouts(module)
    return {
        name: {key: _exported(value, parameter, layouts.get(name)) for key, value in optimizer.state[parameter].items()}
        for name, parameter in module.named_parameters()
        if parameter in optimizer.state
    }


def load_optimizer_state(module: nn.Module, optimizer: Optimizer, state: dict[str, dict[str, Any]]) -> None:
    """Put what `optimizer_state` gave, here or on other ranks, in place of the optimizer's state.

    InputError for a parameter that `module` does not have or that has another shape; then nothing is changed.
    """
    parameters, layouts = dict(module.named_parameters()), stored_layouts(module)
    unknown = sorted(set(state) - set(parameters))
    if unknown:
        raise InputError(f"the optimizer's state is for {unknown[0]!r}, among others; the module has no such parameter")
    loaded: dict[Tensor, dict[str, Any]] = {
        parameters[name]: {
            key: _imported(value, parameters[name], layouts.get(name), f"{name}'s {key}") for key, value in of.items()
        }
        for name, of in state.items()
    }
    optimizer.state.clear()
    optimizer.state.update(loaded)


def _exported(value: Any, parameter: Tensor, stored: Stored | None) -> Any:
    if stored is None or not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value.clone() if isinstance(value, Tensor) else value
    return stored.export(value)


def _imported(value: Any, parameter: Tensor, stored: Stored | None, name: str) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value.clone() if isinstance(value, Tensor) else value
    if stored is not None:
        return stored.imported(value.to(parameter.device), name)
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    if whole.shape != parameter.shape:
        raise InputError(f"{name} has the shape {tuple(whole.shape)}; expected {tuple(parameter.shape)}, the parameter's own")
    return whole.to(parameter.device).clone()
