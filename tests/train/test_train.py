"""Training in one process, and the command line of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.capture.joint import is_supported
from torchspan.core.errors import InputError, TorchspanError
from torchspan.core.report import Report
from torchspan.train import main
from torchspan.train.config import Compile, TrainConfig, Training, parse_config
from torchspan.train.data import ByteTokens, generated_text, part_of
from torchspan.train.job import Loss
from torchspan.train.loop import train

ROOT = Path(__file__).resolve().parents[2]
TINY = TrainConfig(config="tiny", training=Training(steps=5, global_batch_size=2, seq_len=16))


@pytest.mark.parametrize("capture", ["train_step", *(["joint"] if is_supported() else [])])
@pytest.mark.parametrize("passes", ["", "transformer_block_bucketing"])
def test_a_captured_graph_gives_the_losses_of_eager_bitwise(capture: Any, passes: str) -> None:
    eager = train(replace(TINY, compile=Compile(enable=False)))
    graph = train(replace(TINY, compile=Compile(capture=capture, passes=passes)))
    assert graph.losses == eager.losses and eager.losses[-1] < eager.losses[0]


def test_the_optimizer_in_the_graph_gives_the_losses_of_eager_bitwise() -> None:
    eager = train(replace(TINY, compile=Compile(enable=False)))
    graph = train(replace(TINY, compile=Compile(optimizer=True, passes="transformer_block_bucketing")))
    assert graph.losses == eager.losses


def test_micro_batches_and_the_optimizer_in_the_graph_exclude_each_other() -> None:
    with pytest.raises(InputError, match=r"gradient_accumulation_steps is 2; with --compile\.optimizer each run .* expected 1"):
        replace(TINY, training=replace(TINY.training, gradient_accumulation_steps=2), compile=Compile(optimizer=True))
    with pytest.raises(InputError, match=r"--compile\.optimizer .* expected it without --no-compile"):
        Compile(enable=False, optimizer=True)


def test_the_report_says_what_was_captured_and_what_each_pass_changed() -> None:
    report = Report()
    result = train(replace(TINY, compile=Compile(passes="transformer_block_bucketing")), report)
    assert result.report is report and report.figures["capture_s"] > 0
    topics = [(decision.topic, decision.choice) for decision in report.decisions]
    assert ("capture", "joint" if is_supported() else "train_step") in topics
    assert ("pass", "nothing changed") in topics


@pytest.mark.slow
def test_annotated_regions_are_compiled_in_a_child_within_the_budget(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    out = tmp_path / "out.json"
    flags = ["--training.steps", "2", "--training.seq-len", "16", "--training.global-batch-size", "2", "--losses", str(out)]
    run_python(
        None,
        *("-m", "torchspan", "train", "llama3", "tiny", "--compile.passes", "regional_inductor", *flags),
        env={"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    answer = json.loads(out.read_text())
    attempts = answer["report"]["attempts"]
    assert attempts and {attempt["outcome"] for attempt in attempts} <= {"compiled", "loaded"}, attempts
    assert any("feed_forward" in attempt["region"] for attempt in attempts)
    assert any("attention" in attempt["region"] for attempt in attempts)
    eager = train(replace(TINY, training=replace(TINY.training, steps=2), compile=Compile(enable=False)))
    assert answer["losses"] == pytest.approx(eager.losses, abs=1e-5)
    if not is_supported():  # and no annotate either
        assert any(decision["topic"] == "backport" for decision in answer["report"]["decisions"])


@pytest.mark.slow
def test_a_region_that_runs_out_of_its_budget_runs_as_it_is_and_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    config = replace(TINY, training=replace(TINY.training, steps=1))
    settings = Compile(passes="regional_inductor{modules=*.1.feed_forward}", budget_seconds=0.01)
    result = train(replace(config, compile=settings))
    assert {attempt.outcome for attempt in result.report.attempts} == {"timeout"}
    assert result.losses == train(replace(config, compile=Compile(enable=False))).losses


def test_help_is_printed_and_is_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert "--parallelism.data-parallel-shard-degree" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--training.stepps", "5"], r"Unrecognized options: --training\.stepps, 5; perhaps --training\.steps\?"),
        (["--training.steps", "five"], r"Error parsing --training\.steps: invalid literal .* 'torchspan train --help'"),
        (["--training.steps", "0"], r"--training\.steps is 0; expected 1 or more"),
        (["--compile.capture", "jiont"], r"invalid choice 'jiont'"),
        (["--module", "lama3"], "no model 'lama3'; did you mean 'llama3'"),
        (["llama3", "debugmodle"], "no config of llama3 'debugmodle'; did you mean 'debugmodel'"),
        (["--compile.passes", "bucketing"], "no pass 'bucketing'"),
        (["--parallelism.tensor_parallel_degree=2"], "dp_shard 1 × tp 2 are 2 processes, this job has 1"),
        (["llama3", "tiny", "--training.seq-len", "129"], r"--training\.seq_len is 129; llama3 tiny takes at most 128"),
        (["--training.dataset", "nowhere.txt"], r"cannot read the dataset nowhere\.txt"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], message: str) -> None:
    with pytest.raises(TorchspanError, match=message) as caught:
        main([*argv, "--no-compile"])
    assert "\n" not in str(caught.value) and isinstance(caught.value, InputError) and caught.value.exit_code == 2


def test_positions_and_flags_write_the_same_configuration() -> None:
    positions = parse_config(["llama3", "tiny", "--training.steps", "3"])
    assert positions == parse_config(["--module", "llama3", "--config", "tiny", "--training.steps=3"])
    assert parse_config(["--no-compile"]) == parse_config(["--compile.no-enable"])


def test_a_batch_depends_on_seed_and_step_alone_and_labels_follow_tokens() -> None:
    data = ByteTokens.of(generated_text(50))
    tokens_BS, labels_BS = data.batch(seed=1, step=2, batch_size=3, seq_len=8)
    assert torch.equal(tokens_BS[:, 1:], labels_BS[:, :-1])
    assert torch.equal(tokens_BS, data.batch(1, 2, 3, 8)[0]) and not torch.equal(tokens_BS, data.batch(1, 3, 3, 8)[0])
    parts = [part_of(torch.arange(6), rank, 3) for rank in range(3)]
    assert torch.equal(torch.cat(parts), torch.arange(6))
    with pytest.raises(InputError, match="the dataset has 3 tokens, a sequence needs 9"):
        ByteTokens.of("abc").batch(0, 0, 1, 8)


def test_a_dataset_of_ones_own_is_read(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day in April. " * 20)
    assert len(train(replace(TINY, training=replace(TINY.training, dataset=text, steps=1))).losses) == 1
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="expected a text file in UTF-8"):
        ByteTokens.load(tmp_path / "binary")


def test_the_loss_is_the_mean_over_the_whole_batch() -> None:
    class Zeros(torch.nn.Module):
        def forward(self, tokens_BS: torch.Tensor) -> torch.Tensor:
            return torch.zeros(*tokens_BS.shape, 256)

    tokens_BS = torch.zeros(2, 4, dtype=torch.long)
    assert Loss(Zeros(), num_tokens=16)(tokens_BS, tokens_BS).item() == pytest.approx(torch.tensor(256.0).log().item() / 2)


@pytest.mark.slow
@pytest.mark.once
def test_run_train_starts_ranks_as_the_readme_says(tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    out = tmp_path / "out.json"
    argv = "--module llama3 --config tiny --parallelism.data_parallel_shard_degree=2 --parallelism.tensor_parallel_degree=1"
    flags = (
        "--training.steps 2 --training.seq-len 16 --training.global-batch-size 2 --compile.passes transformer_block_bucketing"
    )
    process = subprocess.run(
        [str(ROOT / "run_train.sh"), *argv.split(), *flags.split(), "--losses", str(out)],
        env={**os.environ, "NGPU": "2", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    assert "step 2  loss" in process.stderr and "21 → 5" in process.stderr
    assert len(json.loads(out.read_text())["losses"]) == 2
