"""compile_bounded: torch.compile that cannot hang, crash or eat the machine."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, get_args

import torch

from torchspan.core.errors import InputError, unknown_name
from torchspan.core.report import Report, current_report
from torchspan.strategies._base import REGISTRY
from torchspan.strategies._budget import DEFAULT_BUDGET, Budget
from torchspan.strategies._ladder import ladder_for
from torchspan.strategies._plan import Conduct, Handback, Plan, Verify
from torchspan.strategies._settings import Settings

Program = TypeVar("Program", bound=Callable[..., Any])


def compile_bounded(
    model: Program,
    *,
    budget: Budget | None = None,
    strategy: str = "auto",
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    backend: str | Callable[..., Any] = "inductor",
    options: Mapping[str, Any] | None = None,
    wait: bool = False,
    verify: Verify = "first",
    handback: Handback = "auto",
    report: Report | None = None,
    **extra: Any,
) -> Program:
    """`model` (a module or a function), compiled inside a `budget` while it already runs.

    The first calls run eagerly; a child process compiles meanwhile, and can be ended with everything that it started. When it
    is done, the next call takes its code over, checks it against eager once (``verify="first"``; ``"always"``, ``"off"``), and
    goes on compiled. Whatever goes wrong, the program goes on eagerly and the Report says what it was.

    `strategy` is ``auto`` (by size), ``whole``, ``per_block`` or ``eager``. With `wait`, the first call waits for the compile.
    `handback` says how the code comes here: as an ``artifact`` that loads without tracing, where the program is one that an
    artifact can hold, or through torch's ``caches``, where dynamo traces once more; ``auto`` decides by region.
    `mode`, `fullgraph`, `dynamic`, `backend`, `options` and `extra` are torch.compile's. A module comes back as a module of the
    same class that shares everything with `model` (state_dict keys, hooks, train and eval); ``_orig_mod`` is `model`, which
    itself stays as it is. ``report`` is what was decided and tried.

    Random numbers are eager's own (inductor's option ``fallback_random``), so that a run does not depend on when it was
    swapped; ``options={"fallback_random": False}`` lets inductor draw its own.

    >>> doubled = compile_bounded(lambda x: x * 2, strategy="eager")
    >>> doubled(torch.ones(2)), [d.choice for d in doubled.report.decisions]
    (tensor([2., 2.]), ['eager', 'eager'])
    """
    if not callable(model):
        raise InputError(f"what is compiled is a module or a function, not {type(model).__name__}")
    if strategy != "auto" and strategy not in REGISTRY.names():
        raise unknown_name(
            "strategy", strategy, ["auto", *REGISTRY.names()], f"there are: {', '.join(['auto', *REGISTRY.names()])}"
        )
    for name, value, choices in (("verify", verify, get_args(Verify)), ("handback", handback, get_args(Handback))):
        if value not in choices:
            raise InputError(f"{name}={value!r}; expected one of {', '.join(choices)}")
    if budget is not None and not isinstance(budget, Budget):
        raise InputError(f"budget is {budget!r}; expected a Budget, such as Budget(seconds=120, memory='4GiB')")
    program = _original(model)
    own_report = report or Report(parent=current_report())
    settings = Settings(backend, mode, _options(backend, options), fullgraph, dynamic, extra)
    ladder = ladder_for(strategy, program, has_budget=budget is not None)
    plan = Plan(program, ladder, budget or DEFAULT_BUDGET, settings, Conduct(verify, wait, handback), own_report)
    if isinstance(program, torch.nn.Module):
        return _bounded_module(program, plan)  # type: ignore[return-value]
    return _bounded_function(program, plan)  # type: ignore[return-value]


def report_of(compiled: Callable[..., Any]) -> Report:
    """The Report of what :func:`compile_bounded` gave, also where the program's own class has something called ``report``."""
    plan = getattr(compiled, "_torchspan_plan", None)
    if not isinstance(plan, Plan):
        raise InputError(f"{compiled!r} was not compiled by torchspan")
    return plan.report


def _options(backend: str | Callable[..., Any], options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {"fallback_random": True, **(options or {})} if backend == "inductor" else dict(options or {})


def _original(program: Callable[..., Any]) -> Callable[..., Any]:
    """What was given, or what it was made from if it is bounded already."""
    plan = getattr(program, "_torchspan_plan", None)
    return plan.program if isinstance(plan, Plan) else program


# modules


def _bounded_module(module: torch.nn.Module, plan: Plan) -> torch.nn.Module:
    """Another module of `module`'s class that shares its ``__dict__`` (so all its state) and is called through `plan`."""
    own = type(module)
    names: dict[str, Any] = {
        "_torchspan_plan": plan,
        "_orig_mod": property(lambda self: module),
        "__call__": _call_module,
        "__reduce_ex__": lambda self, protocol: (_same, (module,)),
        "__deepcopy__": _copy_module,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    if not hasattr(module, "report"):
        names["report"] = property(lambda self: plan.report)
    bounded: torch.nn.Module = object.__new__(type(own.__name__, (own,), names))
    object.__setattr__(bounded, "__dict__", module.__dict__)
    return bounded


def _call_module(self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_compiling():
        return self._orig_mod(*args, **kwargs)  # an outer compile takes it in
    return self._torchspan_plan.call(args, kwargs)


def _copy_module(self: Any, memo: dict[int, Any]) -> torch.nn.Module:
    """A deep copy is compiled again, by itself: what was compiled belongs to the original."""
    original = copy.deepcopy(self._orig_mod, memo)
    return _bounded_module(original, self._torchspan_plan.for_program(original))


def _same(program: Callable[..., Any]) -> Callable[..., Any]:
    return program


# functions


class _Caller:
    """The plan behind a function; in another process it is the function itself, which is compiled there or not at all."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.plan.program(*args, **kwargs)
        return self.plan.call(args, kwargs)

    def __reduce__(self) -> Any:
        return _same, (self.plan.program,)


def _bounded_function(function: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    caller = _Caller(plan)

    def bounded(*args: Any, **kwargs: Any) -> Any:
        return caller(*args, **kwargs)

    functools.update_wrapper(bounded, function, updated=())
    for name, value in (("_torchspan_plan", plan), ("report", plan.report)):
        setattr(bounded, name, value)
    return bounded
