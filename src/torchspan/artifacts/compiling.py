"""A captured graph, compiled in this process by AOTAutograd and a compiler."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import GraphModule

from torchspan.private import aot, dynamo, fx, inductor


def compile_graph(module: GraphModule, inputs: tuple[Any, ...], context: Any, compiler: Callable[..., Any] | None) -> Any:
    """A callable of the graph's inputs: forward and backward by AOTAutograd, each compiled by `compiler` (None: inductor)."""
    config = aot.config
    # a backward that were compiled at its first call could add conditions on sizes when it is too late
    eager = {"force_non_lazy_backward_lowering": True} if "force_non_lazy_backward_lowering" in config.get_config_copy() else {}
    with compiling(context), config.patch(eager):
        return _compiled(module, inputs, compiler)


def _compiled(module: GraphModule, inputs: tuple[Any, ...], compiler: Callable[..., Any] | None) -> Any:
    if compiler is None:
        return inductor.compile_fx.compile_fx(copy_of(module), list(inputs))
    boxed = _boxing(compiler)
    return dynamo.aot_autograd(fw_compiler=boxed, bw_compiler=boxed)(copy_of(module), list(inputs))


def _boxing(compiler: Callable[..., Any]) -> Callable[..., Any]:
    """The compiler, whose functions take their inputs in one list and clear it: AOTAutograd calls those without a warning."""

    def compile_boxed(graph: GraphModule, example_inputs: Any) -> Any:
        compiled = compiler(graph, example_inputs)
        if getattr(compiled, "_boxed_call", False):
            return compiled

        def boxed(inputs: list[Any]) -> Any:
            arguments = tuple(inputs)
            inputs.clear()
            return compiled(*arguments)

        boxed._boxed_call = True  # type: ignore[attr-defined]
        return boxed

    return compile_boxed


def copy_of(module: GraphModule) -> GraphModule:
    """A copy whose graph a compiler may change; what the nodes refer to is shared."""
    copied = GraphModule(module, copy.deepcopy(module.graph))
    copied.meta.update(module.meta)
    return copied


@contextmanager
def compiling(context: Any) -> Iterator[None]:
    """What a compiler expects around it: the tracing context of the capture, and node metadata carried through traces."""
    from torch.fx.traceback import preserve_node_meta

    with fx.tracing(context), preserve_node_meta(), warnings.catch_warnings():
        # 2.13 deep-copies a pytree spec through a check that it deprecated itself
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        yield
