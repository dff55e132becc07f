"""``torch.fx.traceback.annotate`` and ``annotate_fn``: metadata for the nodes that are traced inside a block."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch.fx.traceback as fx_traceback
from torch.fx import GraphModule, Node

from torchspan.backports._base import Backport, Change
from torchspan.private import dynamo

_GRADIENT_SUM = "Gradient addition node due to multiple use of tensor around:"  # how AOTAutograd marks such a node


def annotate(annotation_dict: dict[str, Any]) -> _Annotation:
    """Give every node that is traced inside the block the entries of `annotation_dict` in ``node.meta["custom"]``.

    Blocks nest: entries are merged, the inner one wins, and the outer one's are there again after it. Nodes of the backward
    get the annotations of the forward nodes that they belong to. Without a trace the block does nothing. As a decorator it
    makes such a block of each call.
    """
    return _Annotation(annotation_dict)


class _Annotation:
    """A block, and a decorator: dynamo knows `annotate` alone, so a decorated function calls that."""

    def __init__(self, annotation_dict: dict[str, Any]) -> None:
        self._annotation_dict = annotation_dict
        self._blocks: list[AbstractContextManager[None]] = []

    def __enter__(self) -> None:
        self._blocks.append(_block(self._annotation_dict))
        self._blocks[-1].__enter__()

    def __exit__(self, *exception: Any) -> None:
        self._blocks.pop().__exit__(*exception)

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return annotate_fn(self._annotation_dict)(function)


@contextmanager
def _block(annotation_dict: dict[str, Any]) -> Iterator[None]:
    has_outer = "custom" in fx_traceback.current_meta
    outer = fx_traceback.current_meta.get("custom", {})
    fx_traceback.current_meta["custom"] = {**outer, **annotation_dict}
    try:
        yield
    finally:
        # looked up again: a trace inside may have put another dict in its place
        if has_outer:
            fx_traceback.current_meta["custom"] = outer
        else:
            fx_traceback.current_meta.pop("custom", None)


def annotate_fn(annotation_dict: dict[str, Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that runs a function inside ``annotate(annotation_dict)``."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            with annotate(annotation_dict):
                return function(*args, **kwargs)

        return wrapper

    return decorate


def _get_custom_metadata(gm: GraphModule) -> str:
    """The annotated nodes of a graph as text, one a line; those of a graph that it refers to are one line."""
    return "\n".join(map(str, _annotated_nodes(gm)))


def _annotated_nodes(gm: GraphModule) -> list[Any]:
    entries: list[Any] = []
    for node in gm.graph.nodes:
        if node.meta.get("custom"):
            entries.append((node.op, node.name, node.meta["custom"]))
        inner = getattr(gm, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(inner, GraphModule):
            entries.append(_annotated_nodes(inner))
    return entries


for _public in (annotate, annotate_fn, _get_custom_metadata):
    _public.__module__ = "torch.fx.traceback"  # where it is found, by pickle and by dynamo's guards


# dynamo: the block is entered while dynamo traces, so that the nodes which it creates are annotated


def _with_annotate(classes: dict[Any, None]) -> dict[Any, None]:
    """The context managers that dynamo handles itself, with annotate."""
    return {**classes, annotate: None}


def _variable_for_annotate(call_function: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo's handling of a call of a context-manager class, with annotate."""

    @functools.wraps(call_function)
    def handle(self: Any, tx: Any, args: Any, kwargs: Any) -> Any:
        if self.value is not annotate:
            return call_function(self, tx, args, kwargs)
        annotation = next(iter([*args, *kwargs.values()]))
        return _annotate_variable()(annotation.as_python_constant(), source=self.source)

    return handle


@functools.cache
def _annotate_variable() -> type:
    """The class of what ``annotate(…)`` is while dynamo traces."""

    class AnnotateVariable(dynamo.ContextWrappingVariable):
        def enter(self, tx: Any, *args: Any) -> Any:
            stack = ExitStack()
            stack.enter_context(_block(self.target_values))
            stack.enter_context(fx_traceback.preserve_node_meta())  # without it no tracer copies metadata
            self.set_cleanup_hook(tx, stack.close)
            return dynamo.ConstantVariable.create(None)

        def module_name(self) -> str:
            return "torch.fx.traceback"

        def fn_name(self) -> str:
            return "annotate"

        def reconstruct_type(self, codegen: Any) -> None:
            dynamo.refuse(
                "torch.fx.traceback.annotate escaped from compiled region",
                str(self),
                "Dynamo doesn't support graph break on torch.fx.traceback.annotate.",
            )

    return AnnotateVariable


# AOTAutograd: a backward node gets the annotations of the forward node that has its sequence number


def _copying_to_backward(create_graph: Callable[..., GraphModule]) -> Callable[..., GraphModule]:
    """AOTAutograd's trace of a joint graph, with annotations copied before dead nodes go (they may be the ones annotated)."""

    @functools.wraps(create_graph)
    def create(*args: Any, **kwargs: Any) -> GraphModule:
        graph = create_graph(*args, **kwargs)
        _copy_to_backward(graph)
        return graph

    return create


def _copy_to_backward(joint: GraphModule) -> None:
    for part in joint.modules():  # each by itself: old torch does not keep sequence numbers when it traces a called graph again
        if not isinstance(part, GraphModule):
            continue
        forward: dict[int, Node] = {}
        for node in part.graph.nodes:
            if "seq_nr" in node.meta and not _is_backward(node):
                forward.setdefault(node.meta["seq_nr"], node)  # later ones of that number made no autograd node
        for node in part.graph.nodes:
            source = forward.get(node.meta.get("seq_nr", -1))
            if source is not None and _is_backward(node) and _GRADIENT_SUM not in (node.stack_trace or ""):
                _merge_annotation(source, node)


def _merge_annotation(source: Node, target: Node) -> None:
    if "custom" in source.meta:
        target.meta["custom"] = {**target.meta.get("custom", {}), **copy.deepcopy(source.meta["custom"])}


def _is_backward(node: Node) -> bool:
    return node.meta.get("partitioner_tag") == "is_backward"


_CONTEXT_MANAGERS = "torch._dynamo.variables.torch"

BACKPORT = Backport(
    name="annotate",
    summary="metadata for the nodes traced inside a block: torch.fx.traceback.annotate and annotate_fn",
    target="torch.fx.traceback",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/163673",
    differs=(
        "views that functionalization replays carry the annotation of the node that asks for them, not of the first view; the "
        "backward of a graph that a higher-order operator calls is annotated only where it is part of the outer graph"
    ),
    names={
        "annotate": lambda: annotate,
        "annotate_fn": lambda: annotate_fn,
        "_get_custom_metadata": lambda: _get_custom_metadata,
    },
    also=(
        Change(_CONTEXT_MANAGERS, "supported_ctx_manager_classes", _with_annotate),
        Change(_CONTEXT_MANAGERS, "TorchCtxManagerClassVariable.call_function", _variable_for_annotate),
        Change("torch._functorch._aot_autograd.dispatch_and_compile_graph", "_create_graph", _copying_to_backward),
        Change("torch._functorch._aot_autograd.graph_capture", "_create_graph", _copying_to_backward),
    ),
)
