"""The proof of a port: the program under torchspan and its ported form without it, side by side, and what each prints."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchspan.core.errors import InputError
from torchspan.report._port import Ported, port_program_as_run


@dataclass(frozen=True)
class Ending:
    """How one run ended: its exit code, what it printed, and what it said on standard error."""

    code: int
    output: str
    errors: str

    @property
    def last_words(self) -> str:
        """The last line of standard error, which names an exception where there was one."""
        return next((line for line in reversed(self.errors.splitlines()) if line.strip()), "")


@dataclass(frozen=True)
class Proof:
    """Both runs. The port is proved where they end alike and print the same."""

    original: Ending
    ported: Ending

    @property
    def is_same(self) -> bool:
        """Whether both ended alike and printed the same."""
        return (self.original.code, self.original.output) == (self.ported.code, self.ported.output)

    @property
    def difference(self) -> str:
        """The lines that one printed and the other did not, as a diff."""
        texts = (self.original.output.splitlines(), self.ported.output.splitlines())
        return "\n".join(difflib.unified_diff(*texts, "original under torchspan", "ported without", lineterm=""))


def prove(
    script: Path, arguments: Sequence[str], device: str = "auto", apply: Callable[[list[Ported]], object] = lambda ported: None
) -> tuple[list[Ported], Proof]:
    """Run `script` under torchspan, port it by what it asked for, and run the ported program without torchspan.

    Args:
        script: the program; both runs are in the current folder.
        arguments: its own, the same for both.
        device: what torchspan gives the original.
        apply: called with the ported files before they are run.

    Raises:
        InputError: the original did not come to the point where its report is written.
    """
    with tempfile.TemporaryDirectory(prefix="torchspan-port-") as folder:
        report = Path(folder, "report.json")
        options = ("--quiet", "--compile", "off", "--device", device, "--report", str(report))
        original = _run([sys.executable, "-m", "torchspan", "run", *options, str(script), *arguments])
        if not report.exists():
            raise InputError(f"{str(script)!r} left no report: exit code {original.code}; {original.last_words}")
        ported = port_program_as_run(script, report)
        apply(ported)
        copy = Path(folder, "program")
        mirror(script.absolute().parent, {each.path: each.text for each in ported}, copy)
        return ported, Proof(original, _run([sys.executable, str(copy / script.name), *arguments]))


def mirror(folder: Path, texts: dict[Path, str], copy: Path) -> None:
    """Make `copy` of `folder` by links, but for the files in `texts`, which are written."""
    copy.mkdir()
    for entry in os.scandir(folder):
        path, place = Path(entry.path), copy / entry.name
        if path in texts:
            place.write_text(texts[path], encoding="utf-8", errors="surrogateescape")
        elif any(changed.is_relative_to(path) for changed in texts) and entry.is_dir():
            mirror(path, texts, place)
        elif entry.name != "__pycache__":
            place.symlink_to(path)


def _run(command: Sequence[str]) -> Ending:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environ, check=False)
    return Ending(done.returncode, done.stdout, done.stderr)
