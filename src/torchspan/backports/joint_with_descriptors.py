"""``aot_export_joint_with_descriptors`` and ``aot_compile_joint_with_descriptors``: AOTAutograd in two steps."""

from __future__ import annotations

from torchspan.backports._base import Backport, from_module

BACKPORT = Backport(
    name="joint_with_descriptors",
    summary="AOTAutograd in two steps, a joint graph with descriptors between them: aot_export_joint_with_descriptors",
    target="torch._functorch.aot_autograd",
    since="2.9.0",
    first_forms={"2.9": "takes no keyword arguments of a captured graph", "2.10": "traces a captured graph with other stacks"},
    upstream="https://github.com/pytorch/pytorch/pull/159005",
    differs=(
        "only the joint graph has descriptors, its two parts have those of their inputs; disable_functionalization and "
        "serializable are errors; torch 2.9's own takes no keyword arguments of a captured graph"
    ),
    names=from_module(
        "torchspan.backports._joint",
        "aot_export_joint_with_descriptors",
        "aot_compile_joint_with_descriptors",
        "JointWithDescriptors",
        "boxed_nop_preserve_node_meta",
    ),
)
