"""activate and deactivate: idempotent, reversible, by argument and by variable."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import torchspan
from torchspan.core.errors import InputError
from torchspan.environment.scope import active_environment


@pytest.fixture(autouse=True)
def _inactive() -> Iterator[None]:
    yield
    torchspan.deactivate()


def holders() -> list[object]:
    return [torch, torch.cuda, torch.Tensor, torch.nn.Module, torch.compiler, torch.fx.traceback, torch.amp, torch.utils.data]


def test_deactivate_restores_the_identity_of_everything() -> None:
    before = [dict(vars(holder)) for holder in holders()]
    torchspan.activate(compile="bounded")
    assert torch.zeros(1, device="cuda").device.type in ("cpu", "cuda")
    _ = torch.Precompile, torch.fx.traceback.annotate
    torchspan.deactivate()
    for holder, was in zip(holders(), before):
        now = dict(vars(holder))
        assert now.keys() == was.keys(), (holder, now.keys() ^ was.keys())
        assert all(now[name] is was[name] for name in was), holder


def test_activating_twice_is_activating_once() -> None:
    first = torchspan.activate()
    zeros = torch.zeros
    assert torchspan.activate() is first and torch.zeros is zeros
    other = torchspan.activate(device="off")
    assert other is not first and not first.is_active and active_environment() is other
    torchspan.deactivate()
    torchspan.deactivate()
    assert active_environment() is None


def test_activating_before_torch_is_imported_is_activating_once(run_python) -> None:
    run_python(
        """
        import torchspan
        environment = torchspan.activate()
        from torchspan.environment import scope
        assert scope._active == [environment]
        import torch
        torchspan.deactivate()
        assert not hasattr(torch, "Precompile") and scope._active == []
        """,
        env={"TORCHSPAN": "1"},
    )


def test_it_is_a_context_manager() -> None:
    with torchspan.activate() as environment:
        assert environment.is_active
    assert not environment.is_active


def test_what_is_disabled_is_left_out() -> None:
    with torchspan.activate(disable=["precompile"]):
        assert not hasattr(torch, "Precompile")
    with torchspan.activate(backports=False):
        assert not hasattr(torch, "Precompile")
    with torchspan.activate():
        assert hasattr(torch, "Precompile")


def test_mistakes_say_what_was_expected() -> None:
    with pytest.raises(InputError, match="did you mean 'precompile'"):
        torchspan.activate(disable=["precompil"])
    with pytest.raises(InputError, match="cudaa"):
        torchspan.activate(device="cudaa")
    assert active_environment() is None
