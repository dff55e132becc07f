"""varlen_attn: packed sequences attend to themselves, with the output, log-sum-exp and gradients of plain attention."""

from __future__ import annotations

import inspect
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspan.backports._base import REGISTRY, is_lacking

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # dynamo's imports, from 2.13 on
]

OURS = is_lacking(REGISTRY.get("varlen_attn").BACKPORT)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float64
needs_kernel = pytest.mark.skipif(not OURS and DEVICE == "cpu", reason="torch's own has no CPU kernel")
WINDOWS = [(-1, -1), (-1, 0), (2, 0), (1, 1), (0, -1)]
LENGTHS = {"equal": ([3, 5, 1], [3, 5, 1]), "different": ([3, 5, 2], [6, 2, 4])}


def packed(lengths: list[int], num_heads: int) -> Tensor:
    """``(T, H, D)``, with a gradient."""
    return torch.randn(sum(lengths), num_heads, 16, dtype=DTYPE, device=DEVICE, requires_grad=True)


def ends(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


def expected(
    q_THD: Tensor, k_THD: Tensor, v_THD: Tensor, num_q: list[int], num_k: list[int], window: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """The output and log-sum-exp by plain matrix products, a sequence at a time."""
    outs, lses = [], []
    group = q_THD.size(1) // k_THD.size(1)
    for q_LHD, k_LHD, v_LHD in zip(q_THD.split(num_q), k_THD.split(num_k), v_THD.split(num_k)):
        q_HLD = q_LHD.transpose(0, 1)
        k_HLD, v_HLD = (x.transpose(0, 1).repeat_interleave(group, 0) for x in (k_LHD, v_LHD))
        scores = q_HLD @ k_HLD.transpose(1, 2) / math.sqrt(q_HLD.size(-1))
        lq, lk = scores.shape[1:]
        ahead = torch.arange(lk, device=DEVICE) - torch.arange(lq, device=DEVICE)[:, None] - (lk - lq)
        num_before, right = (size if size >= 0 else lq + lk for size in window)
        scores = scores.masked_fill((ahead < -num_before) | (ahead > right), -torch.inf)
        outs.append((scores.softmax(-1).nan_to_num(0.0) @ v_HLD).transpose(0, 1))
        lse = scores.logsumexp(-1)
        lses.append(lse.masked_fill(lse == -torch.inf, torch.inf))
    return torch.cat(outs), torch.cat(lses, 1)


def close(actual: Any, wanted: Any) -> None:
    tolerance = 2e-2 if DEVICE == "cuda" else 1e-10
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance, check_dtype=False)


@needs_kernel
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_output_statistics_and_gradients_are_those_of_plain_attention(lengths: str, window: tuple[int, int]) -> None:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    if "window_size" not in inspect.signature(varlen_attn).parameters:
        pytest.skip("torch 2.10's has no windows")
    num_q, num_k = LENGTHS[lengths]
    for num_heads_k in (4, 2):
        query, key, value = packed(num_q, 4), packed(num_k, num_heads_k), packed(num_k, num_heads_k)
        sizes = (ends(num_q), ends(num_k), max(num_q), max(num_k))
        options = {"window_size": window, "enable_gqa": num_heads_k != 4}
        out, lse = varlen_attn(query, key, value, *sizes, return_aux=AuxRequest(lse=True), **options)
        reference, wanted_lse = expected(query, key, value, num_q, num_k, window)
        close(out, reference)
        close(lse, wanted_lse)
        weights = torch.randn_like(out)
        actual = torch.autograd.grad(out, (query, key, value), weights)
        close(actual, torch.autograd.grad(reference, (query, key, value), weights))


@needs_kernel
def test_is_causal_of_torch_2_10_is_a_window(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.nn.attention.varlen import varlen_attn

    if "is_causal" not in inspect.signature(varlen_attn).parameters:
        pytest.skip("torch's own has dropped the argument")
    lengths = [4, 7]
    query, key, value = (packed(lengths, 2) for _ in range(3))
    out = varlen_attn(query, key, value, ends(lengths), ends(lengths), 7, 7, is_causal=True)
    close(out, expected(query, key, value, lengths, lengths, (-1, 0))[0])


@needs_kernel
@pytest.mark.slow
def test_compiled_and_checkpointed_as_torchtitan_does() -> None:
    from torch.nn.attention.varlen import varlen_attn
    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    operators: list[str] = []

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        operators.append(str(operator))
        is_attention = operator is torch.ops.torch_attn._varlen_attn.default
        return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE

    lengths = [4, 7]
    query, key, value = (packed(lengths, 2) for _ in range(3))
    compiled = torch.compile(varlen_attn, backend="aot_eager", fullgraph=True)
    out = compiled(query, key, value, ends(lengths), ends(lengths), 7, 7, scale=0.5)
    expected = torch.autograd.grad(out.square().sum(), query)[0]

    def block(query: Tensor) -> Tensor:
        return varlen_attn(query * 1, key, value, ends(lengths), ends(lengths), 7, 7, scale=0.5).square()

    saved = checkpoint(block, query, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    close(torch.autograd.grad(saved.sum(), query)[0], expected)
    assert operators.count("torch_attn._varlen_attn.default") == (2 if OURS else 1), "asked again in the backward on old torch"


@pytest.mark.skipif(not OURS, reason="torch's own needs a kernel for the fakes' device")
def test_the_operators_pass_torchs_own_check_of_custom_operators() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert varlen_attn.__module__ == "torch.nn.attention.varlen"
    query, key, value = (packed([3, 5], 2).detach().float().requires_grad_() for _ in range(3))
    sizes = (ends([3, 5]), ends([3, 5]), 5, 5)
    torch.library.opcheck(torch.ops.torch_attn._varlen_attn.default, (query, key, value, *sizes, True, None, [-1, 0]))


@needs_kernel
def test_keys_in_pages_are_those_that_seqused_k_counts() -> None:
    from torch.nn.attention.varlen import varlen_attn

    if "block_table" not in inspect.signature(varlen_attn).parameters:
        pytest.skip("this torch's own has no pages")
    page_size = 256 if DEVICE == "cuda" else 4
    pages = torch.randn(6, page_size, 2, 16, dtype=DTYPE, device=DEVICE)
    table = torch.tensor([[3, 0], [5, 2]], dtype=torch.int32, device=DEVICE)
    used = [page_size + 1, 3]
    query = packed([2, 1], 2).detach()
    with torch.no_grad():
        out = varlen_attn(
            query,
            pages,
            pages,
            ends([2, 1]),
            None,
            2,
            2 * page_size,
            seqused_k=torch.tensor(used, dtype=torch.int32, device=DEVICE),
            block_table=table,
        )
    keys = torch.cat([pages[rows].flatten(0, 1)[:length] for rows, length in zip(table, used)])
    close(out, expected(query, keys, keys, [2, 1], used, (-1, -1))[0])


@needs_kernel
def test_a_gradient_through_what_is_for_inference_only_is_an_error() -> None:
    from torch.nn.attention.varlen import varlen_attn

    if "seqused_k" not in inspect.signature(varlen_attn).parameters:
        pytest.skip("this torch's own has no such argument")
    query, key, value = (packed([3], 2) for _ in range(3))
    used = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    with pytest.raises(RuntimeError, match="seqused_k is"):
        varlen_attn(query, key, value, ends([3]), ends([3]), 3, 3, seqused_k=used).sum().backward()


def test_what_does_not_fit_is_named() -> None:
    from torch.nn.attention.varlen import varlen_attn

    parameters = inspect.signature(varlen_attn).parameters
    query, key = packed([3], 4), packed([3], 3)
    if "enable_gqa" in parameters:
        with pytest.raises(ValueError, match=r"same number of heads.*Hq=4 and Hkv=3"):
            varlen_attn(query, key, key, ends([3]), ends([3]), 3, 3)
        with pytest.raises(ValueError, match=r"multiple of.*Hq=4 and Hkv=3"):
            varlen_attn(query, key, key, ends([3]), ends([3]), 3, 3, enable_gqa=True)
    if OURS:
        with pytest.raises(ValueError, match="window_size must have length 2, got 3"):
            varlen_attn(query, query, query, ends([3]), ends([3]), 3, 3, window_size=(1, 2, 3))
        with pytest.raises(ValueError, match="scale must be greater than 0, got -1"):
            varlen_attn(query, query, query, ends([3]), ends([3]), 3, 3, scale=-1.0)
        with pytest.raises(ValueError, match="cu_seq_k may be None only where"):
            varlen_attn(query, query, query, ends([3]), None, 3, 3)


@needs_kernel
def test_the_output_can_be_written_to_a_tensor_that_is_there() -> None:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn, varlen_attn_out

    q, k, v = (packed([3, 5], 2) for _ in range(3))
    arguments = (q, k, v, ends([3, 5]), ends([3, 5]), 5, 5)
    expected, wanted_lse = varlen_attn(*arguments, window_size=(-1, 0), return_aux=AuxRequest(lse=True))
    out = torch.full_like(q, torch.nan).detach()
    assert varlen_attn_out(out, *arguments, window_size=(-1, 0)) is out and torch.equal(out, expected)
    _, lse = varlen_attn_out(out, *arguments, window_size=(-1, 0), return_aux=AuxRequest(lse=True))
    assert torch.equal(lse, wanted_lse)
