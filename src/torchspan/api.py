"""The verbs that put torchspan in force: they compose what the folders below provide, and decide nothing.

What they call is imported when they are called: importing this module imports no torch.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from torchspan.core.activation import Activation
from torchspan.core.collector import collecting_later
from torchspan.core.errors import InputError, unknown_name
from torchspan.core.logs import show_logs
from torchspan.core.report import Report, current_report
from torchspan.core.text import split_names

if TYPE_CHECKING:
    from types import ModuleType

    from torchspan.backports._base import Backport
    from torchspan.environment.patch import Patch
    from torchspan.environment.scope import Environment
    from torchspan.jobs.budget import Budget

_lock = threading.RLock()
_environment: Environment | None = None


def activate(
    device: str = "auto",
    *,
    masquerade: bool = False,
    backports: bool = True,
    compile: Literal["off", "bounded"] = "off",
    budget: Budget | None = None,
    disable: Iterable[str] = (),
) -> Environment:
    """Make torch look like what programs for other torches and other devices expect; a context manager undoes it.

    Args:
        device: ``auto`` gives the device that was asked for where it is here, else the best accelerator, else the CPU;
            a device such as ``cpu`` gives that one; ``strict`` makes each redirection an error that names file and line;
            ``torchdevice`` gives the accelerator to what asks for the CPU too (see :func:`torchspan.keep_cpu`), and the CPU to
            ``cpu:-1``; ``cuda-semantics`` raises on the CPU what CUDA raises; ``off`` leaves devices alone.
        masquerade: whether a tensor answers the program (``x.is_cuda``, ``x.device``) as if it were on the device that it
            asked for; torch's own code is always told the truth.
        backports: whether names that this torch lacks are provided.
        compile: ``bounded`` makes ``torch.compile`` compile in a child process within a budget while the program runs eagerly.
        budget: what one bounded compile may spend; None is torchspan's default.
        disable: names of backports and device rules to leave out.

    Returns:
        The Environment; its ``report`` lists every use of a backport and every redirection. Calling this again with the same
        arguments returns the one that is in force; with others, replaces it.

    Raises:
        InputError: an unknown device, or a name in `disable` that nothing answers to.

    >>> with activate() as environment:
    ...     environment.is_active
    True
    """
    global _environment
    from torchspan.environment.mps import fall_back_on_mps

    fall_back_on_mps()
    import torch  # noqa: F401 - first: it calls autoload, which may do what is asked for here

    activation = Activation(device, masquerade, backports, compile, *_text_of(budget), ",".join(sorted(disable)))
    settings = activation.to_environ()
    with _lock, collecting_later():
        if _environment is not None and _environment.is_active:
            if _environment.settings == settings:
                return _environment
            _environment.deactivate()
        report = Report(current_report())
        patches = _patches(activation, budget, report)
        from torchspan.environment.scope import Environment

        _environment = Environment(patches, report, settings).activate()
        return _environment


def deactivate() -> None:
    """Put torch back as it was before `activate`: every object that was replaced is there again."""
    with _lock:
        if _environment is not None:
            _environment.deactivate()


def register_backport(backport: Backport) -> Callable[[], None]:
    """Provide names of your own choice where torch lacks them, in this process; at once if torchspan is active.

    Args:
        backport: what is missing where, and what builds it; see :class:`torchspan.Backport`.

    Returns:
        A function that forgets it, from the next activation on.

    Raises:
        InputError: a backport of that name is there already.

    >>> import torch, torchspan
    >>> forget = torchspan.register_backport(
    ...     torchspan.Backport(
    ...         "clip_to_one", "torch.clip_to_one", "torch", names={"clip_to_one": lambda: lambda x: x.clamp(0, 1)}
    ...     )
    ... )
    >>> with torchspan.activate():
    ...     torch.clip_to_one(torch.tensor([0.5, 2.0]))
    tensor([0.5000, 1.0000])
    >>> forget()
    """
    from torchspan.backports._base import register

    with _lock:
        forget = register(backport)
        environment = _environment
        if environment is not None and environment.settings["TORCHSPAN_BACKPORTS"] == "1":
            is_disabled = backport.name in split_names(environment.settings["TORCHSPAN_DISABLE"])
            environment.extend([] if is_disabled else backport.patches())
    return forget


def register_shim(module_name: str, factory: Callable[[], ModuleType | Mapping[str, object]]) -> Callable[[], None]:
    """Provide the module `module_name` where nothing else does, in this process; at once if torchspan is active.

    Args:
        module_name: its dotted name, such as ``torch.some.missing.module``; the packages above it must be there.
        factory: gives the module, or its names, when it is first imported; a real module of that name always wins.

    Returns:
        A function that forgets it, from the next activation on.

    Raises:
        InputError: something is registered for `module_name` already, or it is no dotted name.

    >>> import torchspan
    >>> forget = torchspan.register_shim("torch.utils.greeting", lambda: {"greet": lambda name: f"hello {name}"})
    >>> with torchspan.activate():
    ...     from torch.utils.greeting import greet
    ...
    ...     greet("world")
    'hello world'
    >>> forget()
    """
    from torchspan.backports._base import Shim

    if not all(part.isidentifier() for part in module_name.split(".")):
        raise InputError(f"{module_name!r} is not a module name; expected a dotted name, such as torch.some.module")
    return register_backport(Shim(module_name, f"the module {module_name}", module_name, is_module=True, factory=factory))


def autoload() -> None:
    """Activate as the environment variables say.

    They are ``TORCHSPAN_DEVICE``, ``_MASQUERADE``, ``_BACKPORTS``, ``_COMPILE``, ``_BUDGET_…`` and ``_DISABLE``. torch
    calls this at the end of ``import torch``, through its entry-point group, when ``TORCHSPAN`` is set.
    """
    show_logs(os.environ.get("TORCHSPAN_LOG", ""))
    activation = Activation.from_environ(os.environ)
    environment = activate(
        activation.device,
        masquerade=activation.masquerade,
        backports=activation.backports,
        compile="bounded" if activation.compile == "bounded" else "off",
        budget=_budget_of(activation),
        disable=split_names(activation.disable),
    )
    if os.environ.get("TORCHSPAN_REPORT_PARTS"):  # the process that started this one makes a page of what both do
        from torchspan.report import write_part

        write_part(environment.report)


def _text_of(budget: Budget | None) -> tuple[str | None, str | None]:
    if budget is None:
        return None, None
    return str(budget.seconds), "" if budget.limit_bytes is None else str(budget.limit_bytes)


def _budget_of(activation: Activation) -> Budget | None:
    seconds, memory = activation.budget_seconds, activation.budget_memory
    if seconds is None and memory is None:
        return None
    from torchspan.jobs.budget import DEFAULT_BUDGET, Budget

    try:
        return Budget(float(seconds or DEFAULT_BUDGET.seconds), DEFAULT_BUDGET.memory if memory is None else memory or None)
    except ValueError as cause:
        raise InputError(f"TORCHSPAN_BUDGET_SECONDS is {seconds!r}; expected a number of seconds, such as 120") from cause


def _patches(activation: Activation, budget: Budget | None, report: Report) -> list[Patch]:
    import torch

    from torchspan.backports._base import backport_names, backport_patches
    from torchspan.scan import advice_patches, setting_patches

    disabled = frozenset(split_names(activation.disable))
    patches: list[Patch] = advice_patches()
    known = {"advice", "settings", *backport_names()}
    if activation.device != "off":
        from torchspan.devices._base import REGISTRY as RULES
        from torchspan.devices._base import device_patches
        from torchspan.environment.facts import gather

        known |= set(RULES.names())
        patches += device_patches(gather(has_tools=False), activation.device, report, masquerade=activation.masquerade)
    for name in disabled - known:
        raise unknown_name("backport or device rule", name, known, "'torchspan doctor' lists them")
    if activation.backports:
        patches += [*backport_patches(), *setting_patches(torch.__version__)]
    patches = [patch for patch in patches if patch.owner not in disabled]
    is_followed = any(patch.owner == "semantics" for patch in patches)  # compiled code is not followed
    if activation.compile == "bounded" and not is_followed:
        from torchspan.strategies import torch_compile_patch

        patches.append(torch_compile_patch(budget=budget))
    return patches
