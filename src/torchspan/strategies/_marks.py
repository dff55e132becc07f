"""The mark that makes a module a region of its own, whatever model it becomes a part of."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import nn

from torchspan.core.errors import InputError

Module = TypeVar("Module", bound=nn.Module)
_MARK = "_torchspan_region"  # a plain attribute: copies and pickles of the module keep it, and need no torchspan


def region(module: Module) -> Module:
    """Mark `module` as a region that is compiled on its own wherever it is a part, and give it back.

    A model with marked modules is compiled in these regions (strategy ``regional``) and runs eagerly outside of them; marked
    modules of the same structure share one compile. A mark on the model itself, or inside another marked module, has no effect.
    To name regions without touching a model there is ``torchspan.compile(model, regions=["encoder.layers.*"])``. Operations
    that are annotated with ``torch.fx.traceback.annotate`` are regions of a captured graph, for the pass ``regional_inductor``.

    >>> from torch import nn
    >>> model = nn.Sequential(nn.Linear(4, 4), region(nn.Sequential(nn.Linear(4, 8), nn.GELU())))
    >>> is_marked(model[0]), is_marked(model[1])
    (False, True)
    """
    if not isinstance(module, nn.Module):
        raise InputError(f"a region is a module, not {type(module).__name__}")
    setattr(module, _MARK, True)
    return module


def is_marked(module: nn.Module) -> bool:
    """Whether `module` is marked as a region."""
    return vars(module).get(_MARK) is True


def has_marks(program: Any) -> bool:
    """Whether a module inside `program` is marked."""
    return isinstance(program, nn.Module) and any(is_marked(module) for module in program.modules() if module is not program)
