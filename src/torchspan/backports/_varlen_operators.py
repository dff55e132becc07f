"""The operators of attention over packed sequences, forward and backward: a sequence at a time, or by a kernel of CUDA's."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# S: sequences, T: tokens of all of them, L: tokens of one, H: heads, D: head dimension; q and k: of queries and of keys
_INPUTS = (
    "Tensor query, Tensor key, Tensor value, Tensor cu_seq_q, Tensor? cu_seq_k, SymInt max_q, SymInt max_k, "
    "bool is_causal=False, float? scale=None, SymInt[]? window_size=None, bool enable_gqa=False, "
    "Tensor? seqused_k=None, Tensor? block_table=None, SymInt? num_splits=None"
)
_BACKWARD_INPUTS = (
    "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor cu_seq_q, Tensor cu_seq_k, "
    "SymInt max_q, SymInt max_k, bool is_causal, Tensor rng_state, float? scale=None, SymInt[]? window_size=None"
)


@functools.cache
def define_operators() -> None:
    """Define the operators, once: the dispatcher keeps them, also after the backport is taken back."""
    define: Any = torch.library.custom_op
    forward = define("torch_attn::_varlen_attn", _forward, mutates_args=(), schema=f"({_INPUTS}) -> (Tensor, Tensor, Tensor)")
    backward = define(
        "torch_attn::_varlen_attn_backward",
        _backward,
        mutates_args=(),
        schema=f"({_BACKWARD_INPUTS}) -> (Tensor, Tensor, Tensor)",
    )
    forward.register_fake(_forward_shapes)
    backward.register_fake(_backward_shapes)
    forward.register_autograd(_gradients, setup_context=_keep_for_backward)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool = False,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
    enable_gqa: bool = False,
    seqused_k: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    if block_table is not None:
        key, value, cu_seq_k = _without_pages(key, value, cu_seq_k, seqused_k, block_table)
        seqused_k = None
    if cu_seq_k is None:
        raise ValueError("cu_seq_k may be None only where block_table and seqused_k say which keys each sequence has")
    window = _window(is_causal, window_size)
    rng_state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # there is no dropout
    if query.is_cuda and num_splits is None:
        packed = (query, key, value, cu_seq_q, cu_seq_k, max_q, max_k)
        return *_on_cuda(*packed, window, scale, seqused_k), rng_state
    out = torch.zeros_like(query)
    lse = _lse_like(query).fill_(torch.inf)  # as for a row that sees no key
    attend = _sequence_on_cuda if query.is_cuda else _sequence_on_cpu
    for at_q, at_k in _sequences(cu_seq_q, cu_seq_k, seqused_k):
        out[at_q], lse[:, at_q] = attend(query[at_q], key[at_k], value[at_k], window, scale)
    return out, lse, rng_state


def _on_cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    window: tuple[int, int],
    scale: float | None,
    seqused_k: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """What 2.8's own kernel makes of packed sequences; it knows neither pages nor a number of splits."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        0.0,
        window == (-1, 0),
        False,
        scale=scale,
        window_size_left=window[0],
        window_size_right=window[1],
        seqused_k=seqused_k,
    )
    return out, lse


def _sequence_on_cuda(
    q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, window: tuple[int, int], scale: float | None
) -> tuple[Tensor, Tensor]:
    """One sequence by itself: so nothing else that is in the batch decides how its keys are split."""
    num_q, num_k = len(q_LHD), len(k_LHD)
    ends_q, ends_k = (torch.tensor([0, number], dtype=torch.int32, device=q_LHD.device) for number in (num_q, num_k))
    return _on_cuda(q_LHD, k_LHD, v_LHD, ends_q, ends_k, num_q, num_k, window, scale, None)


def _sequence_on_cpu(
    q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, window: tuple[int, int], scale: float | None
) -> tuple[Tensor, Tensor]:
    """The output ``(L, H, D)`` and the log of the sum of exponentials ``(H, L)`` of one sequence."""
    is_causal, mask_LL, blind_L = _visible(len(q_LHD), len(k_LHD), window, q_LHD)
    batch = [_as_batch(x_LHD, q_LHD.size(1)) for x_LHD in (q_LHD, k_LHD, v_LHD)]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        *batch, 0.0, is_causal, attn_mask=mask_LL, scale=scale
    )
    out_LHD, lse_HL = out[0].transpose(0, 1), lse[0].reshape(q_LHD.size(1), -1)
    if blind_L is None:
        return out_LHD, lse_HL
    return out_LHD.masked_fill(blind_L[:, None, None], 0.0), lse_HL.masked_fill(blind_L, torch.inf)


def _backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    is_causal: bool,
    rng_state: Tensor,
    scale: float | None = None,
    window_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    window = _window(is_causal, window_size)
    if query.is_cuda:
        return torch.ops.aten._flash_attention_backward(
            grad_out,
            query,
            key,
            value,
            out,
            lse,
            cu_seq_q,
            cu_seq_k,
            max_q,
            max_k,
            0.0,
            window == (-1, 0),
            rng_state,
            query.new_empty(0),
            scale=scale,
            window_size_left=window[0],
            window_size_right=window[1],
        )
    gradients = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    for at_q, at_k in _sequences(cu_seq_q, cu_seq_k, None):
        parts = (grad_out[at_q], query[at_q], key[at_k], value[at_k], out[at_q], lse[:, at_q])
        for gradient, at, part in zip(gradients, (at_q, at_k, at_k), _sequence_backward(*parts, window, scale)):
            gradient[at] = part
    return gradients


def _sequence_backward(
    grad_LHD: Tensor,
    q_LHD: Tensor,
    k_LHD: Tensor,
    v_LHD: Tensor,
    out_LHD: Tensor,
    lse_HL: Tensor,
    window: tuple[int, int],
    scale: float | None,
) -> Iterator[Tensor]:
    """The gradients of one sequence's queries, keys and values, each ``(L, H, D)`` with its own number of heads."""
    is_causal, mask_LL, blind_L = _visible(len(q_LHD), len(k_LHD), window, q_LHD)
    if blind_L is not None:
        grad_LHD = grad_LHD.masked_fill(blind_L[:, None, None], 0.0)
        lse_HL = lse_HL.masked_fill(blind_L, 0.0)
    batch = [_as_batch(x_LHD, q_LHD.size(1)) for x_LHD in (grad_LHD, q_LHD, k_LHD, v_LHD, out_LHD)]
    gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *batch, lse_HL[None], 0.0, is_causal, attn_mask=mask_LL, scale=scale
    )
    for gradient, x_LHD in zip(gradients, (q_LHD, k_LHD, v_LHD)):
        heads = gradient[0].unflatten(0, (x_LHD.size(1), -1)).sum(1)  # of the query heads that share it
        yield heads.transpose(0, 1)


def _sequences(cu_seq_q: Tensor, cu_seq_k: Tensor, seqused_k: Tensor | None) -> Iterator[tuple[slice, slice]]:
    """Where the queries and the valid keys of each sequence are, without the sequences that lack either."""
    ends_q, begins_k, ends_k = cu_seq_q.tolist(), cu_seq_k.tolist()[:-1], cu_seq_k.tolist()[1:]
    if seqused_k is not None:
        ends_k = [begin + used for begin, used in zip(begins_k, seqused_k.tolist())]
    for begin_q, end_q, begin_k, end_k in zip(ends_q[:-1], ends_q[1:], begins_k, ends_k):
        if begin_q < end_q and begin_k < end_k:
            yield slice(begin_q, end_q), slice(begin_k, end_k)


def _without_pages(
    key: Tensor, value: Tensor, cu_seq_k: Tensor | None, seqused_k: Tensor | None, block_table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The valid keys and values out of their pages, packed, and where each sequence of them begins."""
    if seqused_k is None:
        if cu_seq_k is None:
            raise ValueError("block_table needs seqused_k or cu_seq_k, which say how many keys each sequence has")
        seqused_k = cu_seq_k.diff()
    lengths = seqused_k.tolist()
    packed = (torch.cat([x[pages].flatten(0, 1)[:length] for pages, length in zip(block_table, lengths)]) for x in (key, value))
    ends = torch.nn.functional.pad(seqused_k.cumsum(0, dtype=torch.int32), (1, 0))
    return *packed, ends  # type: ignore[return-value] # two of them


def _window(is_causal: bool, window_size: Sequence[int] | None) -> tuple[int, int]:
    left, right = window_size or (-1, -1)
    return (left, 0) if is_causal else (left, right)


def _visible(num_q: int, num_k: int, window: tuple[int, int], like: Tensor) -> tuple[bool, Tensor | None, Tensor | None]:
    """Whether the kernel's own causal mask is the one; else the mask to add, and which rows see nothing; None is all, none."""
    if window == (-1, -1):
        return False, None, None
    if window == (-1, 0) and num_q == num_k:
        return True, None, None
    left, right = window
    ahead_LL = torch.arange(num_k) - torch.arange(num_q)[:, None] - (num_k - num_q)  # of the last key that stands at the query
    hidden_LL = (ahead_LL > right if right >= 0 else False) | (ahead_LL < -left if left >= 0 else torch.zeros(1).bool())
    mask_LL = like.new_zeros(num_q, num_k).masked_fill(hidden_LL, -torch.inf)
    blind_L = hidden_LL.all(dim=1)
    mask_LL = mask_LL.masked_fill(blind_L[:, None], 0.0)  # a row of -inf would be nan
    return False, mask_LL, blind_L


def _as_batch(x_LHD: Tensor, num_heads: int) -> Tensor:
    """``(1, num_heads, L, D)``: each head repeated for the query heads that share it."""
    return x_LHD.transpose(0, 1).repeat_interleave(num_heads // x_LHD.size(1), dim=0)[None]


def _forward_shapes(
    query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), _lse_like(query), query.new_empty(2, dtype=torch.uint64)


def _lse_like(query: Tensor) -> Tensor:
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty((query.size(1), query.size(0)), dtype=dtype)


def _backward_shapes(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *args: object, **kwargs: object
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    (query, key, value, cu_seq_q, cu_seq_k, ctx.max_q, ctx.max_k, ctx.is_causal, ctx.scale, ctx.window_size) = inputs[:10]
    for name, argument in zip(("seqused_k", "block_table"), inputs[11:13]):
        if argument is not None:
            raise RuntimeError(f"{name} is for inference only: it has no gradient; call varlen_attn under torch.no_grad()")
    out, lse, rng_state = output
    ctx.mark_non_differentiable(lse, rng_state)
    ctx.save_for_backward(query, key, value, out, lse, cu_seq_q, cu_seq_k, rng_state)
    ctx.num_inputs = len(inputs)


def _gradients(ctx: Any, grad_out: Tensor, grad_lse: Tensor, grad_rng_state: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, rng_state = ctx.saved_tensors
    backward = torch.ops.torch_attn._varlen_attn_backward
    gradients = backward(grad_out, *tensors, ctx.max_q, ctx.max_k, ctx.is_causal, rng_state, ctx.scale, ctx.window_size)
    return *gradients, *(None,) * (ctx.num_inputs - 3)
