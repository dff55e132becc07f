"""torch's private names that backports use, each imported when it is asked for: importing this imports no part of torch's compiler."""

from __future__ import annotations

from types import ModuleType
from typing import Any


def context_manager_variables() -> ModuleType:
    """Dynamo's classes for context managers that it does not trace into."""
    import torch._dynamo.variables.ctx_manager as module

    return module


def unsupported_by_dynamo(what: str, context: str, explanation: str) -> None:
    """Raise dynamo's own error for code that it cannot trace."""
    from torch._dynamo import exc

    exc.unimplemented_v2(gb_type=what, context=context, explanation=explanation, hints=[])


def constant_variable(value: Any) -> Any:
    """Dynamo's variable for a constant."""
    from torch._dynamo.variables import ConstantVariable

    return ConstantVariable.create(value)
