"""Run the constructs and the programs for CUDA on a machine whose accelerator is the device in ``second_device/``; a table.

``python tests/devices/run_on_second_device.py [name …]``: all, or the constructs (``constructs``) and programs that are named.
A program's numbers are compared with those of the same program on the CPU, bit by bit, where it draws nothing on the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
PROGRAMS = {
    "prefetch_cuda.py": "cpu",
    "recurrent_cuda.py": "cpu",
    "checkpointed_cuda.py": "cpu",
    "generate_cuda.py": "cpu",
    "ddp_nccl.py": "torchspan",
    "sync_batch_norm.py": "torchspan",
    "train_cuda.py": "",
    "diffusion_cuda.py": "",
    "finetune_cuda.py": "",
    "newer_cuda_gpt.py": "",
}
"""Each program, and what its numbers are compared with: its own run on the CPU, by its argument or by torchspan."""
KNOWN: dict[str, str] = json.loads((HERE / "second_device" / "known.json").read_text())


def environ(*, is_second: bool) -> dict[str, str]:
    """The environment of a program on the one machine or on the other."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")}
    paths = [str(HERE / "second_device")] if is_second else []
    return variables | {"TORCHSPAN": "1", "PYTHONPATH": os.pathsep.join([*paths, variables.get("PYTHONPATH", "")])}


def lines_of(name: str, *arguments: str, is_second: bool) -> list[str]:
    """The lines with numbers that a program prints; raises where it fails."""
    folder = HERE.parents[1] / "examples" if name == "newer_cuda_gpt.py" else HERE / "programs"
    launcher = RANKS if name in ("ddp_nccl.py", "sync_batch_norm.py") else []
    command = [sys.executable, "-W", "ignore", *launcher, str(folder / name), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environ(is_second=is_second), check=False)
    if process.returncode:
        raise RuntimeError(process.stderr[-2000:])
    return [line for line in process.stdout.splitlines() if line and "peer ranks" not in line]  # those are gloo's


def run_program(name: str) -> str:
    """What came of a program."""
    try:
        result = lines_of(name, is_second=True)
        if not PROGRAMS[name]:
            return "runs to its end; draws on the device"
        other = lines_of(name, *(["cpu"] if PROGRAMS[name] == "cpu" else []), is_second=False)
    except RuntimeError as failed:
        return f"FAILED: {failed}"
    return "the CPU's numbers, to the last bit" if result == other else f"OTHER NUMBERS: {result} {other}"


def run_constructs() -> list[tuple[str, str]]:
    """What came of the constructs: how many pass, and each that does not."""
    command = [sys.executable, "-W", "ignore", str(HERE / "run_constructs.py"), str(HERE / "cuda_constructs.jsonl"), "--second"]
    variables = environ(is_second=False) | {"TORCHSPAN": "0"}
    process = subprocess.run(command, capture_output=True, text=True, env=variables, check=True)
    answer: dict[str, str] = json.loads(process.stdout.splitlines()[-1])
    failed = {name: text for name, text in answer.items() if text}
    failures = [(name, KNOWN.get(name, f"FAILED: {text[-500:]}")) for name, text in failed.items()]
    return [("constructs", f"{len(answer) - len(failed)} of {len(answer)} pass"), *failures]


def main() -> None:
    """Run what is named, else all."""
    names = sys.argv[1:] or ["constructs", *PROGRAMS]
    for name in names:
        for subject, outcome in run_constructs() if name == "constructs" else [(name, run_program(name))]:
            print(f"| {subject} | {outcome} |", flush=True)


if __name__ == "__main__":
    main()
