"""Port programs for CUDA and run the result without torchspan: what is suggested without a word is held to run.

    python tools/port_programs.py                      # the programs of tests/report/programs.txt
    python tools/port_programs.py one_liners seeds     # two of them
    python tools/port_programs.py --constructs         # the constructs of tests/devices/cuda_constructs.jsonl
    python tools/port_programs.py a/train.py b/eval.py # programs of your own, without arguments

Each program is run with the device rules in force, as on a machine that has a CPU alone, ported by what it asked for, and its
ported form is run with torch alone; both in forks of one process. It is held to print the same. Programs of which a part is
said to be work by hand are counted, and not run again. The last line is JSON: for each program ``same``, ``by hand`` or what
is wrong.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch._dynamo
import torch.profiler

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment
from torchspan.report._page import Run, make_page
from torchspan.report._port import _ported
from torchspan.report._portable import Porter
from torchspan.report._source import Source

ROOT = Path(__file__).resolve().parents[1]


def read_programs(path: Path) -> dict[str, str]:
    """The programs of a file, by name."""
    parts = path.read_text("utf-8").split("=== ")[1:]
    return {part.partition("\n")[0].strip(): part.partition("\n")[2] for part in parts}


def read_constructs(path: Path) -> dict[str, str]:
    """The constructs that run, each as a program; what a tensor answers is not ported."""
    constructs = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {c["id"]: f"import torch\n{c['before']}\n{c['body']}\n" for c in constructs if c["kind"] == "runs"}


def in_a_fork(work: Callable[[], str]) -> str:
    """What `work` gives, or its traceback, from a fork of this process."""
    reader, writer = os.pipe()
    if child := os.fork():
        os.close(writer)
        with os.fdopen(reader, encoding="utf-8", errors="replace") as pipe:
            text = pipe.read()
        return text if os.waitpid(child, 0)[1] == 0 else f"died\n{text}"
    signal.alarm(60)
    with os.fdopen(writer, "w", encoding="utf-8", errors="replace") as pipe:
        try:
            pipe.write(work())
        except BaseException:  # noqa: BLE001 a program may do anything
            pipe.write(f"raised\n{traceback.format_exc()}")
    os._exit(0)


def executed(path: Path) -> str:
    """What a program prints."""
    printed = io.StringIO()
    sys.argv = [str(path)]
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
        exec(compile(path.read_text("utf-8"), str(path), "exec"), {"__name__": "__main__", "__file__": str(path)})
    return printed.getvalue()


def original(path: Path) -> str:
    """JSON: what a program prints under the device rules, its ported form, and how much of that is work by hand."""
    report = Report()
    with Environment(device_patches(Facts(), "auto", report), report):
        output = executed(path)
    (ported, *_) = _ported(path, make_page(report, Run(folder=str(path.parent)), [str(path)]).files)
    unported = [f"{statement.source.strip()}: {'; '.join(statement.notes)}" for statement in ported.left]
    return json.dumps({"output": output, "text": ported.text, "left": unported})


def outcome(path: Path, folder: Path) -> dict[str, object]:
    """How a program fares."""
    text = in_a_fork(lambda: original(path))
    if text.startswith(("raised", "died")):
        return {"outcome": "the original fails", "why": text}
    values = json.loads(text)
    Porter(Source("", values["text"]))  # it is Python, whatever is left to do
    if values["left"]:
        return {"outcome": "by hand", "why": values["left"]}
    place = folder / "ported.py"
    place.write_text(values["text"], encoding="utf-8")
    ported = in_a_fork(lambda: executed(place))
    if ported != values["output"]:
        return {"outcome": "differs", "why": f"{values['output']}\n--- ported:\n{ported}\n--- text:\n{values['text']}"}
    return {"outcome": "same", "why": ported}


def programs(arguments: list[str], folder: Path) -> Iterator[tuple[str, Path]]:
    """The programs that are asked for, each a file."""
    files = [Path(argument) for argument in arguments if argument.endswith(".py")]
    yield from ((str(file), file) for file in files)
    if "--constructs" in arguments:
        texts = read_constructs(ROOT / "tests" / "devices" / "cuda_constructs.jsonl")
    else:
        texts = read_programs(ROOT / "tests" / "report" / "programs.txt")
    names = [argument for argument in arguments if not argument.startswith("--") and not argument.endswith(".py")]
    for name, text in texts.items():
        if name in names or not (names or files):
            place = folder / f"{len(name)}_{name.replace('.', '_')}.py"
            place.write_text(text, encoding="utf-8")
            yield name, place


def main() -> None:
    """Run them all."""
    torch.set_num_threads(1)
    outcomes = {}
    with tempfile.TemporaryDirectory() as name:
        for program, path in programs(sys.argv[1:], Path(name)):
            outcomes[program] = outcome(path, Path(name))
            print(f"{program}: {outcomes[program]['outcome']}", file=sys.stderr)
            if outcomes[program]["outcome"] not in ("same", "by hand"):
                print(f"{program}: {outcomes[program]['outcome']}\n{outcomes[program]['why']}", file=sys.stderr)
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
