"""Where a node comes from: the path of the module that made it, on forward and on backward nodes.

Written under ``node.meta["custom"]``, which every torch copies on its own from the tracing state: ``module`` is the path of the
innermost module, ``phase`` is ``backward`` for what autograd did.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, traceback

from torchspan.core.graph import PHASE

MODULE = "module"


@contextmanager
def stamped_with_module_paths(module: nn.Module) -> Iterator[None]:
    """While this is open, what `module` computes under a trace is stamped with the path of the submodule that did it."""
    with ExitStack() as stack:
        for path, submodule in module.named_modules():
            stack.enter_context(_stamped(submodule, path))
        yield


@contextmanager
def _stamped(submodule: nn.Module, path: str) -> Iterator[None]:
    saved: list[Any] = []

    def enter(*_: object) -> None:
        saved.append(_custom())
        _set_custom({**(saved[-1] or {}), MODULE: path})

    def leave(*_: object) -> None:
        _set_custom(saved.pop())

    # always_call: an exception in forward must not leave the stamp of this module on what comes after
    handles = [
        submodule.register_forward_pre_hook(enter, prepend=True),
        submodule.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def stamped_as_backward() -> Iterator[None]:
    """While this is open, nodes are stamped as backward."""
    before = _custom()
    _set_custom({PHASE: "backward"})
    try:
        yield
    finally:
        _set_custom(before)


def _custom() -> Any:
    return traceback.get_current_meta().get("custom")


def _set_custom(value: Any) -> None:
    meta: dict[str, Any] = traceback.get_current_meta()
    if value is None:
        meta.pop("custom", None)
    else:
        meta["custom"] = value


def copy_origins_to_backward(module: GraphModule) -> None:
    """Give each backward node what its forward node carries; autograd's sequence numbers say which belongs to which.

    Of FlexAttention they do not: a compiler of its own traces the forward. Its backward takes what its forward gave.
    """
    forward: dict[int, dict[str, Any]] = {}
    for node in module.graph.nodes:
        custom = node.meta.get("custom", {})
        if node.op != "placeholder" and custom.get(PHASE) != "backward" and "seq_nr" in node.meta:
            forward.setdefault(node.meta["seq_nr"], custom)
    for node in module.graph.nodes:
        if node.meta.get("custom", {}).get(PHASE) == "backward":
            node.meta["custom"] = {**forward.get(node.meta.get("seq_nr", -1), {}), PHASE: "backward"}
    for node in module.graph.nodes:
        if node.op == "call_function" and str(node.target) == "flex_attention_backward":
            for backward_node in (node, *node.users):
                backward_node.meta["custom"] = {**_maker_of(node.args[3]).meta.get("custom", {}), PHASE: "backward"}


def _maker_of(result: Any) -> torch.fx.Node:
    """The node of FlexAttention that gave `result`, of which detaches may stand between."""
    assert isinstance(result, torch.fx.Node), f"{result!r} is no result of FlexAttention"
    while str(result.target) != "flex_attention":
        (result,) = result.all_input_nodes
    return result
