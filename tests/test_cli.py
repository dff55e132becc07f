"""The command line, as a user calls it: in fresh processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchspan.cli import main

TORCHSPAN = ("-m", "torchspan")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["doctr"], "no command 'doctr'; did you mean 'doctor'?"),
        (["doctor", "anotate"], "no backport 'anotate'; did you mean 'annotate'?"),
        (["run"], "no program to run; expected 'torchspan run script.py'"),
        (["run", "absent.py"], "no file 'absent.py' to run"),
        (["run", "-m", "absent.module"], "no module 'absent.module' to run"),
        (["run", "--budget-seconds", "0", "PROGRAM"], "budget of 0 seconds"),
        (["run", "--budget-memory", "4 gigs", "PROGRAM"], "'4 gigs' is no size in bytes"),
        (["run", "--device", "cudaa", "PROGRAM"], "'cudaa'"),
        (["run", "--disable", "anotate", "PROGRAM"], "did you mean 'annotate'?"),
        (["run", "--compile", "bonded", "PROGRAM"], "no --compile 'bonded'; did you mean 'bounded'?"),
        (["precompile", "absent:build", "--inputs", "float32[2]", "-o", "x.tspan"], "no module 'absent'"),
        (["precompile", "json", "--inputs", "float32[2]", "-o", "x.tspan"], "'json' names no model; expected module:factory"),
        (["precompile", "json:dump", "--inputs", "float33[2]", "-o", "x.tspan"], "float33"),
        (["precompile", "json:dmp", "--inputs", "float32[2]", "-o", "x.tspan"], "did you mean 'dump'?"),
        (
            ["precompile", "json:dump", "--inputs", "float32[2]", "-o", "x.tspan"],
            "'json:dump' cannot be called without arguments",
        ),
        (["precompile", "json:dump", "--inputs", "quint8[2]", "-o", "x.tspan"], "an example of quint8[2] cannot be made"),
        (["precompile", "types:SimpleNamespace", "--inputs", "int8[2]", "-o", "."], "'.' is a folder; name a file in it"),
        (["artifact", "show", "absent.tspan"], "no artifact 'absent.tspan'; 'torchspan precompile' makes one"),
        (["artifact", "shw", "absent.tspan"], "did you mean 'show'?"),
        (["train", "--module", "lama3"], "lama3"),
        (["train", "llama3", "debugmdel"], "did you mean 'debugmodel'?"),
        (["passes", "--jsn"], "unrecognized arguments: --jsn"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_says_what_to_do_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program.py"
    program.write_text("print('it ran')\n")
    monkeypatch.chdir(tmp_path)
    for name in ("", "_DEVICE", "_COMPILE", "_DISABLE", "_BUDGET_SECONDS", "_BUDGET_MEMORY"):
        monkeypatch.setenv(f"TORCHSPAN{name}", "")
    try:
        code = main([str(program) if argument == "PROGRAM" else argument for argument in arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert code == 2, captured
    assert message in captured.err and "it ran" not in captured.out
    assert len(captured.err.strip().splitlines()) == 1


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What a command prints, in this process: starting one that imports torch takes seconds."""

    def call(*arguments: str, code: int = 0) -> str:
        assert main(arguments) == code
        captured = capsys.readouterr()
        return captured.out + captured.err

    return call


def test_doctor_tells_what_is_here_and_explains_one_backport(printed: Callable[..., str]) -> None:
    import torch

    values = json.loads(printed("doctor", "--json"))
    assert values["facts"]["torch"] == torch.__version__
    states = {row["name"]: row["state"] for row in values["backports"]}
    assert states["annotate"] == ("backported" if torch.__version__.startswith(("2.8.", "2.9.")) else "native")
    assert values["strategies"]["eager"].startswith("Nothing is compiled") and "llama3" in values["models"]
    drawn = printed("doctor")
    assert torch.__version__ in drawn
    assert all(name in drawn for name in ("regional_inductor", "masquerade", "remove_noops", "per_block", "deepseek_v3"))
    explained = printed("doctor", "annotate")
    assert "torch 2.10" in explained and "https://github.com/pytorch/pytorch" in explained


def test_run_gives_the_program_its_arguments_exit_code_and_own_traceback(run_python, tmp_path: Path) -> None:
    program = tmp_path / "user_program.py"
    program.write_text("import sys\nprint(__name__, sys.argv[1:])\nsys.exit(int(sys.argv[2]))\n")
    process = run_python(None, *TORCHSPAN, "run", "--quiet", str(program), "--flag", "7", expect=7)
    assert process.stdout == "__main__ ['--flag', '7']\n"

    program.write_text("def fails():\n    raise ValueError('mine')\nfails()\n")
    process = run_python(None, *TORCHSPAN, "run", "--quiet", str(program), expect=1)
    lines = process.stderr.splitlines()
    assert lines[0] == "Traceback (most recent call last):" and lines[-1] == "ValueError: mine"
    assert "user_program.py" in lines[1] and "torchspan" not in process.stderr.replace(str(tmp_path), "")


def test_run_runs_a_module_and_reports_what_it_used(run_python, tmp_path: Path) -> None:
    (tmp_path / "user_module.py").write_text(
        "import torch\nfrom torch.fx.traceback import annotate\nprint(torch.ones(2, device='cuda').sum().item(), __name__)\n"
    )
    report = tmp_path / "report.json"
    process = run_python(None, *TORCHSPAN, "run", "--report", str(report), "-m", "user_module")
    assert process.stdout == "2.0 __main__\n"
    decisions = json.loads(report.read_text())["decisions"]
    (redirected,) = [d for d in decisions if d["topic"] == "device"]
    assert redirected["choice"] == "cpu" and redirected["site"].endswith("user_module.py:3")
    assert "user_module.py:3" in process.stderr and "redirected" in process.stderr


def test_the_variable_alone_activates_and_children_inherit_it(run_python) -> None:
    process = run_python(
        """
        import multiprocessing, torch
        def child():
            print(torch.zeros(1, device="cuda").device.type, hasattr(torch, "Precompile"))
        if __name__ == "__main__":
            child()
            worker = multiprocessing.get_context("spawn").Process(target=child)
            worker.start(); worker.join()
            raise SystemExit(worker.exitcode)
        """,
        env={"TORCHSPAN": "1"},
    )
    assert process.stdout.split() == ["cpu", "True"] * 2


def test_passes_are_listed_with_their_options(printed: Callable[..., str]) -> None:
    rows = json.loads(printed("passes", "--json"))
    assert {"transformer_block_bucketing", "regional_inductor"} <= {row["name"] for row in rows}
    assert all(row["summary"] for row in rows)
    assert "transformer_block_bucketing" in printed("passes")


@pytest.mark.once
def test_an_artifact_is_made_shown_verified_and_compared(
    run_python: Callable[..., Any], printed: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "models.py").write_text("import torch\n\ndef build():\n    return torch.nn.Linear(3, 2)\n")
    (tmp_path / "key").write_bytes(b"a secret of enough bytes")
    monkeypatch.chdir(tmp_path)
    make = (*TORCHSPAN, "precompile", "models:build", "--inputs", "float32[4,3]", "--compiler", "eager")
    run_python(None, *make, "--inputs", "float32[5,3]", "--weights", "--sign", "key", "-o", "one.tspan")
    run_python(None, *make, "-o", "other.tspan")
    shown = json.loads(printed("artifact", "show", "one.tspan", "--json"))
    assert shown["entries"]["rebuild"].startswith("torchspan precompile models:build --inputs 'float32[4,3]' --inputs")
    assert shown["entries"]["rebuild"].endswith("--compiler eager --weights --sign key -o one.tspan")
    assert len(shown["programs"]) == 2 and shown["signed_by"].startswith("hmac-sha256 ")
    assert "weights.safetensors" in printed("artifact", "show", "one.tspan")
    assert "It fits this torch and this machine." in printed("artifact", "verify", "one.tspan", "--trusted-key", "key")
    assert "is not signed" in printed("artifact", "verify", "other.tspan", "--trusted-key", "key", code=1)
    assert "the same entries and payloads" in printed("artifact", "diff", "one.tspan", "one.tspan")
    assert "weights.safetensors" in printed("artifact", "diff", "one.tspan", "other.tspan", code=1)
