"""What a scan of a code base says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from torchspan.cli import main
from torchspan.core.errors import InputError
from torchspan.scan import Scan, scan
from torchspan.scan._coverage import provided

pytestmark = pytest.mark.once

Scanned = Callable[..., Scan]


@pytest.fixture
def scanned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scanned:
    """Scan files given by name and text."""
    monkeypatch.chdir(tmp_path)

    def run(torch: str | None = None, **files: str) -> Scan:
        for name, text in files.items():
            Path(f"{name}.py").write_text(text)
        return scan(["."], torch)

    return run


def test_a_need_is_said_with_file_line_release_and_backport(scanned: Scanned) -> None:
    result = scanned(program="import torch\n\nfrom torch.fx.traceback import annotate\n")
    (finding,) = result.findings
    assert str(finding) == "program.py:3: torch.fx.traceback.annotate needs torch ≥ 2.10 — covered by backport annotate"
    assert result.summary == "1 file, 3 lines: needs torch ≥ 2.10; with torchspan runs on ≥ 2.8"
    assert (result.needs[0], result.runs[0], result.exit_code) == ("2.10", "2.8", 0)


def test_what_no_backport_covers_stands_in_the_way(scanned: Scanned) -> None:
    result = scanned(program="import torch\ntorch.compiler.keep_portable_guards_unsafe\n")
    (finding,) = result.uncovered
    assert finding.says == "needs torch ≥ 2.11 — not covered"
    assert result.exit_code == 1 and result.summary.endswith("needs torch ≥ 2.11")


def test_an_argument_is_a_need_and_is_covered_through_every_alias(scanned: Scanned) -> None:
    result = scanned(
        program="import torch.distributed.checkpoint as dcp\n"
        "dcp.async_save({}, async_stager=None)\n"
        "dcp.HuggingFaceStorageWriter('x', save_distributed=True)\n"
    )
    assert [(finding.line, finding.backport) for finding in result.of("covered")] == [(2, "async_save"), (3, "hf_storage")]
    assert result.findings[0].name == "torch.distributed.checkpoint.async_save(async_stager=)"


def test_an_argument_that_is_passed_on_is_judged_by_what_takes_it(scanned: Scanned) -> None:
    result = scanned(
        program="from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper\n"
        "checkpoint_wrapper(m, early_stop=False, anything=1)\n"
        "from torch.utils.checkpoint import checkpoint\n"
        "checkpoint(f, early_stop=False)\n"
    )
    assert [(finding.line, finding.backport) for finding in result.findings] == [(2, "checkpoint_early_stop"), (4, "")]


def test_only_what_the_given_release_lacks_is_found(scanned: Scanned) -> None:
    program = "import torch\ntorch.compiler.keep_portable_guards_unsafe\n"
    assert scanned("2.8", program=program).exit_code == 1
    newest = scanned("2.15.0", program=program)
    assert (newest.findings, newest.exit_code) == ((), 0)
    assert newest.summary.endswith("; runs on torch 2.15")
    assert scanned("2.8", program=program).summary.endswith("; does not run on torch 2.8")
    covered = scanned("torch==2.8.0+cpu", program="from torch.fx.traceback import annotate\n")
    assert covered.summary.endswith("; runs with torchspan on torch 2.8") and covered.exit_code == 0


def test_a_name_that_newer_releases_lack_is_said_to_be_gone(scanned: Scanned) -> None:
    name = "torch._functorch._aot_autograd.autograd_cache.BundledAOTAutogradCacheEntry"
    result = scanned(program=f"from {name.rpartition('.')[0]} import {name.rpartition('.')[2]}\n")
    assert result.findings[0].says.startswith("is in torch 2.8 to 2.9 only")
    assert result.exit_code == 1


def test_a_guarded_use_is_no_need(scanned: Scanned) -> None:
    result = scanned(program="try:\n  from torch.compiler import precompile\nexcept ImportError:\n  precompile = None\n")
    (finding,) = result.findings
    assert (finding.standing, finding.guard, result.exit_code) == ("guarded", "except ImportError", 0)
    assert "needs any torch" in result.summary


def test_a_name_of_no_release_is_unknown_and_does_not_fail(scanned: Scanned) -> None:
    result = scanned(program="import torch\ntorch.no_such_name\ntorch.zeros(1, no_such_argument=2)\n")
    (finding,) = result.findings
    assert (finding.name, finding.standing, result.exit_code) == ("torch.no_such_name", "unknown", 0)


def test_a_device_of_another_package_is_no_finding(scanned: Scanned) -> None:
    assert scanned(program="import torch\ntorch.npu.synchronize()\n").findings == ()


def test_the_same_name_in_a_file_is_one_line(scanned: Scanned) -> None:
    result = scanned(program="import torch\n" + "torch.compiler.keep_portable_guards_unsafe\n" * 3)
    assert len(result.uncovered) == 3
    (text,) = result.texts("uncovered")
    assert text.startswith("program.py:2: ") and text.endswith(" — not covered; also on lines 3, 4")


def test_names_of_a_module_that_a_backport_provides_are_covered(scanned: Scanned) -> None:
    result = scanned(program="from torch.compiler.precompile import capture\nimport torch\ntorch.compiler.precompile.load\n")
    assert result.exit_code == 0 and result.runs[0] == "2.8"
    assert {finding.backport for finding in result.findings} == {"compiler_precompile"}


def test_of_what_is_written_anew_it_says_how(scanned: Scanned) -> None:
    (finding,) = scanned(program="import torch\ntorch.compiler.load_compiled_function\n").uncovered
    assert "needs torch ≥ 2.9 — not covered: write torchspan.load(path, model)" in finding.says


def test_what_torchspan_alone_has_is_covered(scanned: Scanned) -> None:
    result = scanned(program="import torch\ntorch.Precompile\n")
    assert (result.findings[0].standing, result.runs[0], result.needs) == ("covered", "2.8", ())


def test_what_the_program_sets_itself_is_no_need(scanned: Scanned) -> None:
    result = scanned(one="import torch\ntorch.my_own = 1\n", two="import torch\nprint(torch.my_own)\n")
    assert result.findings == ()


def test_an_option_that_is_set_is_a_need(scanned: Scanned) -> None:
    result = scanned(program="import torch\ntorch._inductor.config.wrap_inductor_compiled_regions = True\n")
    assert [finding.backport for finding in result.findings] == ["inductor_compiled_code"]


def test_an_operator_that_a_backport_registers_is_covered(scanned: Scanned) -> None:
    result = scanned(program="import torch\nop = torch.ops.torch_attn._varlen_attn.default\n")
    assert [(f.name, f.backport) for f in result.findings] == [("torch.ops.torch_attn._varlen_attn", "varlen_attn")]


def test_what_a_backport_cannot_carry_is_not_covered(scanned: Scanned) -> None:
    refused = [(name, entry.refuses(name)) for entry in provided() for name in sorted(entry.names) if entry.refuses(name)]
    if not refused:
        pytest.skip("every name of every backport works")
    place, _, name = refused[0][0].rpartition(".")
    (finding,) = scanned("2.8", program=f"from {place} import {name}\n").findings
    assert finding.standing == "uncovered" and finding.says.endswith(f"{finding.backport}: {refused[0][1]}")


def test_a_file_that_cannot_be_read_is_said_and_the_others_are_scanned(scanned: Scanned) -> None:
    result = scanned(bad="import torch\nprint 'torch'\n", good="import torch\n", other="print 'nothing to see'\n")
    assert list(result.unreadable) == ["bad.py"] and result.unreadable["bad.py"].startswith("line 2:")
    assert (result.num_files, result.exit_code) == (3, 0)


def test_hidden_folders_and_environments_are_not_scanned(scanned: Scanned, tmp_path: Path) -> None:
    for name in (".hidden", "environment", "inside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.py").write_text("import torch\ntorch.no_such_name\n")
    (tmp_path / "environment" / "pyvenv.cfg").touch()
    assert [finding.path for finding in scanned().findings] == ["inside/x.py"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent.py"], "no file or folder 'absent.py' to scan, nor an installed package"),
        (["progam.py"], "nor an installed package of that name; did you mean 'program.py'?"),
        (["empty"], "no Python file in 'empty'"),
        (["bad.py"], "none of 1 files can be read; bad.py: line 1:"),
        (["program.py", "--torch", "banana"], "no torch release 'banana'; expected one from 2.6 to 2.15, such as 2.8"),
        (["program.py", "--torch", "2.81"], "did you mean '2.8'?"),
        (["program.py", "--torch", "2.5"], "no torch release '2.5'; expected one from 2.6 to 2.15"),
        ([], "the following arguments are required: path"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_that_says_what_to_do_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text("import torch\n")
    Path("bad.py").write_text("torch torch\n")
    Path("empty").mkdir()
    try:
        code = main(["scan", *arguments])
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert message in captured.err and len(captured.err.strip().splitlines()) == 1


def test_the_command_prints_lines_or_json_and_ends_with_1_where_something_is_uncovered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text("import torch\ntorch.compiler.keep_portable_guards_unsafe\n")
    assert main(["scan", "program.py"]) == 1
    drawn = capsys.readouterr().out
    assert "  program.py:2: torch.compiler.keep_portable_guards_unsafe needs torch ≥ 2.11 — not covered\n" in drawn
    assert drawn.endswith("1 file, 2 lines: needs torch ≥ 2.11\n")
    assert main(["scan", "program.py", "--json"]) == 1
    values = json.loads(capsys.readouterr().out)
    assert values["findings"][0] | {"says": ""} == {
        "path": "program.py",
        "line": 2,
        "name": "torch.compiler.keep_portable_guards_unsafe",
        "has": ["2.11", "2.12", "2.13", "2.14", "2.15"],
        "standing": "uncovered",
        "says": "",
        "backport": "",
        "guard": "",
    }
    assert values["needs"] == ["2.11", "2.12", "2.13", "2.14", "2.15"]


def test_a_scan_imports_no_torch(run_python: Callable[..., object], tmp_path: Path) -> None:
    (tmp_path / "scanned.py").write_text("from torch.fx.traceback import annotate\n")
    run_python(
        """
        import sys
        from torchspan.scan import scan
        assert scan(["scanned.py"]).findings[0].backport == "annotate"
        assert "torch" not in sys.modules
        """
    )


def test_the_example_of_this_project_runs_with_torchspan() -> None:
    example = Path(__file__).resolve().parents[2] / "examples" / "newer_cuda_gpt.py"
    result = scan([example], "2.8")
    assert result.exit_code == 0 and {finding.backport for finding in result.findings} == {"annotate", "checkpoint_early_stop"}


def test_no_torch_release_in_the_python_api_is_an_error() -> None:
    with pytest.raises(InputError, match=r"expected one from 2\.6 to 2\.15"):
        scan([__file__], "3.0")


def test_a_member_of_a_subclass_is_no_need_where_the_class_has_moved(scanned: Scanned) -> None:
    text = "from torch.distributed.tensor import Placement\ndef f(p: Placement):\n    return p.is_shard() and p.dim\n"
    assert not scanned(program=text).findings
