"""DeepSeek V3 against arithmetic written out by hand; Transformers' is compared in its own test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from torchspan.core.errors import InputError, UnsupportedError
from torchspan.models._base import get_model
from torchspan.models._moe import Balance, Experts, MoE
from torchspan.models.deepseek_v3 import FLAVOURS, Attention, DeepSeekV3, ModelConfig, attention_scale

TINY = FLAVOURS["tiny"]
SOFTMAX = replace(TINY, score_function="softmax", balance_rate=0.0, normalize_weights=False, top_k=3)


@pytest.fixture(scope="module")
def model() -> DeepSeekV3:
    """In evaluation, so that no test moves its biases."""
    return DeepSeekV3(TINY).init_weights(0).eval()


def _draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# attention


@pytest.mark.parametrize("config", [TINY, replace(TINY, q_lora_rank=None, rope_factor=1.0)], ids=["low rank, YaRN", "plain"])
def test_attention_is_that_of_each_head_written_out(config: ModelConfig) -> None:
    model = DeepSeekV3(config).init_weights(0)
    x_BSD = _draw(2, 5, config.dim)
    actual = model.layers[0].attention(x_BSD, model.cos_SP[:5], model.sin_SP[:5])
    expected = torch.stack([_attention_by_hand(model.layers[0].attention, x_SD, model) for x_SD in x_BSD])
    assert torch.allclose(actual, expected, atol=1e-6)


def _attention_by_hand(attention: Attention, x_SD: Tensor, model: DeepSeekV3) -> Tensor:
    """Head by head, position by position; pairs of features turn as complex numbers."""
    config = attention.config
    turn_SP = torch.complex(model.cos_SP, model.sin_SP)[: len(x_SD)]
    latent_SC, k_rope_SR = (x_SD @ attention.wkv_a.weight.T).split([config.kv_lora_rank, config.rope_head_dim], dim=-1)
    queries = x_SD @ attention.wq.weight.T if config.q_lora_rank is None else _low_rank_queries(attention, x_SD)
    keys_and_values = attention.kv_norm(latent_SC) @ attention.wkv_b.weight.T
    heads = []
    for q_SX, kv in zip(queries.chunk(config.num_heads, dim=-1), keys_and_values.chunk(config.num_heads, dim=-1)):
        q_SQ, q_SR = q_SX.split([config.nope_head_dim, config.rope_head_dim], dim=-1)
        k_SQ, v_SV = kv.split([config.nope_head_dim, config.v_head_dim], dim=-1)
        q_SP, k_SP = (torch.view_as_complex(t.reshape(len(x_SD), -1, 2)) * turn_SP for t in (q_SR, k_rope_SR))
        scores_SS = q_SQ @ k_SQ.T + (q_SP @ k_SP.conj().T).real
        rows = [(scores_SS[i, : i + 1] * attention_scale(config)).softmax(0) @ v_SV[: i + 1] for i in range(len(x_SD))]
        heads.append(torch.stack(rows))
    return torch.cat(heads, dim=-1) @ attention.wo.weight.T


def _low_rank_queries(attention: Attention, x_SD: Tensor) -> Tensor:
    return attention.q_norm(x_SD @ attention.wq_a.weight.T) @ attention.wq_b.weight.T


def test_attention_takes_any_share_of_the_heads(model: DeepSeekV3) -> None:
    whole = model.layers[0].attention
    x_BSD, tables = _draw(1, 4, TINY.dim), (model.cos_SP[:4], model.sin_SP[:4])
    total_BSD = torch.zeros(1, 4, TINY.dim)
    for half in range(2):
        share = DeepSeekV3(TINY).layers[0].attention
        share.load_state_dict(whole.state_dict())
        for name in ("wq_b", "wkv_b"):
            getattr(share, name).weight = nn.Parameter(getattr(whole, name).weight.chunk(2)[half])
        share.wo.weight = nn.Parameter(whole.wo.weight.chunk(2, dim=1)[half])
        total_BSD = total_BSD + share(x_BSD, *tables)
    assert torch.allclose(total_BSD, whole(x_BSD, *tables), atol=1e-6)


def test_a_token_does_not_see_those_after_it(model: DeepSeekV3) -> None:
    tokens = torch.randint(0, 256, (1, 8), generator=torch.Generator().manual_seed(2))
    changed = tokens.clone()
    changed[0, 5] += 1
    before, after = model(tokens), model(changed)
    assert torch.allclose(before[:, :5], after[:, :5], atol=1e-6)
    assert not torch.allclose(before[:, 5:], after[:, 5:], atol=1e-3)


# the mixture of experts


@pytest.mark.parametrize(
    "config", [TINY, SOFTMAX, replace(TINY, num_limited_groups=4, top_k=5)], ids=["v3", "v2", "all groups"]
)
def test_a_mixture_is_that_of_each_token_written_out(config: ModelConfig) -> None:
    moe = DeepSeekV3(config).init_weights(0).layers[1].moe
    bias_E = _draw(config.num_experts, seed=3) * 0.1
    if config.score_function == "sigmoid":
        moe.balance.bias_E.copy_(bias_E)
    x_BSD = _draw(2, 6, config.dim)
    expected = torch.stack([_mixture_by_hand(moe, x_D, config) for x_D in x_BSD.flatten(0, 1)]).reshape(x_BSD.shape)
    assert torch.allclose(moe.eval()(x_BSD), expected, atol=1e-6)


def _mixture_by_hand(moe: MoE, x_D: Tensor, config: ModelConfig) -> Tensor:
    logits = (moe.router.gate.weight @ x_D).tolist()
    is_sigmoid = config.score_function == "sigmoid"
    total = sum(torch.tensor(logits).exp().tolist())
    scores = [float(torch.tensor(z).sigmoid()) if is_sigmoid else float(torch.tensor(z).exp()) / total for z in logits]
    judged = [score + bias for score, bias in zip(scores, moe.balance.bias_E.tolist())]
    size = config.num_experts // config.num_groups
    groups = [sorted(range(g * size, (g + 1) * size), key=lambda e: -judged[e]) for g in range(config.num_groups)]
    best = 2 if is_sigmoid else 1
    reached = sorted(groups, key=lambda group: -sum(judged[e] for e in group[:best]))[: config.num_limited_groups]
    chosen = sorted((e for group in reached for e in group), key=lambda e: -judged[e])[: config.top_k]
    norm = sum(scores[e] for e in chosen) if config.normalize_weights else 1.0
    y_D = moe.shared_experts(x_D)
    for e in chosen:
        h_F = F.silu(x_D @ moe.experts.w1[e]) * (x_D @ moe.experts.w3[e])
        y_D = y_D + scores[e] / norm * config.route_scale * (h_F @ moe.experts.w2[e])
    return y_D


def test_experts_work_with_a_share_of_the_weights() -> None:
    torch.manual_seed(0)
    whole, share = Experts(TINY), Experts(TINY)
    for name in ("w1", "w2", "w3"):
        setattr(share, name, nn.Parameter(getattr(whole, name)[2:5]))
    x_ND = _draw(6, TINY.dim)
    result = share(x_ND, torch.tensor([1, 0, 5]))
    assert torch.equal(result, whole(x_ND, torch.tensor([0, 0, 1, 0, 5, 0, 0, 0])))
    assert share(x_ND[:0], torch.zeros(3, dtype=torch.int64)).shape == (0, TINY.dim)


def test_the_router_computes_in_float32_in_a_bfloat16_model() -> None:
    router = DeepSeekV3(TINY).init_weights(0).layers[1].moe.router
    x_ND, bias_E = _draw(20, TINY.dim).bfloat16(), torch.zeros(TINY.num_experts)
    weights_NK, experts_NK = router.bfloat16()(x_ND, bias_E)
    wide_NK, same_NK = router.float()(x_ND.float(), bias_E)
    assert weights_NK.dtype == torch.float32 and torch.equal(weights_NK, wide_NK) and torch.equal(experts_NK, same_NK)


# the balance of load


def test_training_moves_the_bias_toward_experts_with_fewer_tokens() -> None:
    balance = Balance(replace(TINY, num_experts=4, num_groups=1, num_limited_groups=1, balance_rate=0.25))
    counts_E = torch.tensor([5, 0, 2, 1])  # the mean is 2
    balance(counts_E)
    balance(counts_E)
    assert balance.bias_E.tolist() == [-0.5, 0.5, 0.0, 0.5]
    balance.eval()(counts_E)
    assert balance.bias_E.tolist() == [-0.5, 0.5, 0.0, 0.5]


def test_the_balance_uses_the_counts_that_it_is_called_with() -> None:
    moe = DeepSeekV3(TINY).init_weights(0).layers[1].moe
    counts: list[Tensor] = []

    def as_if_summed_over_ranks(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        counts.append(args[0])
        return (torch.tensor([8, 0, 0, 0, 0, 0, 0, 0]),)

    moe.balance.register_forward_pre_hook(as_if_summed_over_ranks)
    x_BSD = _draw(2, 6, TINY.dim)
    experts_NK = moe.router(x_BSD.flatten(0, 1), moe.balance.bias_E)[1]
    moe(x_BSD)
    assert counts[0].dtype == torch.int64 and counts[0].tolist() == experts_NK.flatten().bincount(minlength=8).tolist()
    torch.testing.assert_close(moe.balance.bias_E, torch.tensor([-0.001] + [0.001] * 7))


def test_biases_even_out_the_load() -> None:
    moe = DeepSeekV3(replace(TINY, balance_rate=0.01, num_groups=1, num_limited_groups=1)).init_weights(0).layers[1].moe
    x_BSD = _draw(4, 64, TINY.dim) * 20
    counts: list[Tensor] = []
    moe.balance.register_forward_pre_hook(lambda _, args: counts.append(args[0]))
    with torch.no_grad():
        for _ in range(60):
            moe(x_BSD)
    assert counts[-1].max() - counts[-1].min() < (counts[0].max() - counts[0].min()) / 2


def test_biases_stay_float32_and_only_v3_saves_them() -> None:
    balance = Balance(TINY)
    balance.bias_E.fill_(0.123)
    assert balance.bfloat16().bias_E.dtype == torch.float32 and balance.bias_E[0] == torch.tensor(0.123)
    assert list(balance.state_dict()) == ["bias_E"] and list(Balance(SOFTMAX).state_dict()) == []
    assert Balance(TINY).to("meta").bias_E.is_meta


# the whole


def test_a_training_step_traces_on_fake_tensors_and_gives_eagers_numbers() -> None:
    model = DeepSeekV3(TINY).init_weights(0)
    parameters, biases = dict(model.named_parameters()), dict(model.named_buffers())
    tokens = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(4))

    def step(parameters: dict[str, Tensor], buffers: dict[str, Tensor], tokens: Tensor) -> list[Tensor]:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in parameters.items()}
        logits = torch.func.functional_call(model, leaves | buffers, (tokens,))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()))]

    def copies() -> dict[str, Tensor]:
        return {name: buffer.clone() for name, buffer in biases.items()}

    traced = make_fx(step, tracing_mode="fake")(parameters, copies(), tokens)
    ours, eagers = copies(), copies()
    for actual, expected in zip(traced(parameters, ours, tokens), step(parameters, eagers, tokens)):
        # torch 2.8 traces the composite of silu's gradient, which rounds otherwise than the kernel
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-7 if torch.__version__ < "2.9" else 0)
    assert all(torch.equal(ours[name], eagers[name]) for name in ours)
    assert any(buffer.any() for name, buffer in ours.items() if name.endswith("bias_E"))
    names = {str(node.target) for node in traced.graph.nodes}
    forbidden = ("nonzero", "bincount", "_local_scalar_dense", "aten.index.", "index_put", "unique")
    assert not [name for name in names if any(word in name for word in forbidden)]


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    first = DeepSeekV3(TINY).init_weights(0).state_dict()
    torch.manual_seed(6)
    second, other = DeepSeekV3(TINY).init_weights(0).state_dict(), DeepSeekV3(TINY).init_weights(1).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.1.moe.experts.w1"], other["layers.1.moe.experts.w1"])


def test_annotated_regions_change_no_number_and_say_what_is_missing(model: DeepSeekV3) -> None:
    annotated = DeepSeekV3(replace(TINY, annotate_regions=True)).init_weights(0).eval()
    tokens = torch.randint(0, 256, (1, 8))
    if hasattr(torch.fx.traceback, "annotate"):
        assert torch.equal(annotated(tokens), model(tokens))
    else:
        with pytest.raises(UnsupportedError, match=r"has no torch\.fx\.traceback\.annotate \(2\.10 and later have it\)"):
            annotated(tokens)


# from the papers and the public checkpoints' own counts
BILLIONS = {
    ("deepseek_v3", "16B"): 15.71,
    ("deepseek_v3", "236B"): 235.74,
    ("deepseek_v3", "671B"): 671.03,
    ("llama3", "1B"): 1.24,
    ("llama3", "8B"): 8.03,
    ("llama3", "70B"): 70.55,
    ("llama3", "405B"): 405.85,
}


@pytest.mark.once
@pytest.mark.parametrize(("name", "flavour"), BILLIONS)
def test_a_true_size_has_as_many_parameters_as_the_public_model(name: str, flavour: str) -> None:
    spec = get_model(name)
    with torch.device("meta"):
        model = spec.build(spec.flavour(flavour))
    assert round(sum(parameter.numel() for parameter in model.parameters()) / 1e9, 2) == BILLIONS[name, flavour]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_dense_layers": 62}, "62 of 61 layers are dense; expected 0 to num_layers"),
        ({"rope_head_dim": 3}, "rope_head_dim is 3; the rotary embedding needs an even width"),
        ({"num_shared_experts": 0}, "num_shared_experts is 0; expected 1 or more"),
        ({"rope_factor": 0.5}, "rope_factor is 0.5; expected 1, which is no YaRN, or more"),
        ({"num_experts": 12}, "num_experts is 12, which 8 groups do not divide; expected a multiple of num_groups"),
        ({"num_limited_groups": 9}, "a token reaches 9 of 8 groups; expected 1 to num_groups"),
        ({"top_k": 200}, "top_k is 200; the 4 groups that a token reaches have 128 experts, expected 1 to that"),
        ({"score_function": "tanh"}, "score_function is 'tanh'; expected 'sigmoid' or 'softmax'"),
        ({"num_experts": 8, "top_k": 4}, "a group has 1 expert; with sigmoid scores it is judged by its two best"),
        ({"score_function": "softmax"}, "balance_rate is 0.001; softmax scores have no bias to balance, expected 0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        ModelConfig(**sizes)
