"""Set everything up on a machine that has Python, and run the demo or the tests.

    python3 dev.py demo     train examples/newer_cuda_gpt.py under torchspan
    python3 dev.py test     run the tests (more arguments go to pytest)
    python3 dev.py test-all run every test, also those that a faster one covers
    python3 dev.py shell    print the command that activates the environment

TORCH=2.8.0 in front takes another torch than the pinned default, PYTHON=3.13 another Python than the one that runs this file.
Environments are kept in .envs/, one for each pair: torch-2.13.0 has Python 3.11, py3.13-torch-2.13.0 has Python 3.13.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent
DEFAULT_TORCH, DEFAULT_PYTHON = "2.13.0", "3.11"
OLDEST, NEWEST_EXCLUDED = (3, 10), (3, 14)


def main(argv: list[str]) -> int:
    """Run one command; returns its exit code."""
    commands = {"demo": demo, "test": test, "test-all": test_all, "shell": shell}
    if not argv or argv[0] not in commands:
        print(__doc__)
        return 2
    if not OLDEST <= sys.version_info[:2] < NEWEST_EXCLUDED:
        found = sys.version.split()[0]
        print(f"dev.py: this Python is {found}; torchspan needs 3.10 to 3.13: run it with one of those", file=sys.stderr)
        return 2
    return commands[argv[0]](argv[1:])


def demo(arguments: list[str]) -> int:
    """Train the example, which was written for CUDA and a newer torch, on what is here."""
    python = environment()
    return subprocess.call([python, "-m", "torchspan", "run", "examples/newer_cuda_gpt.py", *arguments], cwd=ROOT)


def test(arguments: list[str]) -> int:
    """Run the tests."""
    return subprocess.call([environment(), "-m", "pytest", *arguments], cwd=ROOT)


def test_all(arguments: list[str]) -> int:
    """Run every test that this torch and this machine can, also the slow ones that a faster one covers."""
    return test(["--exhaustive", *arguments])


def shell(arguments: list[str]) -> int:
    """Print how to activate the environment."""
    print(f"source {Path(environment()).parent / 'activate'}")
    return 0


def environment() -> str:
    """The Python of the environment for $TORCH and $PYTHON, made or brought up to date when pyproject.toml has changed."""
    torch = os.environ.get("TORCH") or DEFAULT_TORCH
    version, base = _interpreter(os.environ.get("PYTHON") or "")
    folder = ROOT / ".envs" / (f"torch-{torch}" if version == DEFAULT_PYTHON else f"py{version}-torch-{torch}")
    python = str(folder / "bin" / "python")
    stamp = folder / "installed"
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + str(ROOT).encode()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    uv = _uv()
    print(f"dev.py: installing torch {torch} for Python {version} into {folder.relative_to(ROOT)}", file=sys.stderr)
    _run(uv, "venv", "-q", "--clear", "--python", base, str(folder))
    links = [part for place in os.environ.get("PIP_FIND_LINKS", "").split() for part in ("--find-links", place)]
    _run(uv, "pip", "install", "-q", "--python", python, *links, f"torch=={torch}", "-e", ".[test]")
    stamp.write_text(wanted)
    return python


def _interpreter(wanted: str) -> tuple[str, str]:
    """The version and the path of a Python that is here: $PYTHON's, or the one that runs this file where that is empty."""
    running = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if wanted in ("", running):
        return running, sys.executable
    pyenv = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    on_path = shutil.which(f"python{wanted}")
    for path in ([on_path] if on_path else []) + sorted(str(found) for found in pyenv.glob(f"versions/{wanted}.*/bin/python")):
        answer = subprocess.run([path, "-c", "import sys; print(sys.version)"], capture_output=True, text=True, check=False)
        if answer.stdout.startswith(f"{wanted}."):  # a shim of pyenv is there for every version, and runs those in use only
            return wanted, path
    sys.exit(f"dev.py: PYTHON is {wanted!r}; expected a version such as 3.13, as python3.13 on the PATH or among pyenv's")


def _uv() -> str:
    """uv, which installs in seconds what pip installs in minutes; brought by pip into an environment of its own."""
    tools = ROOT / ".envs" / "tools"
    uv = tools / "bin" / "uv"
    if not uv.exists():
        venv.create(tools, with_pip=True, clear=True)
        _run(str(tools / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check", "uv")
    return str(uv)


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, check=False)
    if done.returncode:
        sys.exit(f"dev.py: '{' '.join(command)}' failed with exit code {done.returncode}; its message is above")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
