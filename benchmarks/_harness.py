"""What every benchmark shares: both sides timed in turn in one run, medians, one JSON file with machine, versions and date."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Row:
    """One comparison: `ours` over `theirs`, both in `unit`, medians of runs taken in turn; `goal` is a bound on the ratio.

    `spread` is the lowest and the highest ratio among the runs.
    """

    name: str
    ours: float
    theirs: float
    unit: str = "s"
    goal: float | None = None
    note: str = ""
    spread: tuple[float, float] | None = None

    @property
    def ratio(self) -> float:
        """Ours over theirs."""
        return self.ours / self.theirs


def arguments(description: str, **defaults: Any) -> argparse.Namespace:
    """``--out`` and one option for each default."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    for name, value in defaults.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=type(value), default=value)
    return parser.parse_args()


def in_turn(ours: Callable[[], float], theirs: Callable[[], float], repeats: int) -> tuple[float, float]:
    """Medians of `repeats` measurements of each side, taken in turn so that a busy machine hits both."""
    pairs = [(ours(), theirs()) for _ in range(repeats)]
    return statistics.median(a for a, _ in pairs), statistics.median(b for _, b in pairs)


def seconds(function: Callable[[], object]) -> float:
    """Wall seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def fresh_process(code: str, env: dict[str, str] | None = None) -> float:
    """What `code`, run in a fresh Python process, prints as its last line, as a number."""
    return float(_last_line(["-c", code], env))


def fresh_script(script: Path, args: list[str], env: dict[str, str] | None = None) -> Any:
    """What `script`, run in a fresh Python process, prints as its last line, read as JSON."""
    return json.loads(_last_line([str(script), *args], env))


def _last_line(command: list[str], env: dict[str, str] | None) -> str:
    """The last line that Python, in a fresh process, prints.

    Bytecode is kept from one process to the next, as it is for installed packages.
    """
    unset = ("TORCHSPAN", "PYTHONDONTWRITEBYTECODE")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(unset)}
    environ |= {"PYTHONPYCACHEPREFIX": str(Path(tempfile.gettempdir(), "torchspan-bytecode"))} | (env or {})
    process = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environ, check=False)
    if process.returncode:
        sys.exit(f"the measured program failed:\n{process.stderr}")
    return process.stdout.strip().splitlines()[-1]


def write(name: str, rows: list[Row], out: Path | None, **more: Any) -> None:
    """Draw the rows, and write them to `out` with what they were measured on, and whatever `more` there is to say."""
    draw(name, rows)
    if out is not None:
        save(name, rows, out, **more)


def draw(name: str, rows: list[Row]) -> None:
    """Draw the rows as a table."""
    table = Table(title=name, box=None, title_justify="left")
    for column in ("comparison", "torchspan", "other side", "ratio", "spread", "goal", "note"):
        table.add_column(column)
    for row in rows:
        goal = "-" if row.goal is None else f"≤ {row.goal:g}"
        spread = "-" if row.spread is None else "{:.3f} to {:.3f}".format(*row.spread)
        ours, theirs = f"{row.ours:.4g} {row.unit}", f"{row.theirs:.4g} {row.unit}"
        table.add_row(row.name, ours, theirs, f"{row.ratio:.3f}", spread, goal, row.note)
    Console().print(table)


def save(name: str, rows: list[Row], out: Path, **more: Any) -> None:
    """Write the rows to `out`, as `write` does."""
    result = {"benchmark": name, **machine(), **more, "rows": [_plain(row) for row in rows]}
    out.write_text(json.dumps(result, indent=1) + "\n")


def _plain(row: Row) -> dict[str, Any]:
    plain = asdict(row) | {"ratio": row.ratio}
    return plain if row.spread is not None else {name: value for name, value in plain.items() if name != "spread"}


def machine() -> dict[str, Any]:
    """What a figure depends on: date, versions and machine."""
    return {
        "date": date.today().isoformat(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.cuda.device_count()} CUDA devices",
    }
