"""activate and deactivate: idempotent, reversible, by argument and by variable."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

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


def test_a_registered_backport_and_shim_are_there_until_forgotten() -> None:
    backport = torchspan.Backport("halve", "torch.halve", "torch", names={"halve": lambda: lambda x: x / 2})
    early = torchspan.register_backport(backport)
    with torchspan.activate() as environment:
        late = torchspan.register_shim("torch.utils.nothing_like_it", lambda: {"answer": 42})
        from torch.utils.nothing_like_it import answer

        assert answer == 42 and torch.halve(torch.ones(1)).item() == 0.5
        used = {decision.subject for decision in environment.report.decisions}
        assert used == {"torch.utils.nothing_like_it", "torch.halve"}
        with pytest.raises(InputError, match="there is a backport 'halve' already"):
            torchspan.register_backport(backport)
    early(), late()
    with torchspan.activate():
        assert not hasattr(torch, "halve")
        with pytest.raises(ImportError):
            importlib.import_module("torch.utils.nothing_like_it")


def test_a_shim_never_takes_the_place_of_a_real_module() -> None:
    forget = torchspan.register_shim("torch.utils.show_pickle", lambda: {"DumpUnpickler": None})
    with torchspan.activate():
        sys.modules.pop("torch.utils.show_pickle", None)
        assert importlib.import_module("torch.utils.show_pickle").DumpUnpickler is not None
    forget()
    with pytest.raises(InputError, match="'no module' is not a module name"):
        torchspan.register_shim("no module", dict)


def test_importing_auto_activates_as_the_variables_say(run_python) -> None:
    process = run_python(
        """
        import torchspan.auto
        import torch
        print(torch.zeros(1, device="cuda").device.type, hasattr(torch, "Precompile"))
        """,
        env={"TORCHSPAN_DISABLE": "precompile", "TORCHSPAN_DEVICE": "cpu"},
    )
    assert process.stdout == "cpu False\n"


def test_threads_that_activate_and_look_names_up_at_once_agree() -> None:
    def use(_: int) -> tuple[int, int]:
        return id(torchspan.activate()), id(torch.Precompile)

    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(use, range(64)))) == 1
    torchspan.deactivate()
    assert not hasattr(torch, "Precompile")


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ({"TORCHSPAN_DISABLE": "anotate"}, "did you mean 'annotate'?"),
        ({"TORCHSPAN_DEVICE": "cudaa"}, "device is 'cudaa'; expected"),
        ({"TORCHSPAN_BUDGET_SECONDS": "soon"}, "TORCHSPAN_BUDGET_SECONDS is 'soon'; expected a number"),
    ],
)
def test_a_variable_that_cannot_be_used_is_one_line_and_exit_code_2(run_python, variable: dict[str, str], message: str) -> None:
    process = run_python("import torch", env={"TORCHSPAN": "1", **variable}, expect=2)
    assert message in process.stderr and len(process.stderr.splitlines()) == 1
