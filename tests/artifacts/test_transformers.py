"""A whole model of Transformers as one artifact: its outputs, losses and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from torchspan.artifacts import load, precompile
from torchspan.core.errors import GuardError

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`torch\.jit\.script(_method)?` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
]


def llama() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return transformers.LlamaForCausalLM(config)


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(batch))


def test_a_llama_trains_from_an_artifact_at_any_size(tmp_path: Path) -> None:
    model, call = llama(), {"labels": ids(2, 9), "use_cache": False}
    dynamic = {name: {0: "batch", 1: "length"} for name in ("input_ids", "labels")}
    is_old = torch.__version__.startswith("2.8.")  # its operators round otherwise; those of later releases give the same bits
    near = {"rtol": 1e-5, "atol": 1e-6} if is_old else {"rtol": 0.0, "atol": 0.0}
    artifact = precompile(model, (ids(2, 9),), call, compiler="eager", dynamic=dynamic)
    fast = load(artifact.save(tmp_path / "llama.tspan"), model)
    for size in ((2, 9), (3, 14)):
        actual, gradients = step(fast, model, size)
        expected, expected_gradients = step(model, model, size)
        assert type(actual) is type(expected)
        torch.testing.assert_close((actual.logits, actual.loss), (expected.logits, expected.loss), **near)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-6)
    with pytest.raises(GuardError):
        fast(ids(2, 9), labels=ids(2, 9), use_cache=True)


def step(call: Any, model: Any, size: tuple[int, int]) -> tuple[Any, list[torch.Tensor]]:
    model.zero_grad()
    result = call(ids(*size), labels=ids(*size), use_cache=False)
    result.loss.backward()
    return result, [parameter.grad.clone() for parameter in model.parameters()]


def test_an_attribute_that_is_put_back_is_guarded(tmp_path: Path) -> None:
    class Marks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.state = State()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.state.inside = True
            y = x * 2
            self.state.inside = False
            return y

    model = Marks()
    fast = load(precompile(model, (torch.ones(2),), compiler="eager").save(tmp_path / "marks.tspan"), model)
    assert fast(torch.ones(2)).tolist() == [2.0, 2.0]
    model.state.inside = True  # the forward would set it to False; the artifact leaves it, and says so
    with pytest.raises(GuardError, match=r"inside.* is True, expected False"):
        fast(torch.ones(2))


class State:
    """What a forward may note something on."""

    inside = False

    def __init__(self) -> None:
        self.inside = False
