"""A policy may ask for the CPU's memory: gradients are those without checkpointing, and the members are like all others."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

pytestmark = pytest.mark.usefixtures("environment")


@pytest.mark.parametrize("name", ["MUST_CPU_OFFLOAD", "PREFER_CPU_OFFLOAD"])
def test_gradients_are_those_without_checkpointing(name: str) -> None:
    operators = []

    def policy(ctx: object, op: object, *args: object, **kwargs: object) -> CheckpointPolicy:
        operators.append(op)
        return getattr(CheckpointPolicy, name)

    def compute(x: torch.Tensor) -> torch.Tensor:
        return x.sin().exp()

    first, second = (torch.linspace(0, 1, 4).requires_grad_() for _ in range(2))
    contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
    checkpoint(compute, first, use_reentrant=False, context_fn=contexts).sum().backward()
    compute(second).sum().backward()
    assert torch.equal(first.grad, second.grad)
    assert torch.ops.aten.sin.default in operators


def test_the_members_are_like_all_others() -> None:
    must, prefer = CheckpointPolicy.MUST_CPU_OFFLOAD, CheckpointPolicy.PREFER_CPU_OFFLOAD
    assert (must.value, must.name, prefer.value) == (4, "MUST_CPU_OFFLOAD", 5)
    assert CheckpointPolicy(4) is must and CheckpointPolicy["PREFER_CPU_OFFLOAD"] is prefer
    assert [*CheckpointPolicy][4:] == [must, prefer]
    assert isinstance(must, CheckpointPolicy) and must in CheckpointPolicy and must != prefer
    assert pickle.loads(pickle.dumps(must)) is must and copy.deepcopy(must) is must
    assert repr(must) == "<CheckpointPolicy.MUST_CPU_OFFLOAD: 4>"
