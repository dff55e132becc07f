"""Llama 3 against arithmetic written out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from torchspan.core.errors import InputError, UnknownNameError, UnsupportedError
from torchspan.models._base import REGISTRY, get_model
from torchspan.models.llama3 import FLAVOURS, Attention, Llama3, ModelConfig, RMSNorm, rotary_tables, rotate

TINY = FLAVOURS["tiny"]


@pytest.fixture
def model() -> Llama3:
    return Llama3(TINY).init_weights(0)


@pytest.mark.parametrize("name", REGISTRY.names())
def test_every_model_trains_a_step_in_its_smallest_flavour(name: str) -> None:
    spec = get_model(name)
    model = spec.build(min(spec.flavours.values(), key=lambda config: config.dim)).init_weights(0)  # type: ignore[operator]
    model(torch.randint(0, 256, (2, 6))).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())


def test_attention_is_that_of_each_head_written_out(model: Llama3) -> None:
    attention = model.layers[0].attention
    x_BSD = torch.randn(2, 5, TINY.dim, generator=torch.Generator().manual_seed(1))
    cos_SE, sin_SE = model.cos_SE[:5], model.sin_SE[:5]
    assert torch.allclose(attention(x_BSD, cos_SE, sin_SE), _by_hand(attention, x_BSD, cos_SE, sin_SE), atol=1e-6)


def _by_hand(attention: Attention, x_BSD: torch.Tensor, cos_SE: torch.Tensor, sin_SE: torch.Tensor) -> torch.Tensor:
    """Head by head, position by position: no fused kernel, no broadcasting of heads."""
    width = TINY.head_dim
    batches = []
    for x_SD in x_BSD:
        q_SX, k_SX, v_SX = (x_SD @ weight.weight.T for weight in (attention.wq, attention.wk, attention.wv))
        heads = []
        for head in range(TINY.num_heads):
            group = head // (TINY.num_heads // TINY.num_kv_heads)
            q_SE = rotate(q_SX[:, head * width : (head + 1) * width], cos_SE, sin_SE)
            k_SE = rotate(k_SX[:, group * width : (group + 1) * width], cos_SE, sin_SE)
            v_SE = v_SX[:, group * width : (group + 1) * width]
            rows = []
            for position in range(len(x_SD)):
                scores = (k_SE[: position + 1] @ q_SE[position]) / width**0.5
                rows.append(torch.softmax(scores, 0) @ v_SE[: position + 1])
            heads.append(torch.stack(rows))
        batches.append(torch.cat(heads, dim=-1) @ attention.wo.weight.T)
    return torch.stack(batches)


def test_a_token_does_not_see_those_after_it(model: Llama3) -> None:
    tokens = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 5] += 1
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :5], after[:, :5]) and not torch.equal(before[:, 5:], after[:, 5:])


def test_the_rotary_embedding_makes_a_product_depend_on_the_distance_alone() -> None:
    cos_SE, sin_SE = rotary_tables(16, 8, 1e4)
    draw = torch.Generator().manual_seed(3)
    q_E, k_E = torch.randn(8, generator=draw), torch.randn(8, generator=draw)
    near = rotate(q_E, cos_SE[3], sin_SE[3]) @ rotate(k_E, cos_SE[1], sin_SE[1])
    far = rotate(q_E, cos_SE[12], sin_SE[12]) @ rotate(k_E, cos_SE[10], sin_SE[10])
    assert torch.allclose(near, far, atol=1e-5)


def test_a_norm_gives_a_root_mean_square_of_one() -> None:
    x_BSD = RMSNorm(16, 0.0)(torch.randn(2, 3, 16) * 7)
    assert torch.allclose(x_BSD.square().mean(-1), torch.ones(2, 3), atol=1e-5)


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = Llama3(TINY).init_weights(0).state_dict()
    torch.manual_seed(6)
    second, other = Llama3(TINY).init_weights(0).state_dict(), Llama3(TINY).init_weights(1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["output.weight"], other["output.weight"])


def test_annotated_regions_change_no_number_and_say_what_is_missing() -> None:
    annotated = Llama3(replace(TINY, annotate_regions=True)).init_weights(0)
    tokens = torch.randint(0, 256, (1, 8))
    if hasattr(torch.fx.traceback, "annotate"):
        assert torch.equal(annotated(tokens), Llama3(TINY).init_weights(0)(tokens))
    else:
        with pytest.raises(UnsupportedError, match=r"has no torch\.fx\.traceback\.annotate \(2\.10 and later have it\)"):
            annotated(tokens)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"dim": 30, "num_heads": 4}, "dim is 30, which 4 heads do not divide; expected a multiple of num_heads"),
        ({"num_heads": 4, "num_kv_heads": 3, "dim": 32}, "num_heads is 4, which 3 key and value heads do not divide"),
        ({"dim": 12, "num_heads": 4, "num_kv_heads": 2}, "a head is 3 wide; the rotary embedding needs an even width"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig(**sizes)


def test_a_wrong_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="no config of llama3 'debugmodle'; did you mean 'debugmodel'"):
        get_model("llama3").flavour("debugmodle")
