"""The lower bound of torch in a project's pyproject.toml, and the scan of an installed package."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from torchspan.cli import main
from torchspan.core.errors import InputError
from torchspan.scan import scan
from torchspan.scan._requires import fix_requires

pytestmark = pytest.mark.once
USES = "from torch.fx.traceback import annotate\n"  # of torch 2.10; a backport covers it


def written(tmp_path: Path, pyproject: str, program: str = USES) -> tuple[str, str]:
    """What is in the pyproject.toml afterwards, and what was said."""
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "program.py").write_text(program)
    file = tmp_path / "pyproject.toml"
    file.write_text(pyproject)
    outcome = fix_requires(scan([tmp_path / "src"]), [tmp_path / "src"])
    return file.read_text(), outcome


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('dependencies = ["torch>=2.8"]', 'dependencies = ["torch>=2.10"]'),
        ('dependencies = ["torch"]', 'dependencies = ["torch>=2.10"]'),
        (
            "dependencies = [\n  'torch>=2.6,<2.16',  # the compiler\n]",
            "dependencies = [\n  'torch>=2.10,<2.16',  # the compiler\n]",
        ),
        (
            "dependencies = [\"torch~=2.7; python_version >= '3.10'\"]",
            "dependencies = [\"torch>=2.10; python_version >= '3.10'\"]",
        ),
        ('dependencies = ["numpy"]', 'dependencies = ["torch>=2.10", "numpy"]'),
        ("dependencies = []", 'dependencies = ["torch>=2.10"]'),
        ('dependencies = ["torch>=2.8", "torchspan"]', 'dependencies = ["torch>=2.8", "torchspan"]'),
        ('dependencies = ["torch>=2.6", "torchspan"]', 'dependencies = ["torch>=2.8", "torchspan"]'),
        ('dependencies = ["torch>=2.13"]', 'dependencies = ["torch>=2.13"]'),
        ('dependencies = ["numpy"]\n[project.optional-dependencies]\nx = ["torch"]', None),
    ],
)
def test_the_bound_is_what_is_needed_and_is_never_lowered(tmp_path: Path, before: str, after: str | None) -> None:
    head = '[build-system]\nrequires = ["hatchling"]\n\n[project]\nname = "torch-thing"\n'
    text, outcome = written(tmp_path, f"{head}{before}\n")
    assert text == head + (after or before.replace('["torch"]', '["torch>=2.10"]')) + "\n"
    assert ("left as it is" in outcome) == (before == after)


def test_a_project_that_needs_nothing_new_is_left_as_it_is(tmp_path: Path) -> None:
    text, outcome = written(tmp_path, '[project]\ndependencies = ["torch"]\n', "import torch\ntorch.ones(1)\n")
    assert '"torch"]' in text and outcome.endswith("in every torch from 2.6 on")


def test_without_a_project_it_says_what_to_write(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"write 'torch>=2\.10' where it lists its own"):
        written(tmp_path, "[tool.other]\nx = 1\n")


def test_where_no_release_has_all_nothing_is_written(tmp_path: Path) -> None:
    gone = "import torch\ntorch._functorch._aot_autograd.autograd_cache.BundledAOTAutogradCacheEntry\n"
    with pytest.raises(InputError, match="no one torch release has all"):
        written(tmp_path, '[project]\ndependencies = ["torch"]\n', USES + gone)


def test_the_command_writes_it_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(USES)
    Path("pyproject.toml").write_text('[project]\ndependencies = ["torch"]\n')
    assert main(["scan", ".", "--fix-requires"]) == 0
    assert capsys.readouterr().out.endswith("pyproject.toml: torch>=2.10\n")
    assert '"torch>=2.10"' in Path("pyproject.toml").read_text()


def test_an_installed_package_is_scanned_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_package" / "inner").mkdir(parents=True)
    (tmp_path / "some_package" / "__init__.py").touch()
    (tmp_path / "some_package" / "inner" / "module.py").write_text(USES)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name in ("some-package", "some_package"):
        (finding,) = scan([name]).findings
        assert Path(finding.path).name == "module.py"
    result = scan(["safetensors"])  # by its distribution
    assert result.num_files > 5 and "some_package" not in sys.modules
