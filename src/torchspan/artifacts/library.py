"""A graph of operators, compiled into a native library."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.fx import GraphModule, Node

from torchspan.artifacts.compiling import copy_of
from torchspan.artifacts.shapes import Shapes
from torchspan.artifacts.size_conditions import Expression, encode_size, is_size
from torchspan.core.errors import UnsupportedError
from torchspan.core.memory import blank_storage
from torchspan.private import inductor


def compile_library(module: GraphModule, options: Mapping[str, Any], shapes: Shapes) -> tuple[bytes, bytes | None, list[str]]:
    """A shared library that computes a graph, the description of operators that it calls by name, if any, and symbols.

    Everything that the graph takes is an input; nothing of the values of weights goes into it. It takes for each of the symbols
    that it needs an empty tensor of that size, then its tensors in order.
    """
    module, needed = _with_sizes_from_tensors(module, shapes)
    values = [node.meta["val"] for node in module.graph.nodes if node.op == "placeholder"]
    inputs = tuple(values if needed else map(_example, values))
    there = inductor.config.get_config_copy()
    known = {name: value for name, value in options.items() if name in there}
    with TemporaryDirectory(prefix="torchspan-") as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)` is deprecated", category=FutureWarning)
        path = str(Path(folder) / "library.so")
        output = inductor.aot_compile(copy_of(module), inputs, options={**known, "aot_inductor.output_path": path})
        library = Path(str(output))
        described = next(Path(folder).glob("*.wrapper.json"), None)  # beside the code, and named as that is
        return library.read_bytes(), None if described is None else described.read_bytes(), needed


def _with_sizes_from_tensors(module: GraphModule, shapes: Shapes) -> tuple[GraphModule, list[str]]:
    """The same graph without numbers among its inputs: it has them from the sizes of empty tensors, one for each symbol."""
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    needed = sorted(set().union(*(_symbols_in(node.meta["val"]) for node in placeholders)))
    if not needed:
        return module, []
    graph = torch.fx.Graph()
    size_inputs = [graph.placeholder(f"size_{name}") for name in needed]  # first: sizes of later inputs may be made of them
    new = {node: graph.node_copy(node) for node in placeholders if not is_size(node.meta["val"])}
    numbers: dict[str, Node] = {}
    for name, place in zip(needed, size_inputs):
        with shapes.context.fake_mode:
            place.meta["val"] = torch.empty(shapes.symbols[name], 0)
        numbers[name] = graph.call_function(torch.ops.aten.sym_size.int, (place, 0))
    for node in placeholders:
        if is_size(node.meta["val"]):
            new[node] = Expression.of(encode_size(node.meta["val"])["size"]).node(graph, numbers)
    for node in module.graph.nodes:
        if node.op != "placeholder":
            new[node] = graph.node_copy(node, new.__getitem__)
    result = GraphModule(module, graph)
    result.meta.update(module.meta)
    return result, needed


def _symbols_in(value: Any) -> set[str]:
    numbers = [*value.shape, *value.stride()] if isinstance(value, torch.Tensor) else [value]
    return {str(symbol) for number in numbers if is_size(number) for symbol in number.node.expr.free_symbols}


def _example(value: Any) -> torch.Tensor:
    """A real tensor of the shape, strides, dtype and device that a fake one has."""
    if not isinstance(value, torch.Tensor):
        raise UnsupportedError(f"an artifact's graphs take tensors, not {type(value).__name__} ({value})")
    if not value.numel():
        return torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=value.device)
    last = sum((size - 1) * stride for size, stride in zip(value.size(), value.stride(), strict=True))
    storage = blank_storage((last + 1) * value.element_size())
    return torch.empty(0, dtype=value.dtype).set_(storage, 0, value.size(), value.stride())
