"""What goes wrong before, around or after a compile is an Attempt in the Report; the program has eager's results."""

from __future__ import annotations

import copy
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import torchspan
from torchspan.core.numerics import difference
from torchspan.jobs.budget import Budget
from torchspan.jobs.supervisor import Job, run_bounded
from torchspan.regions import verify
from torchspan.regions.backward import TWICE
from torchspan.regions.signature import signature
from torchspan.regions.watch import finish_compiles
from torchspan.strategies import report_of

Wait = Callable[..., None]
SOON = Budget(seconds=300, memory="6GiB")


def whole(program: Any, **arguments: Any) -> Any:
    return torchspan.compile(program, strategy="whole", budget=SOON, **{"backend": "eager", **arguments})


def is_swapped(program: Any) -> bool:
    return "swap_stall_s" in report_of(program).figures


# second derivatives


def test_a_gradient_penalty_goes_on_after_the_swap_and_later_calls_are_eager(until: Wait) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    eager, compiled = copy.deepcopy(model), whole(model, backend="aot_eager")

    def step(run: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
        run.zero_grad()
        (slope,) = torch.autograd.grad(run(x).sum(), x, create_graph=True)
        slope.norm().backward()
        return [parameter.grad for parameter in run.parameters()]

    def both() -> None:
        x = torch.randn(4, 8, requires_grad=True)
        assert difference(step(compiled, x), step(eager, x)) is None

    until(lambda: is_swapped(compiled), both)
    for _ in range(3):
        both()
    assert [(attempt.outcome, attempt.cause) for attempt in compiled.report.attempts] == [("compiled", None), ("failed", TWICE)]
    assert compiled.report.decisions[-1].reason == TWICE
    assert type(compiled(torch.randn(4, 8, requires_grad=True)).grad_fn).__name__ == "AddmmBackward0"


# arguments


class Raises:
    """An object that raises in whatever is asked of it."""

    def __getattribute__(self, name: str) -> Any:
        raise RuntimeError("leave me alone")


class Unhashable(dict[Any, Any]):
    """A mapping that cannot be walked through."""

    def __iter__(self) -> Iterator[Any]:
        raise ValueError("not to be iterated")


class Refuses(torch.Tensor):
    """A tensor whose every operation raises."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise TypeError("no operations")


def a_cycle() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


UNREADABLE: dict[str, Callable[[], Any]] = {
    "a nested tensor": lambda: torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)]),
    "an object that raises": Raises,
    "a mapping that raises": lambda: Unhashable(a=1),
    "a tensor that raises": lambda: torch.ones(2).as_subclass(Refuses),
    "a list that holds itself": a_cycle,
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("name", UNREADABLE)
def test_an_argument_that_cannot_be_read_is_an_attempt_and_an_eager_call(name: str) -> None:
    argument = UNREADABLE[name]()
    compiled = whole(lambda value: value)
    assert compiled(argument) is argument and compiled(argument) is argument
    [attempt] = compiled.report.attempts
    assert (attempt.outcome, attempt.where) == ("failed", "reading the arguments")
    [decision] = [decision for decision in compiled.report.decisions if decision.reason.startswith("reading the arguments")]
    assert decision.choice == "eager" and decision.count == 2


class Colour(str, Enum):
    RED = "red"


class Odd(str):
    """Text that is equal to nothing, and cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise ValueError("never equal")


def test_values_of_any_class_can_be_told_apart() -> None:
    def of(*args: Any) -> Any:
        return signature(None, args, {})

    assert of(float("nan")) == of(float("nan")) and of(0.0) != of(-0.0) and of(1) != of(True)
    assert of(Odd("a")) == of(Odd("a")) != of(Odd("b"))
    assert of({Colour.RED: 1}) == of({Colour.RED: 1}) != of({None: 1})
    assert of(torch.eye(2).to_sparse()) == of(torch.eye(2).to_sparse())


# classes


class Registered(nn.Linear):
    """A class that takes no second one of a name, nor one that does not say what it is."""

    known: ClassVar[dict[str, type]] = {}

    def __init_subclass__(cls, *, kind: str) -> None:
        if cls.__name__ in Registered.known:
            raise TypeError(f"there is a {cls.__name__}")
        Registered.known[cls.__name__] = cls


class Concrete(Registered, kind="concrete"):
    def like(self) -> Concrete:
        return type(self)(self.in_features, self.out_features)


class Final(type):
    def __new__(mcs, name: str, bases: tuple[type, ...], names: dict[str, Any]) -> Any:
        if any(isinstance(base, Final) for base in bases):
            raise TypeError("final")
        return super().__new__(mcs, name, bases, names)


class Sealed(nn.Linear, metaclass=Final):
    pass


@pytest.mark.parametrize("own", [Concrete, Sealed])
def test_a_class_that_refuses_others_below_it_is_compiled(own: type[nn.Linear], until: Wait) -> None:
    model, x = own(8, 8), torch.randn(4, 8)
    compiled = whole(model)
    assert isinstance(compiled, own) and compiled._orig_mod is model and list(Registered.known) == ["Concrete"]
    until(lambda: is_swapped(compiled), lambda: compiled(x))
    assert torch.equal(compiled(x), model(x)) and type(copy.copy(compiled)) is type(copy.deepcopy(model)) is own


def test_another_module_of_the_class_of_a_compiled_one_is_not_compiled() -> None:
    compiled = whole(Concrete(8, 8))
    other = compiled.like()
    assert type(other) is Concrete and other.weight is not compiled.weight
    assert not torch.equal(other(torch.ones(1, 8)), compiled(torch.ones(1, 8)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_hooks_of_the_root_get_the_module_that_is_listed_and_fire_once_a_call(backend: str, until: Wait) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8)
    compiled = whole(model, backend=backend)
    modules: list[Any] = []
    gradients: list[int] = []
    compiled.register_forward_hook(lambda module, args, output: modules.append(module))
    compiled[0].weight.register_hook(lambda gradient: gradients.append(1))
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        compiled(x).sum().backward()

    until(lambda: is_swapped(compiled), step)
    for _ in range(3):
        step()
    assert len(modules) == len(gradients) == calls
    assert all(module is dict(compiled.named_modules())[""] for module in modules)
    assert "which would be called too often" in str([decision.reason for decision in compiled.report.decisions])


NOTED: list[int] = []
COUNT = 0


class Notes(nn.Module):
    """A forward that notes its calls outside of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        global COUNT
        COUNT += 1
        NOTED.append(len(NOTED))
        return self.layer(x)


def test_what_a_check_does_is_not_seen_outside(until: Wait) -> None:
    norm, listed, x = nn.BatchNorm1d(8), [], torch.randn(4, 8)
    counts = {"calls": 0}

    def closure(x: torch.Tensor) -> torch.Tensor:
        counts["calls"] += 1
        listed.append(x.shape)
        return norm(x)

    compiled, noting = whole(closure), whole(Notes())
    calls = 0

    def step() -> None:
        nonlocal calls
        calls += 1
        compiled(x)
        noting(x)

    until(lambda: bool(compiled.report.attempts) and bool(noting.report.attempts), step)
    for _ in range(3):
        step()
    assert counts["calls"] == len(listed) == int(norm.num_batches_tracked) == calls
    assert len(NOTED) == COUNT == calls


# checks that do not run


@pytest.mark.parametrize("where", ["_mismatch", "copied"])
def test_a_check_that_did_not_run_twice_is_not_tried_again(where: str, until: Wait, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def no_memory(*args: Any, **kwargs: Any) -> Any:
        tried.append(1)
        raise MemoryError("nothing left")

    monkeypatch.setattr(verify, where, no_memory)
    compiled, x = whole(nn.Linear(8, 8)), torch.randn(4, 8)
    until(lambda: len(compiled.report.attempts) == 2, lambda: compiled(x))
    for _ in range(3):
        compiled(x)
    assert len(tried) == 2
    last = compiled.report.attempts[-1]
    assert (last.outcome, last.where) == ("failed", "checking")
    assert last.cause == "the check did not run, 2 times: MemoryError: nothing left"


# the process


def no_thread(self: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@pytest.mark.parametrize(
    ("owner", "name", "value", "cause"),
    [
        (threading.Thread, "start", no_thread, "RuntimeError: can't start new thread"),
        (tempfile, "tempdir", "/proc/none", "FileNotFoundError"),
    ],
)
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_process_in_which_nothing_can_be_started_has_an_attempt(
    owner: Any, name: str, value: Any, cause: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    model, x = nn.Linear(8, 8), torch.ones(4, 8)
    compiled = whole(model)
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, value)
        assert torch.equal(compiled(x), model(x))
        finish_compiles()
    assert torch.equal(compiled(x), model(x))
    [attempt] = compiled.report.attempts
    assert attempt.outcome == "failed" and cause in (attempt.cause or "")
    assert "Traceback" not in capfd.readouterr().err


def test_without_an_interpreter_a_job_fails_and_odd_arguments_of_the_program_do_not_matter(
    monkeypatch: pytest.MonkeyPatch, until: Wait
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", None)
        ending = run_bounded(Job("torchspan.regions.worker:call_function", b"", fresh=True), Budget(seconds=60))
    assert ending.outcome == "failed" and ending.where == "starting the job", ending
    monkeypatch.setattr(sys, "argv", [Path("x")])
    compiled = whole(nn.Linear(8, 8))
    until(lambda: bool(compiled.report.attempts), lambda: compiled(torch.ones(4, 8)))
    assert [attempt.outcome for attempt in compiled.report.attempts] == ["compiled"]
