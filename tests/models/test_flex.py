"""FlexAttention in the models: against the same model with scaled_dot_product_attention, and under a dense document mask."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import flex_attention

import torchspan
from torchspan.core.errors import InputError, UnsupportedError
from torchspan.devices.flex_attention import training_patches
from torchspan.environment.scope import Environment
from torchspan.models import _flex, deepseek_v3, llama3
from torchspan.models._flex import documents_of
from torchspan.train.data import END_OF_TEXT

TOLERANCE = 1e-6
"""Of the largest value of each tensor, in float32: softmax is computed in another order."""
MODELS: dict[str, Any] = {"llama3": llama3, "deepseek_v3": deepseek_v3}

pytestmark = [
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor"),  # dynamo looks at it
]


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    """The file of a model."""
    return MODELS[request.param]


@pytest.fixture
def tokens_BS() -> Tensor:
    """Two sequences of several documents each, at other places in each."""
    tokens_BS = torch.randint(32, 128, (2, 40), generator=torch.Generator().manual_seed(1))
    tokens_BS[0, [3, 4, 17]] = tokens_BS[1, [0, 25, 39]] = END_OF_TEXT
    return tokens_BS


@pytest.fixture
def trainable() -> Iterator[None]:
    """FlexAttention trains on a CPU."""
    with Environment(training_patches()):
        yield


def _build(model: Any, **changes: Any) -> nn.Module:
    config = replace(model.FLAVOURS["tiny_flex_attn"], **changes)
    built: nn.Module = model.MODEL.build(config).init_weights(0)
    return built


def _step(module: nn.Module, tokens_BS: Tensor) -> dict[str, Tensor]:
    """The logits and the gradient of every parameter, for labels that are the tokens."""
    logits_BSV = module(tokens_BS)
    F.cross_entropy(logits_BSV.flatten(0, 1), tokens_BS.flatten()).backward()
    gradients = {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}
    return {"logits": logits_BSV.detach(), **gradients}


def _furthest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    return max(((ours[name] - theirs[name]).abs().max() / theirs[name].abs().max()).item() for name in ours)


@pytest.mark.usefixtures("trainable")
def test_causal_flex_attention_is_sdpa_forward_and_backward(model: Any, tokens_BS: Tensor) -> None:
    ours = _step(_build(model, mask="causal"), tokens_BS)
    theirs = _step(_build(model, mask="causal", attention="sdpa"), tokens_BS)
    assert _furthest(ours, theirs) < TOLERANCE


@pytest.mark.usefixtures("trainable")
def test_block_causal_flex_attention_is_dense_attention_within_each_document(
    model: Any, tokens_BS: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = _step(_build(model), tokens_BS)
    monkeypatch.setattr(_flex, "mask_of", lambda tokens_BS, config: _dense_mask(tokens_BS))
    monkeypatch.setattr(_flex, "attend", _dense_attention)
    theirs = _step(_build(model), tokens_BS)
    assert _furthest(ours, theirs) < TOLERANCE


def _dense_mask(tokens_BS: Tensor) -> Tensor:
    """Which position sees which, written out in Python: (B, 1, S, S)."""
    sees = torch.zeros(len(tokens_BS), 1, tokens_BS.shape[1], tokens_BS.shape[1], dtype=torch.bool)
    for sequence, row in enumerate(tokens_BS.tolist()):
        begin = 0
        for query, token in enumerate(row):
            sees[sequence, 0, query, begin : query + 1] = True
            begin = query + 1 if token == END_OF_TEXT else begin
    return sees


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = q @ k.transpose(-2, -1) * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v


@torch.no_grad()
def test_a_document_does_not_see_the_one_before(model: Any, tokens_BS: Tensor) -> None:
    module = _build(model).eval()
    before = module(tokens_BS)
    changed_BS = tokens_BS.clone()
    changed_BS[0, :4] = torch.tensor([50, 60, 70, END_OF_TEXT])
    after = module(changed_BS)
    torch.testing.assert_close(after[0, 4:], before[0, 4:], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(after[0, :4], before[0, :4], atol=1e-3)


def test_the_token_that_ends_a_text_belongs_to_it() -> None:
    tokens_BS = torch.tensor([[9, 5, 9, 9, 5]])
    assert documents_of(tokens_BS, end_of_text=9).tolist() == [[0, 1, 1, 2, 3]]


def test_flavours_end_a_document_where_the_data_do(model: Any) -> None:
    for name in ("debugmodel_flex_attn", "tiny_flex_attn"):
        flavour = model.FLAVOURS[name]
        assert (flavour.attention, flavour.mask, flavour.end_of_text) == ("flex", "block_causal", END_OF_TEXT)


@pytest.mark.skipif(torch.__version__.startswith("2.8"), reason="torch 2.8 refuses nothing")
def test_where_torch_refuses_gradients_on_a_cpu_it_is_said_what_to_do(model: Any, tokens_BS: Tensor) -> None:
    with pytest.raises(
        UnsupportedError, match=r"(?s)does not support backward on CPU.*torchspan\.activate\(\).*attention='sdpa'"
    ):
        _step(_build(model), tokens_BS)


def test_an_activation_makes_flex_attention_train_and_takes_it_back(tokens_BS: Tensor) -> None:
    before = flex_attention._validate_device.__code__
    with torchspan.activate(device="cpu"):
        assert torch.isfinite(_step(_build(llama3), tokens_BS)["logits"]).all()
    assert flex_attention._validate_device.__code__ is before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": "flash"}, r"attention is 'flash'; expected 'sdpa' or 'flex'"),
        ({"mask": "full"}, r"mask is 'full'; expected 'causal' or 'block_causal'"),
        ({"attention": "sdpa"}, r"mask is 'block_causal', which attention 'sdpa' does not take; expected attention 'flex'"),
    ],
)
def test_what_no_model_has_is_refused(model: Any, changes: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        replace(model.FLAVOURS["tiny_flex_attn"], **changes)
