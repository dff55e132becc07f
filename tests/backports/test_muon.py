"""Muon's steps are those of torch's own, which are written down here as they were on torch 2.15.0."""

from __future__ import annotations

import copy

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")

SETTINGS = [{}, {"adjust_lr_fn": "match_rms_adamw", "nesterov": False}, {"weight_decay": 0.0, "momentum": 0.5, "ns_steps": 3}]


def trained(settings: dict[str, object], num_steps: int = 3, shape: tuple[int, int] = (6, 4)) -> torch.nn.Parameter:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = torch.optim.Muon([weight], lr=0.1, **settings)
    for _ in range(num_steps):
        optimizer.zero_grad()
        (weight @ torch.randn(shape[1], 3, generator=generator)).square().sum().backward()
        optimizer.step()
    return weight


def written_out(settings: dict[str, object]) -> torch.Tensor:
    """The same, step by step from the paper's formulas."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 4, generator=generator)
    average = torch.zeros_like(weight)
    momentum, decay = settings.get("momentum", 0.95), settings.get("weight_decay", 0.1)
    for _ in range(3):
        x = torch.randn(4, 3, generator=generator)
        leaf = weight.clone().requires_grad_()
        (leaf @ x).square().sum().backward()
        average = average.lerp(leaf.grad, 1 - momentum)
        update = leaf.grad.lerp(average, momentum) if settings.get("nesterov", True) else average
        flat = update.bfloat16().T
        flat = flat / flat.norm().clamp(min=1e-7)
        for _ in range(settings.get("ns_steps", 5)):
            gram = flat @ flat.T
            flat = torch.addmm(flat, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), flat, beta=3.4445)
        scale = 0.2 * 6**0.5 if settings.get("adjust_lr_fn") else (6 / 4) ** 0.5
        weight = weight * (1 - 0.1 * decay)
        weight = weight.add(flat.T, alpha=-0.1 * scale)
    return weight


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_its_steps_are_the_papers(settings: dict[str, object]) -> None:
    torch.testing.assert_close(trained(settings).detach(), written_out(settings), rtol=0, atol=1e-6)


def test_its_state_is_saved_and_loaded() -> None:
    weight = torch.nn.Parameter(torch.eye(3))
    optimizer = torch.optim.Muon([weight], lr=torch.tensor(0.1))
    weight.grad = torch.ones(3, 3)
    assert optimizer.step(lambda: 7.0) == 7.0
    other = torch.optim.Muon([torch.nn.Parameter(torch.eye(3))])
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert torch.equal(other.state_dict()["state"][0]["momentum_buffer"], torch.full((3, 3), 1 - 0.95))
    assert type(optimizer).__module__ == "torch.optim"
    assert torch.optim._muon.Muon is torch.optim.Muon


@pytest.mark.parametrize(
    ("shape", "settings", "message"),
    [
        ((3,), {}, r"Muon only supports 2D parameters whereas we found a parameter with size: torch.Size\(\[3\]\)"),
        ((2, 2), {"lr": -1.0}, "Learning rate should be >= 0 but is: -1.0"),
        ((2, 2), {"momentum": -1.0}, "momentum should be >= 0 but is: -1.0"),
        ((2, 2), {"weight_decay": -1.0}, "weight decay should be >= 0 but is: -1.0"),
        ((2, 2), {"adjust_lr_fn": "other"}, "Adjust learning rate function other is not supported"),
    ],
)
def test_what_it_cannot_do_is_refused(shape: tuple[int, ...], settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        torch.optim.Muon([torch.nn.Parameter(torch.zeros(shape))], **settings)
