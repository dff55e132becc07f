"""The launcher, and what is told before and after it starts ranks: mistakes, places, failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from torchspan.core.errors import InputError
from torchspan.train import main
from torchspan.train._place import Ranks, choose_place, place_of_group
from torchspan.train._rank import telling_launcher
from torchspan.train.check import check, degrees_of
from torchspan.train.config import Parallelism, from_environment, parse_config
from torchspan.train.launch import launch
from torchspan.train.launch import main as launch_main

ROOT = Path(__file__).resolve().parents[2]
SHARD, TP = "--parallelism.data_parallel_shard_degree", "--parallelism.tensor_parallel_degree"
REPLICATE, EP = "--parallelism.data_parallel_replicate_degree", "--parallelism.expert_parallel_degree"


# mistakes


@pytest.mark.parametrize(
    ("num_ranks", "argv", "message"),
    [
        (1, "--training.stepps 5", r"Unrecognized options: --training\.stepps, 5; perhaps --training\.steps\?"),
        (1, "--training.steps five", r"Error parsing --training\.steps: invalid literal"),
        (1, "--training.gradient_accumulation_steps 0", r"--training\.gradient_accumulation_steps is 0; expected 1 or more"),
        (1, "--training.threads -1", r"--training\.threads is -1; expected 0, which leaves torch's choice, or more"),
        (1, "--parallelism.reshard_after_forward maybe", "invalid choice 'maybe'"),
        (1, "--activation_checkpoint.mode some", "invalid choice 'some'"),
        (1, "--activation_checkpoint.mode selective --activation_checkpoint.selective_ac_option x", "expected op, or a"),
        (1, "--activation_checkpoint.memory_budget 0.3", "memory_budget is given with mode none; expected mode memory_budget"),
        (1, "--activation_checkpoint.mode memory_budget --no-compile", "which is planned on a captured graph"),
        (1, "--activation_checkpoint.mode full --compile.passes apply_sac", "the same in two ways"),
        (1, "--module deepseek_v3 --activation_checkpoint.mode full --no-compile", "experts twice: expected none"),
        (1, "--check-for 0", r"--check-for is 0; expected the number of ranks"),
        (1, "--compile.budget_seconds 0", r"--compile\.budget_seconds is 0; expected more than 0"),
        (1, "--compile.budget_memory much", "'much' is no size in bytes; expected a number and a unit"),
        (1, "--module lama3", "no model 'lama3'; did you mean 'llama3'"),
        (1, "--config debugmodle", "no config of llama3 'debugmodle'; did you mean 'debugmodel'"),
        (1, "--compile.passes bucketing", "no pass 'bucketing'"),
        (1, "--compile.joint_passes regional_inducto", "no pass 'regional_inducto'; did you mean 'regional_inductor'"),
        (1, "--compile.passes regional_inductor{nodules=x}", "no option of pass 'regional_inductor' 'nodules'"),
        (1, "--compile.passes regional_inductor,transformer_block_bucketing", "write transformer_block_bucketing,regional_ind"),
        (
            1,
            "--compile.joint_passes regional_inductor --compile.passes transformer_block_bucketing",
            "'regional_inductor' changes what runs the graph and so comes after what changes how ranks talk",
        ),
        (4, f"{SHARD} 3", "are 3 processes, this job has 4; set the degrees so that their product is 4"),
        (4, f"{TP} 3", "are 3 processes, this job has 4"),
        (4, f"{REPLICATE} 3", "are 3 processes, this job has 4"),
        (4, f"{SHARD} 0", r"data_parallel_shard_degree is 0; expected 1 or more, or -1"),
        (4, f"{TP} 0", r"--parallelism\.tensor_parallel_degree is 0; expected 1 or more"),
        (4, f"{TP} 4", "num_kv_heads is 2, which tp 4 does not divide"),
        (4, f"{EP} 3", "which does not divide dp_shard 4 × tp 1"),
        (4, f"{EP} 2", r"--parallelism\.expert_parallel_degree is 2; llama3 tiny has no experts: expected 1"),
        (2, f"{TP} 2 --training.seq_len 15", r"--training\.seq_len is 15, which tp 2 does not divide"),
        (1, "--training.seq-len 129", r"--training\.seq_len is 129; llama3 tiny takes at most 128"),
        (3, "", r"global_batch_size is 8, which 3 data-parallel ranks do not divide; expected a multiple of 3"),
        (4, "--training.gradient_accumulation_steps 4", "which 4 data-parallel ranks with 4 micro-batches each do not divide"),
        (1, "--training.dataset nowhere.txt", r"cannot read the dataset nowhere\.txt"),
        (1, "--training.dataset /dev/null", "the dataset /dev/null has 0 tokens, a sequence needs 129"),
        (1, "--losses nowhere/losses.json", "no folder 'nowhere' to write 'losses.json' into"),
        (1, f"--compile.dump {__file__}", r"--compile\.dump is the file .*; expected a folder"),
    ],
)
def test_a_mistake_is_one_line_before_any_rank_is_started(num_ranks: int, argv: str, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        _check(num_ranks, argv)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2


def _check(num_ranks: int, argv: str) -> None:
    config = parse_config(["llama3", "tiny", *argv.split()])
    assert config is not None
    check(config, num_ranks)


def test_the_same_check_stands_before_a_launch_and_before_training(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["llama3", "tiny", TP, "4"]
    assert launch_main(["4", *argv], {}) == 2
    output = capsys.readouterr().err
    assert output == "torchspan: num_kv_heads is 2, which tp 4 does not divide; expected a multiple of 4\n"
    with pytest.raises(InputError, match="num_kv_heads is 2, which tp 4 does not divide"):
        main([*argv, "--check-for", "4"])
    assert launch_main(["many"], {}) == 2 and "the number of ranks is 'many'; expected 1 or more" in capsys.readouterr().err


def test_a_check_that_finds_nothing_says_what_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["llama3", "tiny", TP, "2", "--compile.passes", "transformer_block_bucketing", "--check-for=4"]) == 0
    assert capsys.readouterr().out == "llama3 tiny fits 4 ranks: dp_shard 2 × tp 2; passes: transformer_block_bucketing\n"
    assert launch_main(["4", "llama3", "tiny", "--check-for=1"], {}) == 0  # and starts no rank
    assert capsys.readouterr().out == "llama3 tiny fits 1 rank; passes: none\n"


def test_a_shard_degree_of_minus_one_takes_what_the_others_leave() -> None:
    degrees = degrees_of(Parallelism(data_parallel_replicate_degree=2, tensor_parallel_degree=2, expert_parallel_degree=4), 16)
    assert (degrees.dp_replicate, degrees.dp_shard, degrees.tp, degrees.ep) == (2, 4, 2, 4)


def test_run_train_tells_a_mistake_in_one_line_and_imports_no_torch_for_an_unknown_option() -> None:
    process = _run_train("--training.stepps=5", MODEL="compiler_toolkit.llama3", CONFIG="compiler_toolkit_llama3_debugmodel")
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr.startswith("torchspan: Unrecognized options: --training.stepps") and process.stderr.count("\n") == 1
    code = "import sys, torchspan.train.launch as l; l.main(['2', '--nope'], {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


@pytest.mark.once
def test_run_train_tells_of_a_size_that_does_not_fit_in_one_line() -> None:
    process = _run_train("--config", "tiny", f"{TP}=3", CONFIG="nothing that there is")
    assert (process.returncode, process.stdout) == (2, "")
    assert "are 3 processes, this job has 2" in process.stderr and process.stderr.count("\n") == 1


def _run_train(*argv: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(ROOT / "run_train.sh"), *argv],
        env={**os.environ, "NGPU": "2", "PYTHON": sys.executable, **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_environment_names_model_and_config_and_a_flag_wins() -> None:
    flags = from_environment({"MODULE": "llama3", "MODEL": "compiler_toolkit.deepseek_v3", "CONFIG": "tiny"})
    assert flags == ["--module", "llama3", "--config", "tiny"] and from_environment({}) == []
    toolkit = from_environment({"CONFIG": "compiler_toolkit_deepseek_v3_debugmodel_flex_attn"})
    assert toolkit == ["--config", "debugmodel_flex_attn"]
    config = parse_config([*flags, "--config", "debugmodel"])
    assert config is not None and config.config == "debugmodel"


def test_dashes_and_underscores_write_the_same_flag() -> None:
    assert parse_config(["--training.seq-len=7", "--no-compile"]) == parse_config(["--training.seq_len=7", "--no_compile"])


# places


@pytest.mark.parametrize(
    ("num_gpus", "has_nccl", "ranks", "device", "reason"),
    [
        (0, False, Ranks(), "cpu", "no CUDA GPU is here"),
        (0, True, Ranks(1, 2, 1, 2), "cpu", "no CUDA GPU is here"),
        (1, False, Ranks(), "cuda:0", "a CUDA GPU is here"),
        (8, True, Ranks(), "cuda:0", "a CUDA GPU is here"),
        (2, True, Ranks(1, 2, 1, 2), "cuda:1", "each rank of this machine has a GPU of its own"),
        (8, True, Ranks(13, 16, 5, 8), "cuda:5", "each rank of this machine has a GPU of its own"),
        (1, True, Ranks(1, 2, 0, 1), "cuda:0", "each rank of this machine has a GPU of its own"),
        (2, True, Ranks(3, 4, 3, 4), "cpu", "2 GPUs for 4 ranks here; NCCL needs one for each"),
        (2, False, Ranks(1, 2, 1, 2), "cpu", "this torch has no NCCL, by which 2 ranks on GPUs would talk"),
    ],
)
def test_a_rank_gets_a_gpu_of_its_own_where_each_can(
    num_gpus: int, has_nccl: bool, ranks: Ranks, device: str, reason: str
) -> None:
    place = choose_place(num_gpus, has_nccl, ranks)
    assert (place.device, place.reason) == (device, reason)
    assert place.backend == ("gloo" if device == "cpu" else "cpu:gloo,cuda:nccl")


def test_all_ranks_of_a_machine_choose_the_same_backend_and_other_gpus() -> None:
    for num_gpus in range(6):
        places = [choose_place(num_gpus, True, Ranks(rank, 4, rank, 4)) for rank in range(4)]
        assert len({(place.device_type, place.backend) for place in places}) == 1
        assert places[0].device_type == "cpu" or len({place.device for place in places}) == 4


def test_what_a_launcher_leaves_out_is_read_as_one_machine() -> None:
    assert Ranks.of({}) == Ranks(0, 1, 0, 1)
    assert Ranks.of({"RANK": "1", "WORLD_SIZE": "4"}) == Ranks(1, 4, 1, 4)
    with pytest.raises(InputError, match="WORLD_SIZE is 'four' in the environment; expected a whole number"):
        Ranks.of({"WORLD_SIZE": "four"})


def test_a_group_that_was_there_before_says_where_tensors_live() -> None:
    assert place_of_group("cpu:gloo,cuda:nccl", 2).device == "cuda:2"
    assert place_of_group("cpu:gloo,cuda:gloo", 2).device == "cpu"
    assert place_of_group("gloo", None).reason == "the process group was there before"


# failures: ranks that import no torch, so that a launch takes a second

RANK = """
import os, signal, subprocess, sys, time
from pathlib import Path
from torchspan.core.errors import InputError
from torchspan.train._rank import note_failure, telling_launcher
rank, how = int(os.environ["RANK"]), sys.argv[1]

def lost_connection():
    Path(sys.argv[2], f"waits-{rank}").touch()
    while not Path(sys.argv[2], "lost").exists():
        time.sleep(0.02)
    raise RuntimeError("Connection closed by peer")

def all_wait():
    while not all(Path(sys.argv[2], f"waits-{other}").exists() for other in (0, 2)):
        time.sleep(0.02)

with telling_launcher():
    if how == "well":
        print(f"rank {rank} of {os.environ['WORLD_SIZE']} is well")
        sys.exit(0)
    if rank != 1:
        if how == "sleeps":
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            Path(sys.argv[2], f"{rank}.part").write_text(f"{os.getpid()} {child.pid}")
            Path(sys.argv[2], f"{rank}.part").rename(Path(sys.argv[2], f"{rank}.pids"))
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(60)
        lost_connection()
    all_wait() if how != "sleeps" else time.sleep(60)
    lost = Path(sys.argv[2], "lost")
    if how == "ours" or how == "noted":
        error = InputError("a text\\nof two lines")
        if how == "noted":  # as in a process group that takes time to leave, while the others see that it is left
            note_failure(error)
            lost.touch()
            time.sleep(0.3)
        raise error
    if how == "foreign":
        raise ZeroDivisionError("by nothing")
    if how == "aborts late":
        note_failure(ZeroDivisionError("the cause"))
        time.sleep(0.3)
        os.abort()
    lost.touch()
    if how == "says no more":
        print("last words", flush=True)
        os._exit(7)
    os.kill(os.getpid(), int(how))
"""


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[int, float]]:
    """Launch three ranks of RANK, or two; the exit code, and the seconds that it took."""
    script = tmp_path_factory.mktemp("script") / "rank.py"
    script.write_text(RANK)

    def run(how: str, folder: Path, num_ranks: int = 3) -> tuple[int, float]:
        began = time.monotonic()
        code = launch([sys.executable, str(script), how, str(folder)], num_ranks, os.environ)
        return code, time.monotonic() - began

    return run


@pytest.mark.parametrize(
    ("how", "exit_code", "last_line"),
    [
        ("ours", 2, "torchspan: rank 1: a text of two lines"),
        ("noted", 2, "torchspan: rank 1: a text of two lines"),
        ("foreign", 1, "torchspan: rank 1: ZeroDivisionError: by nothing"),
        ("aborts late", 1, "torchspan: rank 1: ZeroDivisionError: the cause"),
        ("says no more", 7, "torchspan: rank 1 ended with exit code 7, without a message of its own; see the output above"),
        ("9", 137, "torchspan: rank 1 was ended by signal 9 (SIGKILL): somebody killed it, or the system did because memory"),
        ("11", 139, "torchspan: rank 1 was ended by signal 11 (SIGSEGV): a crash in compiled code"),
        ("6", 134, "torchspan: rank 1 was ended by signal 6 (SIGABRT)"),
    ],
)
def test_the_first_rank_that_fails_is_shown_and_the_others_end(
    launched: Callable[..., tuple[int, float]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    how: str,
    exit_code: int,
    last_line: str,
) -> None:
    code, seconds = launched(how, tmp_path)
    output = capfd.readouterr().err
    lines = output.splitlines()
    assert code == exit_code and lines[-1].startswith(last_line) and seconds < 20
    assert "Connection closed" not in output, "that is what the others saw of it"
    if how == "foreign":
        assert output.count("Traceback (most recent call last)") == 1 and 'raise ZeroDivisionError("by nothing")' in output
    else:
        assert len(lines) == (2 if "above" in last_line or how == "aborts late" else 1), output


def test_ranks_that_do_well_end_well_and_rank_0_alone_writes_to_the_terminal(
    launched: Callable[..., tuple[int, float]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched("well", tmp_path, 2)[0] == 0
    assert capfd.readouterr() == ("rank 0 of 2 is well\n", "")


def test_an_interrupt_ends_ranks_that_refuse_to_and_what_they_started(
    launched: Callable[..., tuple[int, float]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    results = [tmp_path / f"{rank}.pids" for rank in (0, 2)]

    def interrupt() -> None:
        while not all(path.exists() for path in results):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    code, seconds = launched("sleeps", tmp_path)
    thread.join()
    assert code == 128 + signal.SIGTERM and seconds < 20
    assert capfd.readouterr().err == "torchspan: interrupted by SIGTERM; the ranks are ended\n"
    pids = [int(pid) for path in results for pid in path.read_text().split()]
    survivors = [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    assert len(pids) == 4 and not survivors


def test_under_torchrun_an_error_of_ours_is_a_line_that_names_the_rank(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(SystemExit) as ended, telling_launcher():
        raise InputError("what was given")
    assert ended.value.code == 2 and capsys.readouterr().err == "torchspan: rank 3: what was given\n"
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(InputError, match="what was given"), telling_launcher():
        raise InputError("what was given")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_ranks_end_with_a_launcher_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(
        "import time\nfrom torchspan.train._rank import telling_launcher\n"
        "with telling_launcher():\n    print('here', flush=True)\n    time.sleep(60)\n"
    )
    starts = "import subprocess, sys; print(subprocess.Popen([sys.executable, sys.argv[1]]).pid, flush=True); input()"
    launcher = subprocess.Popen(
        [sys.executable, "-c", starts, str(tmp_path / "rank.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "TORCHSPAN_FAILURE_FILE": str(tmp_path / "0.json")},
    )
    with launcher:
        assert launcher.stdout is not None
        rank = psutil.Process(int(launcher.stdout.readline()))
        assert launcher.stdout.readline() == b"here\n"
        launcher.kill()
        deadline = time.monotonic() + 10
        while rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.02)
    assert not rank.is_running() or rank.status() == psutil.STATUS_ZOMBIE


# training that fails in the middle, on real ranks

TRAINING = """
import os, signal, sys
from torchspan import cli
from torchspan.core.errors import InputError
from torchspan.train.data import ByteTokens
batch = ByteTokens.batch

def failing(self, seed, step, *sizes):
    if step == 1 and os.environ["RANK"] == "1":
        if sys.argv[1] == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise InputError("the second batch cannot be read")
    return batch(self, seed, step, *sizes)

ByteTokens.batch = failing
sys.exit(cli.main(["train", "llama3", "tiny", "--no-compile", "--training.seq_len=16", "--training.threads=1"]))
"""


@pytest.mark.slow
@pytest.mark.once
@pytest.mark.parametrize(
    ("how", "exit_code", "line"),
    [
        ("raises", 2, "torchspan: rank 1: the second batch cannot be read"),
        ("killed", 137, "torchspan: rank 1 was ended by signal 9 (SIGKILL)"),
    ],
)
def test_a_rank_that_fails_in_a_step_is_the_one_that_is_shown(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], how: str, exit_code: int, line: str
) -> None:
    script = tmp_path / "training.py"
    script.write_text(TRAINING)
    assert launch([sys.executable, str(script), how], 2, {**os.environ, "OMP_NUM_THREADS": "1"}) == exit_code
    output = capfd.readouterr().err.splitlines()
    assert output[0].startswith("step 1  loss 5.5") and output[1].startswith(line) and len(output) == 2
