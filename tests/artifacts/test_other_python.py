"""An artifact made on one Python is refused on another by the entry that names both, and loads again where it was made."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ENVIRONMENTS = Path(__file__).resolve().parents[2] / ".envs"
MODEL = """
import torch

def build():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
"""
MAKE = """
import torch, torchspan
from a_model import build
torchspan.precompile(build(), (torch.ones(2, 3),), compiler="eager").save("model.tspan")
"""
LOAD = """
import torch, torchspan
from a_model import build
from torchspan.core.errors import ManifestMismatchError
try:
    fast = torchspan.load("model.tspan", build())
except ManifestMismatchError as refused:
    print(refused)
else:
    print("equal" if torch.equal(fast(torch.ones(2, 3)), build()(torch.ones(2, 3))) else "other numbers")
"""


def _other_python() -> tuple[str, Path] | None:
    """The version and the path of another Python with this torch, of the environments that dev.py has made."""
    torch_version = torch.__version__.partition("+")[0]
    for folder in sorted(ENVIRONMENTS.glob(f"*torch-{torch_version}")):
        name = folder.name.partition("-")[0]
        version = name.removeprefix("py") if name.startswith("py") else "3.11"
        if version != f"{sys.version_info[0]}.{sys.version_info[1]}" and (folder / "installed").exists():
            return version, folder / "bin" / "python"
    return None


@pytest.mark.once
def test_an_artifact_of_another_python_is_refused_and_loads_where_it_was_made(run_python, tmp_path: Path) -> None:
    other = _other_python()
    if other is None:
        pytest.skip("needs an environment with another Python: 'PYTHON=3.13 python3 dev.py shell' makes one")
    version, python = other
    (tmp_path / "a_model.py").write_text(MODEL)

    here, there = f"{sys.implementation.name} {sys.version_info[0]}.{sys.version_info[1]}", f"cpython {version}"
    run_python(MAKE)
    argv = [str(python), "-c", LOAD + MAKE + LOAD]
    process = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False)
    assert process.returncode == 0, process.stdout + process.stderr
    refused, loaded = process.stdout.splitlines()
    assert f"entry 'python': made for {here}, this is {there}" in refused and "Rebuild it: torchspan precompile " in refused
    assert loaded == "equal"
    refused = run_python(LOAD).stdout
    assert f"entry 'python': made for {there}, this is {here}" in refused and "Rebuild it: torchspan precompile " in refused
