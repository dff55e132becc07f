"""Names of public checkpoints: whole, or refused with the name that is wrong; test_transformers.py loads them there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from torchspan.core.errors import InputError, UnsupportedError
from torchspan.models._base import REGISTRY, ModelSpec, get_model

V3 = get_model("deepseek_v3")
TINY = V3.flavour("tiny")
EXPERT = "model.layers.1.mlp.experts.7.gate_proj.weight"


@pytest.fixture(scope="module")
def state_dict() -> dict[str, Tensor]:
    return V3.build(TINY).init_weights(0).state_dict()  # type: ignore[operator]


@pytest.mark.parametrize("name", REGISTRY.names())
def test_there_and_back_again_is_the_same(name: str) -> None:
    spec = get_model(name)
    config = spec.flavour("tiny")
    state = spec.build(config).init_weights(0).state_dict()  # type: ignore[operator]
    back = spec.from_hf(config, spec.to_hf(config, state))
    assert set(back) == set(state) and all(torch.equal(back[name], state[name]) for name in state)


def test_each_expert_has_a_matrix_of_its_own_with_output_features_first(state_dict: dict[str, Tensor]) -> None:
    checkpoint = V3.to_hf(TINY, state_dict)
    assert torch.equal(checkpoint[EXPERT], state_dict["layers.1.moe.experts.w1"][7].T) and checkpoint[EXPERT].is_contiguous()
    assert checkpoint["model.layers.2.mlp.gate.e_score_correction_bias"].shape == (8,)
    assert not any(name.startswith("model.layers.0.mlp.experts") for name in checkpoint)


def test_the_layer_that_predicts_a_second_token_is_left_out(state_dict: dict[str, Tensor]) -> None:
    checkpoint = V3.to_hf(TINY, state_dict) | {"model.layers.3.eh_proj.weight": torch.ones(1)}
    assert set(V3.from_hf(TINY, checkpoint)) == set(state_dict)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda held: held.pop(EXPERT), rf"the checkpoint lacks {EXPERT}; expected \d+ tensors. Is it whole"),
        (
            lambda held: held.update(odd=torch.ones(1)),
            "the checkpoint has odd, which this configuration has no place for; take the configuration",
        ),
        (
            lambda held: held.update({EXPERT: held[EXPERT].T}),
            rf"{EXPERT} has the shape \(32, 16\); this configuration expects \(16, 32\)",
        ),
    ],
    ids=["missing", "extra", "shape"],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    state_dict: dict[str, Tensor], change: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    checkpoint = V3.to_hf(TINY, state_dict)
    change(checkpoint)
    with pytest.raises(InputError, match=message):
        V3.from_hf(TINY, checkpoint)


def test_a_state_dict_that_does_not_fit_is_refused(state_dict: dict[str, Tensor]) -> None:
    with pytest.raises(
        InputError, match=r"the model's state dict lacks layers\.3\.attention\.kv_norm\.weight, .* and \d+ more"
    ):
        V3.to_hf(replace(TINY, num_layers=4), state_dict)
    with pytest.raises(InputError, match=r"the model's state dict has layers\.2\.attention"):
        V3.to_hf(replace(TINY, num_layers=2), state_dict)
    with pytest.raises(InputError, match=r"w1 has the shape \(8, 32, 16\); this configuration expects \(8, 32, 8\)"):
        V3.to_hf(replace(TINY, expert_dim=8, num_shared_experts=4), state_dict)


def test_a_model_without_public_names_says_so() -> None:
    spec = ModelSpec("mine", "", {"tiny": None}, build=lambda _: torch.nn.Linear(1, 1))
    with pytest.raises(UnsupportedError, match="mine has no names in public checkpoints; give its ModelSpec hf_weights"):
        spec.to_hf(None, {})
