"""A graph as a Python file that a person can read, and from which a fresh process builds it again (see `_replay`).

A line is a node: its name, what it calls, with what, and what it gives. Weights, data and the model's code are not in it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator
from operator import attrgetter
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from torchspan.core.graph import Graph, output_node
from torchspan.passes._base import Pass, PassContext
from torchspan.passes._values import shown_value
from torchspan.private import distributed, fx

_HEAD = '''"""A graph on which the pass {name} failed, for 'torchspan passes --replay FILE'. To load this file is to run it.

{error}
"""

import torch

{imports}from torchspan.passes._replay import Recording

RECORDING = Recording(
    {written!r},
    error={error!r},
    torch={torch!r},
    strict={strict!r},
    kind={kind!r},
    notes={notes!r},
    rank={rank!r},
    groups={groups!r},  # the ranks of each process group
    report={report!r},
)
'''
_TAIL = """
if __name__ == "__main__":
    RECORDING.replay()
"""
_REGISTERED_BY = {  # operators that exist once a module is imported
    "torchspan.all_to_all_rows": "torchspan.parallel._all_to_all",
    "torchspan.grouped_rows_mm": "torchspan.models._grouped",
}
_NOT_WRITTEN = ("val", "tensor_meta", "stack_trace", "original_aten", "eager_input_vals", "seq_nr", "unbacked_bindings")
_NUM_VALUES = 64  # a constant of more elements is written by its shape alone


def written_failure(pass_: Pass, graph: Graph, error: Exception, context: PassContext) -> str:
    """The text of a file from which `pass_` is run again on `graph`."""
    called = {str(node.target).rpartition(".")[0] for node in graph.module.graph.nodes if node.op == "call_function"}
    imports = sorted({_REGISTERED_BY[name] for name in called & _REGISTERED_BY.keys()})
    head = _HEAD.format(
        name=pass_.name,
        error=str(error).replace("\\", "\\\\").replace('"""', "'''"),
        imports="".join(f"import {module}\n" for module in imports),
        written=str(pass_),
        torch=torch.__version__,
        strict=context.strict,
        kind=graph.kind,
        notes=graph.notes,
        rank=dist.get_rank() if dist.is_initialized() else 0,
        groups=groups_of(graph.module),
        report=[f"{d.subject} → {d.choice} ({d.reason})" for d in context.report.decisions],
    )
    return head + "".join(f"{line}\n" for line in _lines(graph)) + _TAIL


def groups_of(module: GraphModule) -> dict[str, list[int]]:
    """The ranks of each process group that a graph's collectives name, where there is one of that name here."""
    groups: dict[str, list[int]] = {}
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            for index, argument in enumerate(node.target._schema.arguments):
                name = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
                if argument.name in ("group", "group_name") and isinstance(name, str) and dist.is_initialized():
                    groups.setdefault(name, _ranks_of(name))
    return {name: ranks for name, ranks in groups.items() if ranks}


def _ranks_of(name: str) -> list[int]:

    group = distributed.find_group(name)
    return [] if group is None else dist.get_process_group_ranks(group)


def _lines(graph: Graph) -> Iterator[str]:
    yield from _symbols(graph.module)
    specs = iter(graph.inputs)
    for line, node in _graph_lines(graph.module, "RECORDING"):
        if node is not None and node.op == "placeholder":
            spec = next(specs)
            yield f"{line[:-1]}, kind={spec.kind!r}, stands_for={spec.name!r})"
        else:
            yield line
    outputs = "".join(
        f"\n    ({spec.kind!r}, {spec.name!r}, {_text(v)})," for spec, v in zip(graph.outputs, graph.output_values())
    )
    yield f"RECORDING.returns([{outputs}\n])"


def _graph_lines(module: GraphModule, writer: str) -> Iterator[tuple[str, Node | None]]:
    """A line a node, but for the output; where the metadata of what follows is another, a line that says so."""
    current: dict[str, Any] = {}
    yield from ((line, None) for line in _attributes(module, writer))
    for node in module.graph.nodes:
        if node.op == "output":
            continue
        meta = {key: value for key, value in node.meta.items() if key not in _NOT_WRITTEN and _is_literal(value)}
        if meta != current:
            current = meta
            yield f"\n{writer}.meta({', '.join(f'{key}={value!r}' for key, value in meta.items())})", None
        yield _line(node, writer), node


def _line(node: Node, writer: str) -> str:
    arguments = [_text(value) for value in node.args] + [f"{key}={_text(value)}" for key, value in node.kwargs.items()]
    extra = [f"gives={_value(node.meta['val'])}"] if "val" in node.meta else []
    if "seq_nr" in node.meta:
        extra.append(f"seq_nr={node.meta['seq_nr']!r}")
    if "unbacked_bindings" in node.meta:
        extra.append("finds_out=True")
    is_function = node.op == "call_function"
    target = _target(node.target) if is_function else str(node.target)
    code = ", ".join([repr(node.name), repr(target), *arguments, *extra])
    return f"{node.name} = {writer}.{'call' if is_function else node.op}({code})"


def _target(target: Any) -> str:
    """What a node calls, as text from which it is found again."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order.{target.name()}"
    return f"{target.__module__}:{target.__qualname__}"


def _text(value: Any) -> str:
    """An argument as Python."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, tuple):
        return f"({''.join(f'{_text(item)}, ' for item in value)})"
    if isinstance(value, list):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_text(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return f"slice({_text(value.start)}, {_text(value.stop)}, {_text(value.step)})"
    return repr(value)


def _value(value: Any) -> str:
    """An example value as Python: a text such as ``'f32[4, 16]'``, with strides and device where they are not the usual."""
    if isinstance(value, torch.Tensor):
        usual = torch.empty(value.shape, device="meta").stride() if _is_fixed(value) else value.stride()
        stride = f" stride {tuple(value.stride())}" if tuple(value.stride()) != tuple(usual) else ""
        device = f" on {value.device}" if value.device.type != "cpu" else ""
        return repr(f"{shown_value(value)}{stride}{device}")
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_value, value))}]"
    if isinstance(value, torch.SymInt):
        return repr(f"size {value}")
    return repr(value) if _is_literal(value) else "None"


def _is_fixed(value: torch.Tensor) -> bool:
    return all(type(size) is int for size in value.shape)


def _is_literal(value: Any) -> bool:
    try:
        return bool(ast.literal_eval(repr(value)) == value)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False


def _symbols(module: GraphModule) -> Iterator[str]:
    """A line for each symbol in the sizes of a graph, with what is known of its range."""

    bounds: dict[str, Any] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        for size in [*getattr(value, "shape", ()), value]:
            if isinstance(size, torch.SymInt):
                ranges = size.node.shape_env.var_to_range
                bounds |= {str(symbol): ranges.get(symbol) for symbol in fx.free_symbols(size)}
    for name, known in sorted(bounds.items(), key=lambda item: (len(item[0]), item[0])):
        least, most = (None, None) if known is None else map(_bound, (known.lower, known.upper))
        yield f"{name} = RECORDING.symbol({name!r}, least={least}, most={most})"


def _bound(value: Any) -> int | None:
    """A bound of a symbol's range as a number; None where it says nothing."""
    number = float(value)
    return int(value) if math.isfinite(number) and abs(number) < 2**62 else None


def _attributes(module: GraphModule, writer: str) -> Iterator[str]:
    """A line for each tensor and submodule that the graph takes from its module."""
    names = dict.fromkeys(str(node.target) for node in module.graph.nodes if node.op in ("get_attr", "call_module"))
    for name in names:
        held = attrgetter(name)(module)
        if isinstance(held, GraphModule):
            yield f"\nwith {writer}.submodule({name!r}) as SUBMODULE:"
            yield from (f"    {line}".replace("\n", "\n    ") for line, _ in _graph_lines(held, "SUBMODULE"))
            returned = map_arg(output_node(held.graph).args[0], lambda node: node)
            yield f"    SUBMODULE.output({_text(returned)})"
        elif isinstance(held, torch.Tensor):
            small = held.numel() <= _NUM_VALUES and not held.is_meta and not hasattr(held, "fake_mode")
            values = f", {held.tolist()!r}".replace("inf", "float('inf')").replace("nan", "float('nan')") if small else ""
            yield f"{writer}.constant({name!r}, {_value(held)}{values})"
        else:
            yield f"{writer}.opaque({name!r}, {type(held).__name__!r})"
