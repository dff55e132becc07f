"""One frame traced by dynamo, without running it."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torchspan.capture._reads import Note, absences_guarded, reads_noted
from torchspan.private import dynamo


def trace_frame(frame: Any, backend: Any, keep_guards: Any, note: Note) -> Any:
    """What dynamo makes of a `frame`: its ``GuardedCode`` (bytecode and guard manager), or None where it found no tensor work.

    Nothing of the frame is run. `backend` gets the graph and its example inputs, `keep_guards` every guard with its value, and
    `note` what dynamo should guard on and does not: where, a kind of guard, the value, and what that kind takes besides.
    Shapes are static unless marked; module hooks are guarded on.
    """
    config = dynamo.config
    ignored = "ignore_logging_functions" if hasattr(config, "ignore_logging_functions") else "ignore_logger_methods"
    settings = {
        "allow_rnn": True,
        "trace_autograd_ops": True,
        ignored: _logging_functions(),
        "assume_static_by_default": True,
        "automatic_dynamic_shapes": False,
        "specialize_float": True,
        "specialize_int": True,
        "guard_nn_modules": True,
        "skip_nnmodule_hook_guards": False,
        # not to be skipped because a dict is the same dict: requires_grad of a parameter may have changed
        "guard_nn_modules_using_dict_tags": False,
        "skip_tensor_guards_with_matching_dict_tags": False,
        "use_recursive_dict_tags_for_guards": False,
        "skip_no_tensor_aliasing_guards_on_parameters": False,
    }
    known = {name: value for name, value in settings.items() if hasattr(config, name)}
    with config.patch(known), _errors_told_once(), reads_noted(note), absences_guarded():
        return dynamo.convert_frame(frame, backend, keep_guards)


@contextmanager
def _errors_told_once() -> Iterator[None]:
    """dynamo logs an error of a guard or of a fake tensor with its stack, and raises it as well: the second is enough."""
    loggers = [logging.getLogger(name) for name in ("torch._guards", "torch._subclasses.fake_tensor", "torch._dynamo.utils")]
    thread = threading.get_ident()

    def is_of_others(record: logging.LogRecord) -> bool:
        return record.thread != thread

    for logger in loggers:
        logger.addFilter(is_of_others)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(is_of_others)


def _logging_functions() -> set[Any]:
    """What writes into a log: left out of what is captured, which computes the same without."""
    names = ("debug", "info", "warn", "error", "exception", "critical", "fatal", "log")
    places = (vars(logging.Logger), vars(logging))  # also what others add there, such as Transformers' warning_once
    members = {value for held in places for name, value in held.items() if name.startswith(names) and callable(value)}
    return {*(value for value in members if not isinstance(value, type)), warnings.warn}
