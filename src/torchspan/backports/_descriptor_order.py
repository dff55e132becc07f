"""The order in which AOTAutograd's graphs take their inputs and give their outputs, as descriptors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torchspan.backports._descriptors import (
    AOTInput,
    AOTOutput,
    DifferentiableAOTInput,
    DifferentiableAOTOutput,
    DummyAOTOutput,
    ForwardTokenAOTInput,
    ForwardTokenAOTOutput,
    GradAOTOutput,
    InputMutationAOTOutput,
    IntermediateBaseAOTOutput,
    PlainAOTOutput,
    SubclassGetAttrAOTInput,
    SubclassGetAttrAOTOutput,
    SubclassSizeAOTInput,
    SubclassSizeAOTOutput,
    SubclassStrideAOTInput,
    SubclassStrideAOTOutput,
    TangentAOTInput,
)


def joint_inputs(state: Any, primals: Sequence[AOTInput]) -> tuple[list[AOTInput], list[AOTInput]]:
    """The primals and the tangents that a joint graph takes, from the inputs of the function that was traced.

    `state` has AOTAutograd's ``fw_metadata``, and its ``subclass_meta``, which is None without tensor subclasses.
    """
    tokens = [ForwardTokenAOTInput(index) for index in range(len(state.fw_metadata.tokens))]
    tangents = [TangentAOTInput(output) for output in _with_tangent(state.fw_metadata, primals)]
    if state.subclass_meta is None:
        return [*tokens, *primals], [*tangents]
    parts = _parts(primals, state.fw_metadata.subclass_inp_meta, _INPUT_PARTS)
    return [*tokens, *parts], [*_parts(tangents, state.fw_metadata.subclass_tangent_meta, _INPUT_PARTS)]


def forward_outputs(state: Any, primals: Sequence[AOTInput]) -> list[AOTOutput]:
    """What a forward graph gives."""
    meta = state.fw_metadata
    outputs: list[AOTOutput] = [
        InputMutationAOTOutput(primals[index]) for index, info in enumerate(meta.input_info) if _leaves_graph(meta, info)
    ]
    outputs += [PlainAOTOutput(index) for index in range(len(meta.output_info))]
    if meta.is_train:
        outputs += _intermediate_bases(meta)
    if state.subclass_meta is not None:
        outputs = [*_parts(outputs, meta.subclass_fw_graph_out_meta, _OUTPUT_PARTS)]
    return [*(ForwardTokenAOTOutput(index) for index in range(len(meta.tokens))), *outputs]


def gradients(state: Any, primals: Sequence[AOTInput]) -> list[AOTOutput]:
    """The gradients that a joint graph gives, one for each primal (None where it has none)."""
    outputs: list[AOTOutput] = [
        GradAOTOutput(primal) if isinstance(primal, DifferentiableAOTInput) else DummyAOTOutput(index)
        for index, primal in enumerate(primals)
    ]
    if state.subclass_meta is None:
        return outputs
    return [*_parts(outputs, state.subclass_meta.grad_input_metas, _OUTPUT_PARTS)]


def _leaves_graph(meta: Any, info: Any) -> bool:
    """Whether the graph returns the new value of an input that the program writes."""
    return bool(info.mutation_type.name == "MUTATED_OUT_GRAPH")


def _with_tangent(meta: Any, primals: Sequence[AOTInput]) -> Iterator[DifferentiableAOTOutput]:
    """The outputs that a backward begins with, in AOTAutograd's order."""
    for info, primal in zip(meta.input_info, primals):
        if _leaves_graph(meta, info) and info.mutates_data and info.requires_grad:
            yield InputMutationAOTOutput(primal)
    for index, info in enumerate(meta.output_info):
        is_new = info.output_type.name in ("non_alias", "unsafe_view_alias", "custom_function_view")
        if is_new and info.requires_grad and hasattr(info.raw_type, "grad_fn"):
            yield PlainAOTOutput(index)
    yield from _intermediate_bases(meta)


def _intermediate_bases(meta: Any) -> list[DifferentiableAOTOutput]:
    """The tensors that several outputs are views of; each is named after the first of those outputs."""
    first: dict[int, int] = {}
    for index, info in enumerate(meta.output_info):
        if "alias_of_intermediate" in info.output_type.name and info.base_idx is not None:
            base = info.base_idx if info.output_type.name != "alias_of_intermediate_base_is_user_output" else None
            if base is not None:
                first.setdefault(base, index)
    return [
        IntermediateBaseAOTOutput(PlainAOTOutput(first[base]) if base in first else DummyAOTOutput(base))
        for base in range(meta.num_intermediate_bases)
    ]


_INPUT_PARTS = (SubclassGetAttrAOTInput, SubclassSizeAOTInput, SubclassStrideAOTInput)
_OUTPUT_PARTS = (SubclassGetAttrAOTOutput, SubclassSizeAOTOutput, SubclassStrideAOTOutput)


def _parts(descriptors: Sequence[Any], metas: Sequence[Any], kinds: tuple[Any, Any, Any]) -> Iterator[Any]:
    """The plain tensors, and dynamic sizes and strides, that stand for each tensor subclass."""
    for descriptor, meta in zip(descriptors, metas, strict=True):
        yield from _parts_of(descriptor, meta, kinds)


def _parts_of(descriptor: Any, meta: Any, kinds: tuple[Any, Any, Any]) -> Iterator[Any]:
    if not hasattr(meta, "attrs"):  # a plain tensor, or none
        yield descriptor
        return
    tensor, size, stride = kinds
    for attribute, inner in meta.attrs.items():
        yield from _parts_of(tensor(descriptor, attribute), inner, kinds)
    if meta.included_subclass_symints:
        yield from (size(descriptor, index) for index, value in enumerate(meta.outer_size) if _is_dynamic(value))
        yield from (stride(descriptor, index) for index, value in enumerate(meta.outer_stride) if _is_dynamic(value))


def _is_dynamic(value: Any) -> bool:
    return hasattr(value, "node") and not value.node.is_nested_int()
