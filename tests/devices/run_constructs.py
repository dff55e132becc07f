"""Run each construct of a list in a fork of one process that has imported torch; print what went wrong with each, as JSON.

Run as a program of its own: ``python run_constructs.py list.jsonl``. Two constructs run at a time. With ``--second`` they run
on a machine whose accelerator is the device in ``second_device/``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.compile_fx
import torch.distributed.device_mesh
import torch.profiler

from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts, gather
from torchspan.environment.scope import Environment

IS_SECOND = "--second" in sys.argv
if IS_SECOND:
    sys.path.insert(0, str(Path(__file__).parent / "second_device"))
    import second_device

    second_device.load()


def run(construct: dict[str, str]) -> None:
    """Run `before`, put the device rules in force, and run `body` with the same names.

    `kind` "answers" is for what the masquerade gives.
    """
    names: dict[str, object] = {"torch": torch, "__name__": "__main__"}
    exec(construct["before"], names)
    report = Report()
    masquerade = construct["kind"] == "answers"
    facts = gather(has_tools=False) if IS_SECOND else Facts()
    Environment(device_patches(facts, "auto", report, masquerade=masquerade), report).activate()
    exec(construct["body"], names)


def start(construct: dict[str, str], result: Path) -> int:
    """Fork a child that writes what went wrong to `result`; its process id."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    signal.alarm(200)
    try:
        run(construct)
    except BaseException:  # noqa: BLE001 a construct may do anything
        result.write_text(traceback.format_exc())
    else:
        result.write_text("")
    os._exit(0)


def main() -> None:
    """Run them all."""
    constructs = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    gc.freeze()  # so that a child's collector does not copy the parent's memory
    with tempfile.TemporaryDirectory() as folder:
        running: set[int] = set()
        for number, construct in enumerate(constructs):
            running.add(start(construct, Path(folder, str(number))))
            if len(running) == 2:
                running.discard(os.wait()[0])
        while running:
            running.discard(os.wait()[0])
        files = {construct["id"]: Path(folder, str(number)) for number, construct in enumerate(constructs)}
        print(json.dumps({name: file.read_text() if file.exists() else "died" for name, file in files.items()}))


if __name__ == "__main__":
    main()
