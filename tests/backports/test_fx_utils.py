"""The inputs of a joint graph with their gradients, by what they mean."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


def test_inputs_have_their_gradients_and_outputs_their_tangents() -> None:
    from torch._functorch._aot_autograd import descriptors, fx_utils
    from torch._functorch.aot_autograd import aot_export_joint_with_descriptors

    model = torch.nn.Linear(3, 2)
    x = torch.ones(4, 3)
    with contextlib.ExitStack() as stack:
        graph = aot_export_joint_with_descriptors(stack, model, (x,)).graph_module.graph
    plain = fx_utils.get_plain_input_and_grad_nodes(graph)
    assert plain.keys() == {descriptors.PlainAOTInput(idx=0)} and [grad for _, grad in plain.values()] == [None]
    params = fx_utils.get_param_and_grad_nodes(graph)
    assert [desc.target for desc in params] == ["weight", "bias"] and all(grad is not None for _, grad in params.values())
    assert list(fx_utils.get_named_param_nodes(graph)) == ["weight", "bias"] and fx_utils.get_buffer_nodes(graph) == []
    assert fx_utils.get_param_nodes(graph) == [node for node, _ in params.values()]
    outputs = fx_utils.get_plain_output_and_tangent_nodes(graph)
    assert [tangent.op for _, tangent in outputs.values()] == ["placeholder"]
