"""Models of Transformers under a bounded compile: they train and generate as eagerly, with caches that grow with each token."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

import torchspan
from torchspan.core.report import Report
from torchspan.jobs.budget import Budget
from torchspan.regions.signature import signature, tensors_of
from torchspan.regions.transformers import OwnLayer, layer_index, own_layer
from torchspan.regions.verify import mismatch
from torchspan.strategies import compile_bounded

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning"),  # torch 2.13, inductor
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings(
        "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
    ),  # dynamo, after a break
]
BUDGET = Budget(seconds=200, memory="6GiB")
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def ids(length: int = 9) -> torch.Tensor:
    return torch.randint(3, 60, (2, length), generator=torch.Generator().manual_seed(1))


def numbers(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(2))


def language(name: str, **sizes: Any) -> tuple[nn.Module, dict[str, Any]]:
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **sizes})
    return getattr(transformers, f"{name}ForCausalLM")(config), {"input_ids": ids(), "labels": ids()}


def llama() -> tuple[nn.Module, dict[str, Any]]:
    return language("Llama")


def qwen() -> tuple[nn.Module, dict[str, Any]]:
    return language("Qwen3", head_dim=8)


newer_transformers = pytest.mark.skipif(
    sys.version_info < (3, 11),
    reason="5.20, the last Transformers for Python 3.10, has products of experts whose first compile fails",
)


def mixtral() -> tuple[nn.Module, dict[str, Any]]:
    return language("Mixtral", num_local_experts=4, num_experts_per_tok=2)


def gathered_mixtral() -> tuple[nn.Module, dict[str, Any]]:
    return language("Mixtral", num_hidden_layers=1, num_local_experts=2, num_experts_per_tok=1, output_router_logits=True)


def t5() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), {"input_ids": ids(), "labels": ids(5)}


def vit() -> tuple[nn.Module, dict[str, Any]]:
    config = transformers.ViTConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=16,
        patch_size=4,
        problem_type="single_label_classification",  # else the first call writes it there, and the second is compiled anew
    )
    inputs = {"pixel_values": numbers(2, 3, 16, 16), "labels": torch.tensor([0, 1])}
    return transformers.ViTForImageClassification(config), inputs


def whisper() -> tuple[nn.Module, dict[str, Any]]:
    layers = {f"{side}_{what}": num for side in ("encoder", "decoder") for what, num in (("layers", 2), ("attention_heads", 4))}
    config = transformers.WhisperConfig(
        vocab_size=64,
        num_mel_bins=8,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        d_model=32,
        max_source_positions=20,
        max_target_positions=24,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        **layers,
    )
    inputs = {"input_features": numbers(2, 8, 40), "labels": ids(5)}
    return transformers.WhisperForConditionalGeneration(config), inputs


def made(model: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    return model()


def losses(model: nn.Module, inputs: dict[str, Any], num_steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(3)
    values = []
    for _ in range(num_steps):
        loss = model.train()(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        values.append(loss.item())
    return values


def outcomes(report: Report) -> list[tuple[str, str]]:
    return [(attempt.region, attempt.outcome) for attempt in report.attempts]


def choices(report: Report) -> list[str]:
    return [decision.choice for decision in report.decisions]


def check_training(model: Any, inputs: dict[str, Any], regions: list[str], **settings: Any) -> None:
    """Losses are eager's, and all `regions` were compiled once each and stayed so."""
    eager = copy.deepcopy(model)
    bounded = compile_bounded(model, wait=True, budget=BUDGET, **settings)
    assert losses(bounded, inputs) == pytest.approx(losses(eager, inputs), rel=1e-4)
    assert outcomes(bounded.report) == [(region, "compiled") for region in regions]
    assert not any("guards failed" in decision.reason or decision.choice == "eager" for decision in bounded.report.decisions)


def test_blocks_that_fill_a_cache_train_as_eagerly_with_one_compile_for_all() -> None:
    check_training(*made(llama), ["LlamaDecoderLayer ×2"], strategy="per_block")


@pytest.mark.parametrize(
    ("model", "strategy", "regions"),
    [
        (vit, "whole", ["ViTForImageClassification"]),
        pytest.param(whisper, "per_block", ["WhisperEncoderLayer ×2", "WhisperDecoderLayer ×2"], marks=pytest.mark.once),
        pytest.param(mixtral, "per_block", ["MixtralDecoderLayer ×2"], marks=[pytest.mark.once, newer_transformers]),
        pytest.param(qwen, "per_block", ["Qwen3DecoderLayer ×2"], marks=pytest.mark.once),
        pytest.param(gathered_mixtral, "whole", ["MixtralForCausalLM"], marks=pytest.mark.once),
        pytest.param(t5, "per_block", ["T5Block ×1", "T5Block ×2"] * 2, marks=pytest.mark.once),
    ],
)
def test_models_of_every_kind_train_as_eagerly(
    model: Callable[[], tuple[nn.Module, dict[str, Any]]], strategy: str, regions: list[str]
) -> None:
    check_training(*made(model), regions, strategy=strategy, backend="aot_eager")


@pytest.mark.once
@pytest.mark.parametrize("wanted", ["output_router_logits", "output_hidden_states"])
def test_calls_whose_inner_results_are_gathered_run_eagerly_and_give_each_once(wanted: str) -> None:
    eager, inputs = made(mixtral)
    inputs[wanted] = True
    bounded: Any = compile_bounded(copy.deepcopy(eager), strategy="per_block", wait=True, backend="aot_eager")
    assert losses(bounded, inputs) == losses(eager, inputs)
    gathered = wanted.removeprefix("output_")
    assert len(bounded(**inputs)[gathered]) == len(eager(**inputs)[gathered])
    reasons = [decision.reason for decision in bounded.report.decisions if decision.choice == "eager"]
    assert len(reasons) == 1 and "gathered by hooks" in reasons[0] and not bounded.report.attempts


@pytest.mark.parametrize(
    ("model", "strategy"),
    [
        (llama, "per_block"),
        pytest.param(whisper, "per_block", marks=pytest.mark.once),
        pytest.param(lambda: language("Llama", num_hidden_layers=1), "whole", marks=pytest.mark.once),
    ],
)
def test_a_cache_that_grows_with_each_token_is_compiled_once_for_all_lengths(
    model: Callable[[], tuple[nn.Module, dict[str, Any]]], strategy: str
) -> None:
    eager, inputs = made(model)
    inputs.pop("labels")
    wanted = {"max_new_tokens": 12, "do_sample": False}
    expected = eager.eval().generate(**inputs, **wanted)
    bounded: Any = compile_bounded(eager, strategy=strategy, wait=True, budget=BUDGET, backend="aot_eager")
    assert torch.equal(bounded.generate(**inputs, **wanted), expected)
    compiles = len(bounded.report.attempts)
    assert {outcome for _, outcome in outcomes(bounded.report)} == {"compiled"}
    assert compiles <= 4 and "dynamic" in choices(bounded.report)  # a prompt, a first token, all others
    assert torch.equal(bounded.generate(**inputs, **wanted), expected)
    assert len(bounded.report.attempts) == compiles


def test_a_bounded_model_is_still_one_of_transformers(tmp_path: Path) -> None:
    model, inputs = made(llama)
    bounded: Any = torchspan.compile(model, strategy="eager")
    assert isinstance(bounded, transformers.PreTrainedModel) and isinstance(bounded, transformers.LlamaForCausalLM)
    assert bounded.config is model.config and list(bounded.state_dict()) == list(model.state_dict())
    bounded.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is transformers.LlamaForCausalLM
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in loaded.state_dict().items())
    out = bounded(**inputs, output_hidden_states=True)
    assert type(out) is transformers.modeling_outputs.CausalLMOutputWithPast and len(out.hidden_states) == 3
    assert torch.equal(out.logits, model(**inputs).logits)
    bounded.resize_token_embeddings(70)
    assert model(**inputs).logits.shape[-1] == bounded(**inputs).logits.shape[-1] == 70


# a block and its own layer of a cache

# Transformers 5.24 renamed the argument, and warns of the old name
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


def filled(model: Any) -> DynamicCache:
    """A cache after nine tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids(), **{CACHE: cache})
    return cache


def block_call(model: Any, cache: Any) -> dict[str, Any]:
    x = numbers(2, 1, 32)
    position = torch.full((2, 1), 9)
    angles = model.model.rotary_emb(x, position_ids=position)
    return {"hidden_states": x, "position_embeddings": angles, CACHE: cache}


@pytest.mark.once
def test_a_block_computes_the_same_with_its_own_layer_of_a_cache_and_the_whole_cache_gets_it() -> None:
    model, _ = made(llama)
    block = model.eval().model.layers[1]
    expected_cache, cache = filled(model), filled(model)
    expected = block(**block_call(model, expected_cache))
    own = own_layer(block, layer_index(block), (), block_call(model, cache))
    assert own is not None and own.block is not block and len(own.kwargs[CACHE].layers) == 1
    with own.running():
        outputs = own.block(**own.kwargs)
    assert torch.equal(outputs, expected)
    assert [layer.keys.shape[2] for layer in cache.layers] == [9, 10]
    assert all(torch.equal(a, b) for a, b in zip(tensors_of((cache,), {}), tensors_of((expected_cache,), {}), strict=True))
    assert block.self_attn.layer_idx == 1 and own.block.self_attn.layer_idx == 0
    assert own.block.self_attn.q_proj is block.self_attn.q_proj


@pytest.mark.once
def test_blocks_look_alike_to_a_compiler_and_what_their_forward_keeps_stays_with_them() -> None:
    model, _ = made(llama)
    calls = [OwnLayer(block, i, (), block_call(model, filled(model))) for i, block in enumerate(model.model.layers)]
    keys = {signature(own.block, own.args, own.kwargs) for own in calls}
    assert len(keys) == 1
    with calls[1].running():
        calls[1].block.self_attn.note = "kept"
    assert model.model.layers[1].self_attn.note == "kept" and not hasattr(model.model.layers[0].self_attn, "note")


@pytest.mark.once
def test_a_cache_of_encoder_and_decoder_is_taken_apart_and_filled_from_empty() -> None:
    layers = [transformers.cache_utils.DynamicLayer() for _ in range(4)]
    for i, layer in enumerate(layers):
        layer.update(numbers(1, 1, i + 1, 2), numbers(1, 1, i + 1, 2))
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    cache.self_attention_cache.layers, cache.cross_attention_cache.layers = layers[:2], layers[2:3]
    block = nn.Module()
    block.layer_idx = 1
    own = OwnLayer(block, 1, (cache,), {})
    (mine,) = own.args
    assert mine.self_attention_cache.layers == [layers[1]] and mine.cross_attention_cache.layers == []
    with own.running():
        mine.cross_attention_cache.update(numbers(1, 1, 5, 2), numbers(1, 1, 5, 2), 0)
        mine.is_updated[0] = True
    assert [layer.keys.shape[2] for layer in cache.cross_attention_cache.layers] == [3, 5]
    assert cache.is_updated == {1: True}
    assert own.whole((numbers(1), mine))[1] is cache


@pytest.mark.once
def test_code_that_is_wrong_in_what_it_leaves_in_a_cache_only_is_noticed() -> None:
    def right(target: Any, cache: DynamicCache, factor: float = 1.0) -> torch.Tensor:
        cache.update(factor * numbers(1, 1, 2, 2), numbers(1, 1, 2, 2), 0)
        return numbers(3)

    def wrong(target: Any, cache: DynamicCache) -> torch.Tensor:
        return right(target, cache, 1.01)

    call: Any = (None, (DynamicCache(),), {})
    assert mismatch(right, right, call, is_random=False) is None
    assert "argument" in (mismatch(right, wrong, call, is_random=False) or "")


@pytest.mark.once
def test_a_gradient_that_is_zero_but_for_rounding_is_no_mismatch_and_a_wrong_one_is() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))  # the norm takes away what the bias adds
    call: Any = (model, (numbers(4, 3, 16, 16),), {})

    def plain(target: Any, x: torch.Tensor) -> torch.Tensor:
        return target(x)

    def otherwise(target: Any, x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        conv = target[0]
        columns = nn.functional.unfold(x, 3).flip(-1)  # summed in another order
        y = (conv.weight.flatten(1) @ columns).flip(-1).view(4, 8, 14, 14)
        scaled = conv.bias * factor + (1 - factor) * conv.bias.detach()
        weight = target[1].weight * factor + (1 - factor) * target[1].weight.detach()
        normal = nn.functional.batch_norm(
            y + scaled[:, None, None], target[1].running_mean, target[1].running_var, weight, target[1].bias, training=True
        )
        target[1].num_batches_tracked += 1
        return normal

    assert mismatch(plain, otherwise, call, is_random=False) is None
    wrong = mismatch(plain, lambda *call: otherwise(*call, factor=0.9), call, is_random=False)
    assert wrong is not None and wrong.startswith("gradient[2]")
