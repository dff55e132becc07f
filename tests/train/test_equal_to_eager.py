"""DeepSeek V3 as one graph: bit by bit eager's, in one process and on four gloo ranks that exchange tokens."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.capture.joint import is_supported

SCRIPT = Path(__file__).with_name("equal_to_eager.py")
IS_DEFAULT = torch.__version__.startswith("2.13")
NUM_BATCHES = 10 if IS_DEFAULT else 4
CAPTURES = "train_step,joint" if is_supported() else "train_step"
QUESTIONS = {
    "fsdp, tensor and expert parallel": (  # joint on other torches: in one process, below
        f"model=deepseek_v3 layout=2,2,2,1 captures={CAPTURES if IS_DEFAULT else 'train_step'} batches={NUM_BATCHES}"
    ),
    "copies, experts, bfloat16, gathered again": (
        "model=deepseek_v3 layout=2,1,2,2 dtype=bfloat16 reshard=always passes=transformer_block_bucketing batches=4"
    ),
}
OF_TWO_RANKS = {
    "a mask of documents": (  # of 64 bytes, one or two documents
        f"flavour=tiny_flex_attn layout=1,2,1,1 seq_len=64 captures={CAPTURES} passes=transformer_block_bucketing"
    ),
    "communication and memory": (
        f"layout=2,1,1,1 captures={CAPTURES} passes=remove_noops,fsdp_reshard_after_fwd,"
        "autobucketing_reordering{bucket_mb=0.02,first_mb=0.005},separate_process_groups"
    ),
    "recomputed collectives": "layout=1,2,1,1 passes=apply_sac{collectives=true} batches=2",
    "the sequence in chunks": "layout=1,2,1,1 batches=2 passes=async_tensor_parallel{min_rows=2}",
    # tiny rows, in bfloat16: at this size no bit differs in halves
    "experts in halves": "model=deepseek_v3 layout=2,1,2,1 dtype=bfloat16 passes=overlap_expert_parallel{exact=false}",
}
AT_MOST = {
    "communication and memory": {"all_gather_into_tensor": 19, "reduce_scatter_tensor": 11},
}
EXACTLY = {
    "recomputed collectives": {"all_gather_into_tensor": 11 + 4},  # of attention and feed-forward of two blocks
    "the sequence in chunks": {"all_gather_into_tensor": 20},
    "experts in halves": {"all_to_all_rows": 16},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, launch: Any) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("equal") / "answers.json"
    launch(4, str(SCRIPT), str(out), *"/".join(QUESTIONS.values()).split())
    return dict(zip(QUESTIONS, json.loads(out.read_text())))


@pytest.fixture(scope="module")
def answers_of_two(tmp_path_factory: pytest.TempPathFactory, launch: Any) -> dict[str, dict[str, Any]]:
    out = tmp_path_factory.mktemp("equal") / "answers.json"
    launch(2, str(SCRIPT), str(out), *"/".join(OF_TWO_RANKS.values()).split())
    return dict(zip(OF_TWO_RANKS, json.loads(out.read_text())))


@pytest.mark.parametrize("name", OF_TWO_RANKS)
def test_passes_give_eagers_bits_on_both_of_two_ranks(answers_of_two: dict[str, Any], name: str) -> None:
    for capture, result in answers_of_two[name].items():
        assert result["differing"] == [], capture
        counts = result["collectives"]
        assert all(counts[kind] <= most for kind, most in AT_MOST.get(name, {}).items()), counts
        assert counts.items() >= EXACTLY.get(name, {}).items()


def test_one_process_gives_eagers_bits_for_ten_batches(tmp_path: Path) -> None:
    out = tmp_path / "answers.json"
    question = f"model=deepseek_v3 captures={CAPTURES} batches=10"
    subprocess.run([sys.executable, str(SCRIPT), str(out), *question.split()], check=True, timeout=400)
    for capture, answer in json.loads(out.read_text())[0].items():
        assert answer["differing"] == [], capture
        assert answer["losses"][-1] < answer["losses"][0] - 0.3


@pytest.mark.parametrize("name", QUESTIONS)
def test_four_ranks_give_eagers_bits_on_every_rank(answers: dict[str, Any], name: str) -> None:
    for capture, result in answers[name].items():
        assert result["differing"] == [], capture


@pytest.mark.parametrize("name", QUESTIONS)
def test_experts_get_other_numbers_of_tokens_in_each_batch_and_one_gets_none(answers: dict[str, Any], name: str) -> None:
    for result in answers[name].values():
        first, starved = result["counts"][0], result["counts"][-1]
        assert first != starved and all(0 not in layer for layer in first[:1])
        assert all(layer[1] == 0 for layer in starved)
        assert {sum(layer) for layer in first + starved} == {4 * 16 * 2}, "two experts for each of all ranks' tokens"


def test_ranks_exchange_tokens_by_one_operator_however_many_there_are(answers: dict[str, Any]) -> None:
    result = answers["fsdp, tensor and expert parallel"]["train_step"]
    # two layers of experts, forward and backward, there and back; once for the numbers of rows of each
    assert result["collectives"]["all_to_all_rows"] == 8 and result["collectives"]["all_to_all_single"] == 2


def test_the_backward_gathers_again_and_blocks_move_together(answers: dict[str, Any]) -> None:
    result = answers["copies, experts, bfloat16, gathered again"]["train_step"]
    assert result["collectives"]["all_gather_into_tensor"] == 11 and result["collectives"]["reduce_scatter_tensor"] == 6
    # two ranks hold copies: the sums of gradients over them move together, too; the others are of counts of tokens
    assert result["collectives"]["all_reduce"] == 12
