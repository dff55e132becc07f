"""``torch.optim.swap_in_optimizer_params_and_state``: an optimizer that steps on other parameters and state for a while."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from torchspan.backports._base import Backport

_NAME = "swap_in_optimizer_params_and_state"


@contextmanager
def swap_in_optimizer_params_and_state(
    optimizer: Any, swapin_parameters: dict[str, Tensor], swapin_optim_state: dict[str, Any]
) -> Iterator[None]:
    """Inside, the optimizer has these parameters, state and settings; afterwards it has its own again.

    Args:
        optimizer: one whose state has been made.
        swapin_parameters: by name, in the order of the optimizer's own.
        swapin_optim_state: as ``optimizer.state_dict()``; its tensors are changed in place, it gets no new ones.

    Raises:
        RuntimeError: what was given does not fit the optimizer.
    """
    state, groups = _checked(optimizer, swapin_optim_state)
    tensors = iter(swapin_parameters.values())
    group_params = [[*_first(tensors, len(group["params"]))] for group in groups]
    before, own_groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    swapped: defaultdict[Tensor, Any] = defaultdict(dict)
    try:
        for own, group, params in zip(optimizer.param_groups, groups, group_params):
            own.update({**group, "params": params})
            swapped.update({param: dict(state.get(number, {})) for param, number in zip(params, group["params"])})
        optimizer.state = swapped
        yield
    finally:
        optimizer.state = before
        for own, kept in zip(optimizer.param_groups, own_groups):
            own.clear()
            own.update(kept)


def _first(tensors: Iterator[Tensor], number: int) -> Iterator[Tensor]:
    for _ in range(number):
        tensor = next(tensors, None)
        _require(tensor is not None, "the explicit parameter state to match optimizer.param_groups ordering")
        yield tensor  # type: ignore[misc] # it is one


def _checked(optimizer: Any, state_dict: Any) -> tuple[dict[Any, Any], list[Any]]:
    _require(bool(optimizer.state), "initialized optimizer state")
    _require(isinstance(state_dict, dict), "a DCP-style optimizer state_dict")
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    _require(isinstance(state, dict), f"swapin_optim_state['state'] to be a dict, got {type(state).__name__}")
    _require(isinstance(groups, list), f"swapin_optim_state['param_groups'] to be a list, got {type(groups).__name__}")
    numbers = {number for group in groups for number in group["params"]}
    if len(groups) != len(optimizer.param_groups):
        raise RuntimeError("swapin_optim_state has a different number of parameter groups than the live optimizer.")
    for index, (own, group) in enumerate(zip(optimizer.param_groups, groups)):
        if len(own["params"]) != len(group["params"]):
            raise RuntimeError(
                f"swapin_optim_state param group {index} has a different number of params than the live optimizer"
            )
        others = {*own} ^ {*group}
        _require(not others, f"param group keys to exactly match the live optimizer group keys for group {index}, not {others}")
    wrong = [key for key in state if not isinstance(key, int) or key not in numbers or not isinstance(state[key], dict)]
    _require(not wrong, f"swapin_optim_state['state'] to be keyed only by packed parameter ids; got extra keys {wrong!r}")
    return state, groups


def _require(is_so: bool, what: str) -> None:
    if not is_so:
        raise RuntimeError(f"{_NAME} requires {what}.")


swap_in_optimizer_params_and_state.__module__ = "torch.optim"

BACKPORT = Backport(
    name="swap_in_optimizer",
    summary="an optimizer with other parameters and state for a while: torch.optim.swap_in_optimizer_params_and_state",
    target="torch.optim",
    since="2.13.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/optim/_stateless.py",
    names={"swap_in_optimizer_params_and_state": lambda: swap_in_optimizer_params_and_state},
)
