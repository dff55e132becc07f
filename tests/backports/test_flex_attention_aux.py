"""flex_attention(return_aux=…): the statistics, against their definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

BIAS = torch.tensor([0.5, -0.25, 0.0, 1.0])


def score_mod(score: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return score + BIAS[h] * (q - k)


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k + 1  # the first row is masked fully


def tensors(num_key_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, 6, 8), (2, num_key_heads, 6, 8), (2, num_key_heads, 6, 8)]
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


def scores_by_definition(query: torch.Tensor, key: torch.Tensor, *, scale: float, modified: bool) -> torch.Tensor:
    key = key.repeat_interleave(query.size(1) // key.size(1), dim=1)
    scores = query @ key.transpose(-2, -1) * scale
    if not modified:
        return scores
    q, k = torch.arange(6)[:, None], torch.arange(6)[None, :]
    return (scores + BIAS[:, None, None] * (q - k)).masked_fill(q < k + 1, -math.inf)


def arguments(modified: bool) -> dict[str, Any]:
    from torch.nn.attention.flex_attention import create_block_mask

    if not modified:
        return {}
    return {"score_mod": score_mod, "block_mask": create_block_mask(causal, None, None, 6, 6, device="cpu")}


@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_lse_is_the_logarithm_of_the_sum_of_exponentials(modified: bool, num_key_heads: int) -> None:
    from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

    query, key, value = tensors(num_key_heads)
    options = {"scale": 0.3, "enable_gqa": num_key_heads != 4, **arguments(modified)}
    out, aux = flex_attention(query, key, value, **options, return_aux=AuxRequest(lse=True))
    assert isinstance(aux, AuxOutput) and aux.max_scores is None
    expected = scores_by_definition(query, key, scale=0.3, modified=modified).logsumexp(dim=-1)
    torch.testing.assert_close(aux.lse, expected)
    assert torch.equal(out, flex_attention(query, key, value, **options))


@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # dynamo does, on 2.8
@pytest.mark.parametrize("modified", [False, True])
@pytest.mark.parametrize("num_key_heads", [4, 2])
def test_max_scores_is_the_highest_score_of_each_row(modified: bool, num_key_heads: int) -> None:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    query, key, value = tensors(num_key_heads)
    options = {"enable_gqa": num_key_heads != 4, **arguments(modified)}
    request = AuxRequest(lse=True, max_scores=True)
    if not is_lacking(REGISTRY.get("flex_attention_aux").BACKPORT):
        with pytest.raises(NotImplementedError, match="max scores is not supported on CPU"):
            flex_attention(query, key, value, **options, return_aux=request)
        return
    _, aux = flex_attention(query, key, value, **options, return_aux=request)
    expected = scores_by_definition(query, key, scale=1 / math.sqrt(8), modified=modified)
    torch.testing.assert_close(aux.max_scores, expected.amax(dim=-1))
    torch.testing.assert_close(aux.lse, expected.logsumexp(dim=-1))

    compiled = torch.compile(flex_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(query, key, value, **options, return_aux=request)[1].max_scores, aux.max_scores)


def test_nothing_requested_is_an_empty_answer_and_none_is_the_output_alone() -> None:
    from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, flex_attention

    query, key, value = tensors()
    out, aux = flex_attention(query, key, value, return_aux=AuxRequest())
    assert aux == AuxOutput(None, None)
    assert torch.equal(out, flex_attention(query, key, value, return_aux=None))


def test_both_ways_to_ask_at_once_are_refused() -> None:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    with pytest.raises(ValueError, match="return_lse"):
        flex_attention(*tensors(), return_lse=True, return_aux=AuxRequest(lse=True))
