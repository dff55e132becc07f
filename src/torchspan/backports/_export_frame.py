"""A frame as dynamo's export sees it: captured without running it, and without changes to what it was given."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch

from torchspan.private import dynamo, fx


@dataclass(frozen=True)
class Captured:
    """What dynamo made of a frame: the bytecode, which calls the graph's `module` by `graph_name`, and how it was traced."""

    code: CodeType
    module: torch.fx.GraphModule
    graph_name: str
    fake_mode: Any
    tensor_to_context: Any

    def tracing_context(self) -> Any:
        """A context to trace the graph further in."""
        context = fx.TracingContext(self.fake_mode)
        context.tensor_to_context = self.tensor_to_context
        return context


def capture_frame(frame: Any, constraints: Sequence[Any] | None) -> Captured | None:
    """What dynamo makes of a `frame`, without running it; None where it finds no work on tensors."""
    seen: dict[str, Any] = {}

    def backend(module: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        context = fx.TracingContext.get()
        seen.update(module=module, fake_mode=context.fake_mode, tensor_to_context=context.tensor_to_context)
        return module.forward

    # inside, programs that ask whether they are being compiled or exported are told so
    with dynamo.config.patch(automatic_dynamic_shapes=False), fx._compiling_state_context():
        guarded = dynamo.convert_frame(frame, backend, lambda guards: [False] * len(guards), constraints)
    if guarded is None or not seen:
        return None
    graph_name = next(name for name in guarded.code.co_names if name.startswith("__compiled_fn"))
    return Captured(code=guarded.code, graph_name=graph_name, **seen)


@contextmanager
def without_outside_changes(changed: list[str]) -> Iterator[None]:
    """Inside, bytecode that dynamo writes in this thread changes no Python object that the program was given.

    The sources of those that the program itself changes are added to `changed`.
    """
    effects, mutation_of_new = dynamo.SideEffects, dynamo.AttributeMutationNew
    original, hooks, thread = effects.codegen_update_mutated, effects.codegen_hooks, threading.get_ident()

    def write(self: Any, cg: Any, *args: Any, **kwargs: Any) -> None:
        if threading.get_ident() != thread:
            return original(self, cg, *args, **kwargs)
        modified = self._get_modified_vars()
        new = [variable for variable in modified if isinstance(variable.mutation_type, mutation_of_new)]
        names = (dynamo.source_name(variable.source) for variable in modified if variable not in new)
        changed.extend(name for name in names if name not in changed)
        self._get_modified_vars = lambda: new
        try:
            return original(self, cg, *args, **kwargs)
        finally:
            del self._get_modified_vars

    effects.codegen_update_mutated = write
    effects.codegen_hooks = lambda self, cg: None if threading.get_ident() == thread else hooks(self, cg)
    try:
        yield
    finally:
        effects.codegen_update_mutated, effects.codegen_hooks = original, hooks


def check_example_inputs(leaves: Sequence[Any]) -> None:
    """Raise dynamo's error for a user's mistake unless each is something that a graph can take."""
    symbols = (torch.SymInt, torch.SymFloat, torch.SymBool)
    allowed = (torch.Tensor, *symbols, torch._C.ScriptObject, *dynamo.common_constant_types)
    for leaf in leaves:
        if leaf is not None and not isinstance(leaf, allowed):
            raise dynamo.UserError(
                dynamo.UserErrorType.INVALID_INPUT,
                f"an example argument holds a {type(leaf).__name__}, which is not supported; expected tensors, numbers, "
                "strings and None, also in containers; register other classes with torch.utils._pytree.register_pytree_node",
            )
