"""``torch._functorch._aot_autograd.descriptors``: what the inputs and outputs of a joint graph mean."""

from __future__ import annotations

import functools
from typing import Any

from torchspan.backports._base import Backport, Change, from_module
from torchspan.private import aot, fx

_CLASSES = [
    "AOTInput",
    "DifferentiableAOTInput",
    "AOTOutput",
    "DifferentiableAOTOutput",
    "ParamAOTInput",
    "BufferAOTInput",
    "PlainAOTInput",
    "DummyAOTInput",
    "SubclassGetAttrAOTInput",
    "SubclassSizeAOTInput",
    "SubclassStrideAOTInput",
    "ViewBaseAOTInput",
    "SyntheticBaseAOTInput",
    "PhiloxForwardSeedAOTInput",
    "PhiloxForwardBaseOffsetAOTInput",
    "PhiloxBackwardSeedAOTInput",
    "PhiloxBackwardBaseOffsetAOTInput",
    "ForwardTokenAOTInput",
    "BackwardTokenAOTInput",
    "TangentAOTInput",
    "PlainAOTOutput",
    "InputMutationAOTOutput",
    "IntermediateBaseAOTOutput",
    "MetadataMutationAOTOutput",
    "GradAOTOutput",
    "PhiloxUpdatedForwardOffsetAOTOutput",
    "PhiloxUpdatedBackwardOffsetAOTOutput",
    "ForwardTokenAOTOutput",
    "BackwardTokenAOTOutput",
    "SubclassGetAttrAOTOutput",
    "SubclassSizeAOTOutput",
    "SubclassStrideAOTOutput",
    "DummyAOTOutput",
    "SavedForBackwardsAOTOutput",
]


def _taking_traced_tangents(process: Any) -> Any:
    """AOTAutograd's check of a tangent's class, for compiled functions that are traced: tracing has a class of its own."""

    @functools.wraps(process.__func__)
    def process_runtime_tangent(x: Any, meta: Any) -> Any:
        if isinstance(x, fx.FunctionalTensor) and not hasattr(meta, "attrs"):
            x = aot.coerce_to_expected_memory_format(x, meta.memory_format)
            return x, [x]
        return process.__func__(x, meta)

    return staticmethod(process_runtime_tangent)


BACKPORT = Backport(
    name="descriptors",
    summary="what the inputs and outputs of AOTAutograd's joint graphs mean: ParamAOTInput, GradAOTOutput and the others",
    target="torch._functorch._aot_autograd.descriptors",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/157779",
    names=from_module("torchspan.backports._descriptors", *_CLASSES),
    is_module=True,
    # here and not where graphs are compiled: whether this torch lacks it is asked while AOTAutograd itself is being imported
    also=(
        Change(
            "torch._functorch._aot_autograd.runtime_wrappers",
            "AOTDispatchAutograd.process_runtime_tangent",
            _taking_traced_tangents,
        ),
    ),
)
