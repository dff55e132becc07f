"""An optimizer steps on other parameters and state for a while, and has its own again afterwards."""

from __future__ import annotations

import copy

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


def stepped(weight: torch.nn.Parameter) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.grad = torch.full_like(weight, 0.5)
    optimizer.step()
    return optimizer


def test_a_step_inside_changes_what_was_given_only() -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = stepped(weight)
    before, own = weight.detach().clone(), copy.deepcopy(optimizer.state_dict())
    other = torch.nn.Parameter(torch.zeros(3))
    other.grad = torch.ones(3)
    state = copy.deepcopy(optimizer.state_dict())
    state["param_groups"][0]["lr"] = 0.01
    with torch.optim.swap_in_optimizer_params_and_state(optimizer, {"w": other}, state):
        assert optimizer.param_groups[0]["params"] == [other] and optimizer.param_groups[0]["lr"] == 0.01
        optimizer.step()
    assert torch.equal(weight, before) and optimizer.param_groups[0]["params"][0] is weight
    assert torch.equal(optimizer.state[weight]["exp_avg"], own["state"][0]["exp_avg"])
    assert float(state["state"][0]["step"]) == 2.0  # its tensors are changed in place
    expected = torch.nn.Parameter(torch.zeros(3))
    twin = torch.optim.AdamW([expected], lr=0.01)
    twin.load_state_dict({"state": own["state"], "param_groups": [{**own["param_groups"][0], "lr": 0.01}]})
    expected.grad = torch.ones(3)
    twin.step()
    assert torch.equal(other, expected)


def test_what_does_not_fit_is_refused() -> None:
    swap = torch.optim.swap_in_optimizer_params_and_state
    weight = torch.nn.Parameter(torch.ones(3))
    fresh = torch.optim.AdamW([weight])
    with pytest.raises(RuntimeError, match="requires initialized optimizer state"), swap(fresh, {}, fresh.state_dict()):
        pass
    optimizer = stepped(weight)
    state = optimizer.state_dict()
    with pytest.raises(RuntimeError, match=r"match optimizer\.param_groups ordering"), swap(optimizer, {}, state):
        pass
    with (
        pytest.raises(RuntimeError, match="different number of parameter groups"),
        swap(optimizer, {}, {**state, "param_groups": []}),
    ):
        pass
    with pytest.raises(RuntimeError, match="extra keys"), swap(optimizer, {"w": weight}, {**state, "state": {7: {}}}):
        pass
    assert optimizer.param_groups[0]["params"][0] is weight
