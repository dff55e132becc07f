"""``torchspan scan`` of a code base, beside Python's own parser on the same files; goal: torchtitan's modules in under 5 s.

Both run on one thread, so what is measured is the CPU time of the whole process, its start included: another program on the
machine does not change it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import _harness as harness

SOURCE = Path(__file__).resolve().parents[1] / "src"
SCAN = """
import contextlib, io, time
from torchspan.cli import main
with contextlib.redirect_stdout(io.StringIO()):
    assert main(["scan", {path!r}]) in (0, 1)
print(time.process_time())
"""
PARSE = """
import ast, pathlib, time, warnings
warnings.simplefilter("ignore")
for path in pathlib.Path({path!r}).rglob("*.py"):
    ast.parse(path.read_bytes())
print(time.process_time())
"""


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__, repeats=5, path=str(SOURCE))
    files = list(Path(options.path).rglob("*.py"))
    if not files:
        sys.exit(f"no Python file in {options.path!r}; expected a folder such as that of torchtitan")
    num_lines = sum(file.read_bytes().count(b"\n") for file in files)
    ours, theirs = harness.in_turn(
        lambda: harness.fresh_process(SCAN.format(path=options.path)),
        lambda: harness.fresh_process(PARSE.format(path=options.path)),
        options.repeats,
    )
    note = f"{len(files)} files, {num_lines} lines: {num_lines / ours:.0f} lines a second; goal 5 s"
    name = f"scan of {Path(options.path).resolve().name}, database load included, over Python's parser alone"
    harness.write("scan_speed", [harness.Row(name, ours, theirs, note=note)], options.out)


if __name__ == "__main__":
    main()
