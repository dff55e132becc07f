"""compile_bounded: torch.compile that cannot hang, crash or eat the machine."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import torch

from torchspan.caches import ledger
from torchspan.core.errors import InputError, unknown_name
from torchspan.core.report import Report, current_report
from torchspan.jobs.budget import DEFAULT_BUDGET, Budget
from torchspan.regions.entry_point import torch_compile
from torchspan.regions.progress import is_wanted
from torchspan.regions.settings import Settings
from torchspan.strategies import _measured
from torchspan.strategies._base import REGISTRY, Request
from torchspan.strategies._ladder import ladder_for
from torchspan.strategies._plan import Conduct, Handback, Plan, Verify

Program = TypeVar("Program", bound=Callable[..., Any])


def compile_bounded(
    model: Program,
    *,
    budget: Budget | None = None,
    strategy: str | Sequence[str] = "auto",
    layer_indices: Sequence[int] | None = None,
    max_layers: int | None = None,
    regions: Sequence[str] = (),
    mode: str | None = None,
    fullgraph: bool = False,
    dynamic: bool | None = None,
    backend: str | Callable[..., Any] = "inductor",
    options: Mapping[str, Any] | None = None,
    wait: bool = False,
    progress: bool | None = None,
    verify: Verify = "first",
    handback: Handback = "auto",
    report: Report | None = None,
    recompile_limit: int | None = None,
    **extra: Any,
) -> Program:
    """`model` (a module or a function), compiled inside a `budget` while it already runs.

    The first calls run eagerly; a child process compiles meanwhile, and can be ended with everything that it started. When it
    is done, the next call takes its code over, checks it against eager once (``verify="first"``; ``"always"``, ``"off"``), and
    goes on compiled. Whatever goes wrong, the program goes on eagerly and the Report says what it was.

    `strategy` is ``auto`` (by size, unless something else was measured, as :func:`smart_compile` says), the name of one, or
    several names in the order in which they are tried; eager is always the last. ``whole`` compiles all of it as one region,
    ``per_block`` its repeated blocks: all, or those of `layer_indices` (numbers in the order of the model, from the end if
    negative), and of them the first `max_layers`; ``regional`` the modules that are marked with :func:`region`, which ``auto``
    goes by too, or named in `regions` (``*`` stands for anything); ``nested`` the whole as one region in which torch compiles
    equal blocks once (:func:`torch.compiler.nested_compile_region`, where this torch has it); ``selective`` profiles the second
    call, run eagerly, and compiles the parts that promise to pay. With `wait`, the first call waits for the compile
    (``selective``: the third), and `progress` shows its phase (dynamo, aot, inductor, c++), seconds and memory on standard
    error; by default where that is a terminal.

    `handback` says how the code comes here: as an ``artifact`` that loads without tracing, where the program is one that an
    artifact can hold, or through torch's ``caches``, where dynamo traces once more; ``auto`` takes an artifact for a whole
    program that is called without gradients.
    `recompile_limit` is how many input signatures and states of the program a region is compiled for, by default torch's own
    limit, at least 8.
    `mode`, `fullgraph`, `dynamic`, `backend`, `options` and `extra` are torch.compile's. With ``dynamic=None`` the first call's
    sizes are compiled as they are; when a call differs in sizes only, those that differ are compiled as symbols, once for all
    sizes (a Decision says which), in a child and within the budget like everything. A module comes back as a module of the
    same class that shares everything with `model` (state_dict keys, hooks, train and eval); ``_orig_mod`` is `model`, which
    itself stays as it is. ``report`` is what was decided and tried.

    With `fullgraph`, a program that breaks is a CaptureError that names the line, and no other strategy is tried. It is raised
    as soon as it is known: by the first call with `wait`, else by the first call after the compile process found it, and by
    every later one like it; the calls before that ran eagerly. Other failures of a compile are Attempts with `fullgraph` too.

    Random numbers are eager's own (inductor's option ``fallback_random``), so that a run does not depend on when it was
    swapped; ``options={"fallback_random": False}`` lets inductor draw its own.

    >>> doubled = compile_bounded(lambda x: x * 2, strategy="eager")
    >>> doubled(torch.ones(2)), [d.choice for d in doubled.report.decisions]
    (tensor([2., 2.]), ['eager', 'eager'])
    """
    if not callable(model):
        raise InputError(f"what is compiled is a module or a function, not {type(model).__name__}")
    if progress and not wait:
        raise InputError("progress=True shows a compile that calls wait for; it goes with wait=True")
    request = Request(layer_indices, max_layers, regions)
    strategy = _checked_strategy(strategy, request)
    _check_extra(extra)
    for name, value, choices in (("verify", verify, get_args(Verify)), ("handback", handback, get_args(Handback))):
        if value not in choices:
            raise InputError(f"{name}={value!r}; expected one of {', '.join(choices)}")
    if budget is not None and not isinstance(budget, Budget):
        raise InputError(f"budget is {budget!r}; expected a Budget, such as Budget(seconds=120, memory='4GiB')")
    program = _original(model)
    own_report = report or Report(parent=current_report())
    settings = Settings(backend, mode, _options(backend, options), fullgraph, dynamic, extra, recompile_limit)
    within = budget or DEFAULT_BUDGET
    ledger.limit_bytes()  # a setting that is no size is refused here, not in the compile process
    measured = _measured.recall(program, settings, within) if strategy == "auto" else ()
    ladder = ladder_for(strategy, program, has_budget=budget is not None, measured=measured)
    plan = Plan(
        program, ladder, within, settings, Conduct(verify, wait, wait and is_wanted(progress), handback, request), own_report
    )
    if isinstance(program, torch.nn.Module):
        return _bounded_module(program, plan)  # type: ignore[return-value]
    return _bounded_function(program, plan)  # type: ignore[return-value]


def report_of(compiled: Callable[..., Any]) -> Report:
    """The Report of what :func:`compile_bounded` gave, also where the program's own class has something called ``report``."""
    plan = getattr(compiled, "_torchspan_plan", None)
    if not isinstance(plan, Plan):
        raise InputError(f"{compiled!r} was not compiled by torchspan")
    return plan.report


def _checked_strategy(strategy: str | Sequence[str], request: Request) -> str | Sequence[str]:
    """The strategy to use: for ``auto`` the one that `request` needs, if it asks for something; raises if they disagree."""
    names = [strategy] if isinstance(strategy, str) else list(strategy)
    available = ["auto", *REGISTRY.names()] if isinstance(strategy, str) else REGISTRY.names()
    for name in names:
        if name not in available:
            raise unknown_name("strategy", name, available, f"there are: {', '.join(available)}")
    if not names:
        raise InputError("strategy is empty; expected a name, or names in the order in which they are tried")
    for argument, needed in request.asked.items():
        if strategy == "auto":
            strategy, names = needed, [needed]
        if needed not in names:
            raise InputError(f"{argument} is for strategy={needed!r}, not for {' or '.join(map(repr, names))}")
    return strategy


def _check_extra(extra: Mapping[str, Any]) -> None:
    """Raise now for an argument that this ``torch.compile`` lacks: in the compile process only a Report would say so."""
    parameters = inspect.signature(torch_compile()).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    accepted = {*parameters, *inspect.signature(compile_bounded).parameters} - {"model", "extra"}
    for name in extra:
        if name not in accepted:
            raise unknown_name(
                "argument", name, sorted(accepted), f"torch.compile of torch {torch.__version__} has none of that name"
            )


def _options(backend: str | Callable[..., Any], options: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {"fallback_random": True, **(options or {})} if backend == "inductor" else dict(options or {})


def _original(program: Callable[..., Any]) -> Callable[..., Any]:
    """`program`, or, if it is bounded already, the program that it was made from."""
    plan = getattr(program, "_torchspan_plan", None)
    return plan.program if isinstance(plan, Plan) else program


# modules


def _bounded_module(module: torch.nn.Module, plan: Plan) -> torch.nn.Module:
    """Another module of `module`'s class that shares its ``__dict__`` (so all its state) and is called through `plan`."""
    own = type(module)
    names: dict[str, Any] = {
        "__new__": lambda cls, *args, **kwargs: own(*args, **kwargs),  # type(self)(...) makes a module that is not compiled
        "_torchspan_plan": plan,
        "_orig_mod": property(lambda self: module),
        "__call__": _call_module,
        "__reduce_ex__": lambda self, protocol: (_same, (module,)),
        "__copy__": lambda self: copy.copy(module),
        "__deepcopy__": _copy_module,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    if not hasattr(module, "report"):
        names["report"] = property(lambda self: plan.report)
    bounded: torch.nn.Module = object.__new__(_class_below(own, names))
    object.__setattr__(bounded, "__dict__", module.__dict__)
    plan.stand_in(bounded)
    _end_with(bounded, plan)
    return bounded


def _end_with(bounded: Callable[..., Any], plan: Plan) -> None:
    """Have the compiles of `plan` end when `bounded` is deleted, or with the process."""
    weakref.finalize(bounded, _end_plan, weakref.ref(plan))


def _end_plan(plan: weakref.ref[Plan]) -> None:
    if (live_plan := plan()) is not None:
        live_plan.end("the compiled program was deleted")


def _class_below(own: type, names: dict[str, Any]) -> type:
    """A subclass of `own`, made without its ``__init_subclass__``, metaclass or registry, which may refuse one."""
    cls = type(own.__name__, (torch.nn.Module,), names)
    cls.__bases__ = (own,)
    return cls


def _is_traced_here() -> bool:
    """Whether a tracer runs the program in this thread; ``is_compiling`` alone is true in all threads."""
    return torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0


def _call_module(self: Any, *args: Any, **kwargs: Any) -> Any:
    if torch.compiler.is_dynamo_compiling() or _is_traced_here():
        return self._orig_mod(*args, **kwargs)  # a part of an outer compile
    return self._torchspan_plan.call(args, kwargs)


def _copy_module(self: Any, memo: dict[int, Any]) -> torch.nn.Module:
    """A deep copy is compiled again, by itself: what was compiled belongs to the original."""
    original = copy.deepcopy(self._orig_mod, memo)
    return _bounded_module(original, self._torchspan_plan.for_program(original))


def _same(program: Callable[..., Any]) -> Callable[..., Any]:
    return program


# functions


class _Caller:
    """Calls a function through its plan; in another process it is the plain function."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() or _is_traced_here():
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
    _end_with(bounded, plan)
    return bounded
