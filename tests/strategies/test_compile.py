"""torch.compile in a budget: eager from the first call, compiled when a child has done the work, whatever the compiler does."""

from __future__ import annotations

import copy
import ctypes
import os
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchspan.core.errors import InputError, UnknownNameError
from torchspan.core.numerics import difference
from torchspan.core.report import Report
from torchspan.environment.scope import Environment
from torchspan.jobs.budget import Budget
from torchspan.strategies import compile_bounded, report_of, torch_compile_patch

Wait = Callable[..., None]
pytestmark = pytest.mark.filterwarnings(
    "ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"  # torch 2.13, when inductor is imported
)
SOON = Budget(seconds=120, memory="6GiB")


# backends that a user might have; they travel to the child by value, as this file is no module that it could import


def as_it_is(graph: Any, inputs: Any) -> Any:
    return graph.forward


def sleeps(graph: Any, inputs: Any) -> Any:
    time.sleep(1000)


def spins(graph: Any, inputs: Any) -> Any:
    ctypes.PyDLL(None).sleep(1000)


def allocates(graph: Any, inputs: Any) -> Any:
    pages = []
    while True:
        pages.append(b"1" * (1 << 24))


def crashes(graph: Any, inputs: Any) -> Any:
    ctypes.string_at(0)


def aborts(graph: Any, inputs: Any) -> Any:
    os.abort()


def leaves(graph: Any, inputs: Any) -> Any:
    os._exit(5)


def raises(graph: Any, inputs: Any) -> Any:
    raise RuntimeError("lowering failed")


def orphans(graph: Any, inputs: Any) -> Any:
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            time.sleep(1000)
        os._exit(0)
    return graph.forward


def is_wrong(graph: Any, inputs: Any) -> Any:
    def call(*args: Any) -> Any:
        return tuple(output * 1.01 for output in graph.forward(*args))

    return call


def takes_small_graphs(graph: Any, inputs: Any) -> Any:
    if sum(node.op == "call_function" for node in graph.graph.nodes) > 10:
        raise RuntimeError("too large")
    return graph.forward


@pytest.mark.parametrize(
    ("backend", "budget", "outcome", "cause", "where"),
    [
        (sleeps, Budget(seconds=4), "timeout", "not done after", "in sleeps"),
        (spins, Budget(seconds=4), "timeout", "not done after", "in spins"),
        (allocates, Budget(seconds=60, memory="2GiB"), "memory", "of 2.0 GiB", "in allocates"),
        (crashes, SOON, "crashed", "SIGSEGV", "in crashes"),
        (aborts, SOON, "crashed", "SIGABRT", "in aborts"),
        (leaves, SOON, "crashed", "exited with code 5", None),
        (raises, SOON, "failed", "lowering failed", "in raises"),
    ],
)
def test_a_backend_that_fails_is_reported_and_the_program_goes_on_eagerly(
    backend: Any, budget: Budget, outcome: str, cause: str, where: str | None, until: Wait, nothing_left: Callable[[], None]
) -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    expected = model(x)
    compiled = compile_bounded(model, backend=backend, strategy="whole", budget=budget)
    slowest = 0.0

    def step() -> None:
        nonlocal slowest
        started = time.perf_counter()
        assert torch.equal(compiled(x), expected)
        slowest = max(slowest, time.perf_counter() - started)

    step()
    assert compiled.report.figures["first_step_wait_s"] < 1.0
    until(lambda: bool(compiled.report.attempts), step)
    (attempt,) = compiled.report.attempts
    assert (attempt.outcome, attempt.strategy, attempt.backend) == (outcome, "whole", backend.__name__)
    assert cause in (attempt.cause or "") and (where is None or where in (attempt.where or ""))
    assert attempt.seconds <= budget.seconds + 1.0
    assert slowest < 1.0
    step()
    nothing_left()


@pytest.mark.once
def test_a_backend_that_leaves_an_orphan_compiles_and_the_orphan_ends(until: Wait, nothing_left: Callable[[], None]) -> None:
    compiled = compile_bounded(nn.Linear(8, 8), backend=orphans, strategy="whole", verify="off")
    compiled(torch.randn(4, 8))
    until(lambda: bool(compiled.report.attempts))
    assert compiled.report.attempts[0].outcome == "compiled"
    nothing_left()


def test_wrong_numbers_are_noticed_and_never_reach_the_program(until: Wait, caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    expected = model(x)
    compiled = compile_bounded(model, backend=is_wrong, strategy="whole")
    until(lambda: len(compiled.report.attempts) == 2, lambda: torch.testing.assert_close(compiled(x), expected, rtol=0, atol=0))
    assert [attempt.outcome for attempt in compiled.report.attempts] == ["compiled", "failed"]
    assert "compiled code gives other results than eager: output" in (compiled.report.attempts[1].cause or "")
    assert "runs eagerly: compiled code gives other results" in caplog.text


class WithState(nn.Module):
    """A model that draws random numbers, keeps statistics, and counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(0.5)
        self.num_calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.num_calls += 1
        return self.dropout(self.norm(self.first(x)))


def test_verification_leaves_no_trace_in_buffers_gradients_attributes_or_random_numbers(until: Wait) -> None:
    torch.manual_seed(0)
    plain = WithState()
    compiled = compile_bounded(copy.deepcopy(plain), backend=as_it_is, strategy="whole", fullgraph=False)
    x = torch.randn(4, 8)

    def run(model: nn.Module, num_steps: int) -> list[torch.Tensor]:
        losses = []
        for _ in range(num_steps):
            loss = model(x).square().mean()
            loss.backward()
            losses.append(loss.detach())
        return losses

    torch.manual_seed(1)
    outputs = run(compiled, 2)
    until(lambda: bool(compiled.report.attempts))
    outputs += run(compiled, 3)
    assert "swap_stall_s" in compiled.report.figures
    torch.manual_seed(1)
    assert torch.equal(torch.stack(outputs), torch.stack(run(plain, 5)))
    for name, value in plain.state_dict().items():
        assert torch.equal(compiled.state_dict()[name], value), name
    for actual, other in zip(compiled.parameters(), plain.parameters(), strict=True):
        assert torch.equal(actual.grad, other.grad)
    assert compiled.num_calls == plain.num_calls == 5


def _train(model: nn.Module, num_steps: int, x: torch.Tensor) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(num_steps):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize(
    ("strategy", "region", "handback"),
    [("whole", "Stack", "artifact"), ("whole", "Stack", "caches"), ("per_block", "Block ×3", "caches")],
)
def test_training_goes_on_compiled_with_eagers_numbers(
    strategy: str, region: str, handback: Any, stack: Callable[..., nn.Module], until: Wait, nothing_left: Callable[[], None]
) -> None:
    reference, model, x = stack(dropout=0.1), stack(dropout=0.1), torch.randn(8, 16)
    compiled = compile_bounded(model, strategy=strategy, budget=SOON, handback=handback)
    assert isinstance(compiled, type(model)) and type(compiled).__name__ == "Stack"
    assert list(compiled.state_dict()) == list(reference.state_dict())
    torch.manual_seed(3)
    losses = _train(compiled, 2, x)
    until(lambda: bool(compiled.report.attempts))
    losses += _train(compiled, 6, x)
    torch.manual_seed(3)
    expected = _train(reference, 2, x) + _train(reference, 6, x)
    report = compiled.report
    assert [(a.strategy, a.region, a.outcome, a.cause) for a in report.attempts] == [(strategy, region, "compiled", None)]
    assert (report.attempts[0].peak_bytes or 0) > 100 << 20
    assert {"caches", "artifact"} & {decision.choice for decision in report.decisions} == {handback}
    assert "compiled again" not in [decision.choice for decision in report.decisions]
    assert report.figures["first_step_wait_s"] < 1.0 and report.figures["swap_stall_s"] < 30
    assert difference(losses, expected, torch.float32) is None
    assert difference(dict(compiled.state_dict()), dict(reference.state_dict())) is None
    nothing_left()


@pytest.mark.once
def test_the_compile_process_needs_no_second_compile_of_an_equal_block(
    stack: Callable[..., nn.Module], until: Wait, cache: Path
) -> None:
    """One child, one forward graph, however deep the model is."""
    compiled = compile_bounded(stack(num_blocks=12).eval(), strategy="per_block", budget=SOON)
    x = torch.randn(8, 16)
    with torch.no_grad():
        expected = compiled._orig_mod(x)
        until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
        assert difference(compiled(x), expected) is None
    assert [attempt.region for attempt in compiled.report.attempts] == ["Block ×12"]
    assert len(list((cache / "aotautograd").iterdir())) == 1


def test_a_program_that_fails_as_a_whole_is_compiled_by_block(stack: Callable[..., nn.Module], until: Wait) -> None:
    compiled = compile_bounded(stack(), backend=takes_small_graphs, budget=SOON)
    x = torch.randn(8, 16)
    expected = compiled._orig_mod(x)
    until(lambda: len(compiled.report.attempts) == 2, lambda: compiled(x))
    whole, blocks = compiled.report.attempts
    assert (whole.strategy, whole.outcome) == ("whole", "failed") and "too large" in (whole.cause or "")
    assert (blocks.strategy, blocks.region, blocks.outcome) == ("per_block", "Block ×3", "compiled")
    assert torch.equal(compiled(x), expected)
    assert compiled.report.decisions[0].choice == "whole → per_block → eager"


@pytest.mark.once
def test_the_last_rung_is_eager_and_nothing_is_left_of_a_spent_budget(stack: Callable[..., nn.Module], until: Wait) -> None:
    compiled = compile_bounded(stack(), backend=sleeps, budget=Budget(seconds=5))
    x = torch.randn(8, 16)
    until(lambda: len(compiled.report.attempts) == 2, lambda: compiled(x))
    assert [attempt.outcome for attempt in compiled.report.attempts] == ["timeout", "timeout"]
    assert sum(attempt.seconds for attempt in compiled.report.attempts) < 5 + 1
    assert compiled.report.decisions[-1].choice == "eager"


def test_a_new_shape_runs_eagerly_and_is_compiled_meanwhile(until: Wait) -> None:
    compiled = compile_bounded(nn.Linear(8, 8), backend=as_it_is, strategy="whole")
    for count, rows in ((1, 4), (2, 5)):
        x = torch.randn(rows, 8)
        until(lambda count=count: len(compiled.report.attempts) == count, lambda x=x: compiled(x))
        assert torch.equal(compiled(x), compiled._orig_mod(x))


@pytest.mark.once
@pytest.mark.parametrize("handback", ["artifact", "caches"])
def test_a_change_of_the_programs_own_state_is_compiled_again(handback: Any, until: Wait) -> None:
    class Switch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * self.factor).relu()

    compiled = compile_bounded(Switch(), strategy="whole", budget=SOON, handback=handback)
    x = torch.randn(4)
    until(lambda: "swap_stall_s" in compiled.report.figures, lambda: compiled(x))
    compiled.factor = 3
    assert torch.equal(compiled(x), (x * 3).relu())
    assert torch.equal(compiled(x), (x * 3).relu())
    until(lambda: len(compiled.report.attempts) == 2, lambda: compiled(x))
    assert [attempt.outcome for attempt in compiled.report.attempts] == ["compiled", "compiled"]
    assert "compiled again" in [decision.choice for decision in compiled.report.decisions]
    assert torch.equal(compiled(x), (x * 3).relu())


def test_a_function_is_compiled_and_waits_if_asked_to() -> None:
    def scaled(x: torch.Tensor, *, factor: float = 1.0) -> dict[str, torch.Tensor]:
        return {"scaled": x * factor}

    compiled = compile_bounded(scaled, backend=as_it_is, wait=True)
    x = torch.ones(3)
    assert torch.equal(compiled(x, factor=2.0)["scaled"], x * 2)
    assert compiled.__name__ == "scaled" and compiled.report is report_of(compiled)
    assert [attempt.outcome for attempt in compiled.report.attempts] == ["compiled"], compiled.report.attempts
    assert "swap_stall_s" in compiled.report.figures


@pytest.mark.once
def test_many_threads_may_call_while_it_is_swapped(until: Wait) -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    expected = model(x).detach()
    compiled = compile_bounded(model, strategy="whole", budget=SOON, handback="caches")
    wrong: list[str] = []
    stop = threading.Event()

    def call() -> None:
        with torch.no_grad():
            while not stop.is_set():
                problem = difference(compiled(x), expected)
                wrong.extend([problem] if problem else [])
                time.sleep(0.005)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: "swap_stall_s" in compiled.report.figures)
        time.sleep(0.5)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert wrong == [] and [attempt.outcome for attempt in compiled.report.attempts] == ["compiled"]


@pytest.mark.once
def test_a_program_with_a_graph_break_comes_back_through_the_caches(until: Wait) -> None:
    def broken(x: torch.Tensor) -> torch.Tensor:
        y = x.sin() * 2
        torch._dynamo.graph_break()
        return y.cos() + 1

    import torch._dynamo

    compiled = compile_bounded(broken, budget=SOON, handback="artifact")
    x = torch.randn(8)
    until(lambda: "swap_stall_s" in compiled.report.figures, lambda: compiled(x))
    assert difference(compiled(x), broken(x)) is None
    (caches,) = [decision for decision in compiled.report.decisions if decision.choice == "caches"]
    assert caches.reason.startswith("no artifact: ")


def test_without_a_cpp_compiler_the_cause_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, until: Wait) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    compiled = compile_bounded(nn.Linear(8, 8), strategy="whole", budget=SOON)
    x = torch.randn(4, 8)
    until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
    assert "no C++ compiler: inductor looked for g++" in (compiled.report.attempts[0].cause or "")
    assert torch.equal(compiled(x), compiled._orig_mod(x))


def test_a_program_that_cannot_be_sent_runs_eagerly_and_says_why() -> None:
    lock = threading.Lock()

    def locked(x: torch.Tensor) -> torch.Tensor:
        with lock:
            return x + 1

    compiled = compile_bounded(locked)
    assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 2.0))
    (attempt,) = compiled.report.attempts
    assert attempt.outcome == "failed" and "cannot be sent to the compile process" in (attempt.cause or "")


def test_a_compiled_module_shares_its_state_and_can_be_copied_pickled_and_put_into_others() -> None:
    model = nn.Linear(4, 4)
    compiled = compile_bounded(model, strategy="eager")
    assert compiled._orig_mod is model and compiled.weight is model.weight and isinstance(compiled, nn.Linear)
    compiled.eval()
    assert not model.training
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    outer = nn.Sequential(compiled)
    x = torch.ones(1, 4)
    assert torch.equal(outer(x), model(x)) and len(calls) == 2
    assert list(outer.state_dict()) == ["0.weight", "0.bias"]
    copied = copy.deepcopy(compiled)
    assert copied.weight is not model.weight and torch.equal(copied(x), model(x))
    model._forward_hooks.clear()
    assert type(pickle.loads(pickle.dumps(compiled))) is nn.Linear
    assert compile_bounded(compiled, strategy="eager")._orig_mod is model


@pytest.mark.once
def test_the_original_module_stays_eager(stack: Callable[..., nn.Module], until: Wait) -> None:
    model, x = stack().eval(), torch.randn(2, 16)
    compiled = compile_bounded(model, strategy="per_block", backend=is_wrong, verify="off")
    with torch.no_grad():
        expected = model(x)
        until(lambda: bool(compiled.report.attempts), lambda: compiled(x))
        assert not torch.equal(compiled(x), expected)
        assert torch.equal(model(x), expected)


@pytest.mark.once
def test_activation_checkpointing_of_compiled_blocks_agrees_with_its_forward(
    stack: Callable[..., nn.Module], until: Wait
) -> None:
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = stack()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for part in self.inner.parts:
                x = checkpoint(part, x, use_reentrant=False)
            return x

    model = Checkpointed()
    compiled = compile_bounded(model, strategy="per_block", budget=SOON)
    x = torch.randn(8, 16)
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.inner.parts.parameters()]

    def step() -> None:
        model.zero_grad()
        compiled(x).sum().backward()

    until(lambda: "swap_stall_s" in compiled.report.figures, step)
    step()
    assert difference([p.grad for p in model.inner.parts.parameters()], expected) is None


def test_a_program_that_checkpoints_inside_is_compiled_as_a_whole(stack: Callable[..., nn.Module], until: Wait) -> None:
    from torch.utils.checkpoint import checkpoint

    inner, x = stack(), torch.randn(8, 16)

    def program(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(inner, x.sin(), use_reentrant=False).sum()

    def gradients(run: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor | None]:
        inner.zero_grad()
        run(x).backward()
        return [p.grad for p in inner.parameters()]

    expected = gradients(program)
    compiled = compile_bounded(program, strategy="whole", budget=SOON)
    until(lambda: bool(compiled.report.attempts), lambda: gradients(compiled))
    assert [attempt.outcome for attempt in compiled.report.attempts] == ["compiled"], compiled.report.attempts
    assert difference(gradients(compiled), expected) is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"strategy": "per_blok"}, UnknownNameError, "no strategy 'per_blok'; did you mean 'per_block'"),
        ({"verify": "sometimes"}, InputError, "verify='sometimes'; expected one of first, off, always"),
        ({"handback": "mail"}, InputError, "handback='mail'; expected one of auto, artifact, caches"),
        ({"budget": 120}, InputError, "budget is 120; expected a Budget"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        compile_bounded(nn.Linear(2, 2), **arguments)


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(InputError, match="a module or a function, not int"):
        compile_bounded(3)  # type: ignore[type-var]


# in the place of torch.compile


def test_every_form_of_torch_compile_is_bounded_and_undone() -> None:
    original = torch.compile
    with Environment([torch_compile_patch()]) as environment:

        @torch.compile
        def bare(x: torch.Tensor) -> torch.Tensor:
            return x + 1

        @torch.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        def called(x: torch.Tensor) -> torch.Tensor:
            return x + 2

        class Model(nn.Module):
            @torch.compile(backend="aot_eager")
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x + 3

        module = torch.compile(nn.Linear(2, 2), backend="aot_eager")
        inner = nn.Linear(2, 2)
        inner.compile(backend="aot_eager")
        disabled = torch.compile(lambda x: x + 4, disable=True)
        reports = [report_of(function) for function in (bare, called, module, Model.forward)]
        assert all(isinstance(report, Report) for report in reports)
        assert [report_of(inner._compiled_call_impl).decisions[0].subject] == ["Module._call_impl"]
        x = torch.zeros(2)
        assert [function(x)[0].item() for function in (bare, called, Model(), disabled)] == [1, 2, 3, 4]
        assert torch.equal(module(x), module._orig_mod(x)) and torch.equal(inner(x), inner._call_impl(x))
        assert "compile" in {decision.topic for decision in environment.report.decisions}
    assert torch.compile is original


@pytest.mark.once
def test_torchs_own_use_of_torch_compile_is_left_alone() -> None:
    with Environment([torch_compile_patch()]):
        names: dict[str, Any] = {"__name__": "torch.somewhere", "torch": torch}
        exec("def compiled(f):\n    return torch.compile(f, backend='eager')\n", names)
        inner = names["compiled"](lambda x: x + 1)
        with pytest.raises(InputError, match="was not compiled by torchspan"):
            report_of(inner)


@pytest.mark.once
def test_a_script_is_never_run_again_by_the_compile_process(run_python: Callable[..., Any], tmp_path: Path) -> None:
    process = run_python(
        """
        import os, torch
        from torchspan.strategies import compile_bounded
        from torchspan.jobs.budget import Budget
        print("started", flush=True)
        SHIFT = 3
        def helper(x):
            return torch.relu(x) + SHIFT
        class Model(torch.nn.Module):
            def forward(self, x):
                return helper(x) * 2
        model = compile_bounded(Model(), backend="aot_eager", wait=True, budget=Budget(seconds=200))
        print(model(torch.ones(2)).tolist(), [a.outcome for a in model.report.attempts])
        """,
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout.split("\n") == ["started", "[8.0, 8.0] ['compiled']", ""]
