"""The graphs of operators that AOTAutograd makes of a program, and what its runtime would have to do around them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from torchspan.artifacts.compiling import compiling, copy_of
from torchspan.artifacts.size_conditions import is_size
from torchspan.core.errors import UnsupportedError
from torchspan.core.graph import output_node
from torchspan.private import aot, fx, inductor

_RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")


@dataclass(frozen=True)
class Output:
    """One output of the program: how AOTAutograd sees it, of which base, and whether gradients flow to it."""

    kind: str
    base: int | None
    requires_grad: bool


@dataclass(frozen=True)
class Lowered:
    """Operator graphs of a program: `forward`, and `backward` when it trains, with what has to happen around them.

    The forward gives new values for the inputs at `mutated`, then `outputs`, then `num_bases` tensors of which outputs are
    views, then what the backward needs.
    """

    forward: GraphModule
    backward: GraphModule | None
    mutated: tuple[int, ...]
    outputs: tuple[Output, ...]
    num_bases: int


def lower_graph(module: GraphModule, inputs: tuple[Any, ...], context: Any, decompose: bool) -> Lowered:
    """The operator graphs that AOTAutograd makes of a graph, as inductor would get them if `decompose`.

    Raises:
        UnsupportedError: the program needs something at run time that is not carried; names it.
    """
    seen: dict[str, Any] = {}

    def partition(joint: GraphModule, joint_inputs: Any, **settings: Any) -> tuple[GraphModule, GraphModule]:
        _draw_once(joint)
        seen["forward"], seen["backward"] = aot.min_cut_rematerialization_partition(joint, joint_inputs, **settings)
        return seen["forward"], seen["backward"]

    def keep(gm: GraphModule, example_inputs: Any) -> Any:
        seen.setdefault("forward", gm)
        seen.setdefault("metadata", fx.TracingContext.get().fw_metadata)
        return gm.forward

    module = copy_of(module)
    _take_contiguous(module)
    with compiling(context), inductor.config.patch(fallback_random=True), _recurrent_as_eager():
        table: Any = {
            **(inductor.select_decomp_table() if decompose else {}),
            torch.ops.aten.bernoulli.p: _bernoulli_in_memory_order,
        }
        aot.aot_module_simplified(
            module,
            list(inputs),
            fw_compiler=keep,
            bw_compiler=keep,
            inference_compiler=keep,
            partition_fn=partition,
            decompositions=table,
        )
    metadata, forward, backward = seen["metadata"], seen["forward"], seen.get("backward")
    _refuse_uncarried(metadata, forward, len(inputs))
    places = {number: place for place, number in enumerate(i for i, value in enumerate(inputs) if not is_size(value))}
    outputs = tuple(
        Output(info.output_type.name, _place(places, info), bool(info.requires_grad)) for info in metadata.output_info
    )
    mutated = tuple(places[index] for index in metadata.mutated_inp_runtime_indices)
    num_given = len(mutated) + len(outputs) + metadata.num_intermediate_bases
    _keep_outputs(forward, lambda index, value: index < num_given or not is_size(_value(value)))
    if backward is not None:
        _keep_outputs(backward, lambda index, _: index in places)
    return Lowered(forward, backward, mutated, outputs, metadata.num_intermediate_bases)


def _draw_once(joint: GraphModule) -> None:
    """Have what is random saved, and not drawn again in the backward, where ``checkpoint`` says to compute again."""
    from torch.utils.checkpoint import CheckpointPolicy

    for node in joint.graph.nodes:
        if "recompute" in node.meta and torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            is_one = isinstance(node.meta["val"], torch.Tensor)
            del node.meta["recompute"]
            for value in [node] if is_one else node.users:
                value.meta["recompute"] = CheckpointPolicy.MUST_SAVE


def _bernoulli_in_memory_order(value: torch.Tensor, p: float = 0.5, *, generator: Any = None) -> Any:
    """Random numbers in the order in which the memory of `value` lies, as ``bernoulli_`` draws them; else made functional, it
    draws them in the order of the indices."""
    strides = value.stride()
    order = sorted(range(value.dim()), key=lambda dim: -strides[dim])
    if order == list(range(value.dim())) or any(map(is_size, strides)):
        return NotImplemented
    drawn = torch.ops.aten.bernoulli.p(value.permute(order).contiguous(), p, generator=generator)
    return drawn.permute([order.index(dim) for dim in range(value.dim())])


def _take_contiguous(module: GraphModule) -> None:
    """Have ``torch.bernoulli(value, p)``, which is no ``bernoulli_`` and draws in the order of indices, do so."""
    for node in list(module.graph.nodes):
        if node.target is torch.bernoulli and len(node.args) + ("p" in node.kwargs) > 1:
            with module.graph.inserting_before(node):
                node.update_arg(0, module.graph.call_method("contiguous", (node.args[0],)))


@contextmanager
def _recurrent_as_eager() -> Iterator[None]:
    """Recurrent operators are taken apart as eager does: torch's table (up to 2.15) leaves out dropout between layers."""
    keys = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)
    packets = [getattr(torch.ops.aten, name) for name in _RECURRENT]
    operators = [getattr(packet, name) for packet in packets for name in packet.overloads()]
    kept = [
        (operator, key, operator.py_kernels.pop(key)) for operator in operators for key in keys if key in operator.py_kernels
    ]
    for operator in operators:
        operator._dispatch_cache.clear()
    try:
        yield
    finally:
        for operator, key, kernel in kept:
            operator.py_kernels[key] = kernel
            operator._dispatch_cache.clear()


def _place(places: Mapping[int, int], info: Any) -> int | None:
    """The base of an output; of those that are inputs, where it stands among the tensors."""
    of_input = info.output_type.name in ("is_input", "alias_of_input")
    return places[info.base_idx] if of_input else info.base_idx


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, torch.fx.Node) else node


def _keep_outputs(module: GraphModule, is_kept: Callable[[int, Any], bool]) -> None:
    output = output_node(module.graph)
    output.args = (tuple(value for index, value in enumerate(output.args[0]) if is_kept(index, value)),)
    module.recompile()


def _refuse_uncarried(metadata: Any, forward: GraphModule, num_inputs: int) -> None:
    """Raise for whatever AOTAutograd's own runtime does around the graphs and an artifact does not."""
    num_placeholders = sum(node.op == "placeholder" for node in forward.graph.nodes)
    changed = [metadata.input_info[index] for index in metadata.mutated_inp_runtime_indices]
    reasons = {
        f"its operators {_ordered(forward)} do more than compute, such as raise an error": bool(metadata.tokens),
        "its random numbers are made functional (config.functionalize_rng_ops)": metadata.is_rng_op_functionalized,
        "two of its inputs share memory and one is changed in place": num_placeholders != num_inputs,
        "it changes the shape or strides of an input in place": any(info.mutates_metadata for info in changed),
        "it changes an input that gradients flow to in place": any(
            info.requires_grad and not info.mutations_under_no_grad_or_inference_mode for info in changed
        ),
        "it takes or gives a tensor subclass": any(
            hasattr(meta, "attrs") for meta in (*metadata.subclass_inp_meta, *metadata.subclass_fw_graph_out_meta)
        ),
    }
    for reason, cases in reasons.items():
        if cases:
            raise UnsupportedError(f"an artifact cannot hold this program: {reason}; compile it with torch.compile")


def _ordered(forward: GraphModule) -> str:
    """The operators that are kept in their order for what else they do, by name."""
    operators = [node.args[1] for node in forward.graph.nodes if str(node.target) == "with_effects" and len(node.args) > 1]
    return ", ".join(sorted(set(map(str, operators))))
