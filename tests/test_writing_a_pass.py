"""Passes outside the repository: the docs' snippets, and a package that an entry point makes known."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def test_what_the_page_shows_is_run(run_python: Callable[..., Any]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "writing_a_pass.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 7
    assert "3 pairs left out" in run_python("\n".join(blocks)).stdout


def test_a_pass_of_another_package_is_listed_and_trains(tmp_path: Path, run_python: Callable[..., Any]) -> None:
    package = tmp_path / "site"
    shutil.copytree(ROOT / "examples" / "pass_outside", package)
    points = re.search(
        r"^\[project\.entry-points\.\"(.*?)\"\]\n(.*?)\n\n", (package / "pyproject.toml").read_text(), re.M | re.S
    )
    assert points is not None
    installed = package / "cancel_transposes-0.1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: cancel-transposes\nVersion: 0.1.0\n")
    (installed / "entry_points.txt").write_text(f"[{points[1]}]\n" + points[2].replace('"', "") + "\n")
    process = run_python(
        """
        import json, sys
        from torchspan.cli import main
        from torchspan.passes import describe_passes

        sys.stderr = sys.stdout
        assert main(["passes"]) == 0
        flags = ["llama3", "tiny", "--training.steps", "1", "--training.seq-len", "16", "--training.global-batch-size", "2"]
        for name, passes in (("with", ["--compile.passes", "cancel_transposes"]), ("without", ["--no-compile"])):
            assert main(["train", *flags, *passes, "--losses", f"{name}.json"]) == 0
        """,
        env={"PYTHONPATH": os.pathsep.join(filter(None, (str(package), os.environ.get("PYTHONPATH"))))},
    )
    assert "cancel_transposes" in process.stdout and re.search(r"\d+ pairs of transposes left out", process.stdout)
    losses = [json.loads((tmp_path / f"{name}.json").read_text())["losses"] for name in ("with", "without")]
    assert losses[0] == losses[1]
