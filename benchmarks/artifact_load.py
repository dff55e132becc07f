"""Load and first step of an artifact over those of torch's own ways, in fresh processes; later steps over torch.compile's.

Two transformers, a very small and a small one, and Transformers' Llama with random weights, inference and training, each
contender in a process of its own (`_artifact_contenders.py`).

What is timed as "load + first step": from after ``import torch`` and the construction of model and input (with
``import transformers``), to the first result, in training to the first gradients of all parameters. What a way imports
(torchspan, dynamo, inductor), reads, opens, traces or compiles meanwhile counts for it. Bytecode and the system's file cache
are warm for all: each contender has run once before, and torch's precompiled C++ headers are there. One thread
(OMP_NUM_THREADS). A round runs every contender once, the quick ones three times in between. The JSON has both the clock's and
the processor's seconds (those of compilers too); the ratios are by the clock.

- cold: ``torch.compile`` with no caches; warm: with its caches on the disk, as an equal process left them.
- AOTInductor: the package by ``torch._inductor.aoti_load_package``, and by the C++ loader below it. It has the weights inside
  and checks no guards.
- the peer: ``torch.compiler.precompile`` where this torch has it, in the cache folder that its capture left, and in an empty
  one. In training it captures the backward too, so that its step is one call. A model that it refuses has its reason in the
  JSON, and no row.

Later steps: the artifact's and torch.compile's in turns of ten in one process, on one model, with one thread and with all. The
ratio is that of a process's medians; the row gives the median process.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import _harness as harness
import torch

SCRIPT = Path(__file__).with_name("_artifact_contenders.py")
QUICK = ("artifact", "eager", "aoti_raw")  # well under a second each: run three times a round
MADE = ("artifact", "warm", "aoti", "peer")  # have something to write first
GOALS = {
    "cold": ("cold torch.compile", 1 / 20),
    "warm": ("torch.compile with warm caches", 1 / 5),
    "eager": ("eager's first step", 2.0),
    "aoti": ("AOTInductor's load and first call", 1.0),
    "aoti_raw": ("AOTInductor's by its C++ loader", None),
    "peer": ("torch.compiler.precompile's", 0.5),
    "peer_cold": ("torch.compiler.precompile's, no caches", None),
}
MODELS = {
    "transformer": "2 blocks of width 64, 2 × 32 tokens",
    "nanogpt": "6 blocks of width 384, 4 × 128 tokens: what nanoGPT trains on Shakespeare",
    "llama": "Transformers' LlamaForCausalLM, 2 layers of width 256, 2 × 64 tokens",
}


@dataclass
class Case:
    """One model in one mode, with what its contenders left in `folder`."""

    model: str
    mode: str
    folder: Path
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    refused: str = ""  # by the peer, and why
    cpu: dict[str, list[float]] = field(default_factory=dict)

    @property
    def contenders(self) -> list[str]:
        """Who takes part."""
        names = ["artifact", "eager", "cold", "warm"]
        names += ["aoti", "aoti_raw"] if self.mode == "inference" else []
        has_peer = find_spec("torch.compiler.precompile") and not self.refused
        return names + (["peer", "peer_cold"] if has_peer else [])

    def make(self) -> None:
        """Write what the contenders load, and run each once for the bytecode and the file cache."""
        for name in self.contenders:
            if name in MADE:
                self._make(name)
            if name not in ("cold", "peer_cold") and name in self.contenders:
                self._run("first", name)

    def _make(self, name: str) -> None:
        try:
            self._run("make", name)
        except SystemExit as failed:
            if name != "peer":
                raise
            self.refused = str(failed).strip().splitlines()[-1]

    def round(self) -> None:
        """Run every contender once, the quick ones three times in between."""
        figures: dict[str, list[float]] = {name: [] for name in self.contenders}
        slow = [name for name in self.contenders if name not in QUICK]
        for turn in range(3):
            for name in [name for name in self.contenders if name in QUICK] + slow[turn::3]:
                seconds = self._run("first", name)
                figures[name].append(seconds["total"])
                self.cpu.setdefault(name, []).append(seconds["cpu"])
        for name, times in figures.items():
            self.times.setdefault(name, []).append(times)

    def rows(self) -> list[harness.Row]:
        """The artifact over every other contender."""
        return [self._row(name) for name in self.contenders if name != "artifact"]

    def seconds(self) -> dict[str, dict[str, list[float]]]:
        """Lowest, median and highest seconds of each contender, by the clock and of the processor."""
        flat = {name: [time for times in rounds for time in times] for name, rounds in self.times.items()}
        return {name: {"wall": _range(times), "cpu": _range(self.cpu[name])} for name, times in flat.items()}

    def _row(self, name: str) -> harness.Row:
        texts, goal = GOALS[name]
        figures = self.seconds()
        ratios = [
            statistics.median(ours) / statistics.median(theirs)
            for ours, theirs in zip(self.times["artifact"], self.times[name], strict=True)
        ]
        title = f"{self.model}, {self.mode}: load + first step over {texts}"
        ours, theirs = figures["artifact"], figures[name]
        note = f"processor seconds: {ours['cpu'][1] / max(theirs['cpu'][1], 0.01):.3g}"
        return harness.Row(title, ours["wall"][1], theirs["wall"][1], goal=goal, spread=(min(ratios), max(ratios)), note=note)

    def _run(self, task: str, name: str) -> Any:
        contender = name.removesuffix("_cold") if name != "cold" else "cold"
        caches = self.folder / name.removesuffix("_raw")
        if name.endswith("cold"):
            shutil.rmtree(caches, ignore_errors=True)
        env = {"TORCHINDUCTOR_CACHE_DIR": str(caches), "OMP_NUM_THREADS": "1"}
        if name == "artifact" and task == "first":
            env["PATH"] = ""  # no compiler
        return harness.fresh_script(SCRIPT, [task, contender, self.model, self.mode, str(self.folder)], env)

    def steady(self, num_processes: int, num_pairs: int) -> list[harness.Row]:
        """A later step of the artifact over torch.compile's, with one thread and with all."""
        return [self._steady_row(threads, num_processes, num_pairs) for threads in dict.fromkeys((1, torch.get_num_threads()))]

    def _steady_row(self, threads: int, num_processes: int, num_pairs: int) -> harness.Row:
        env = {"TORCHINDUCTOR_CACHE_DIR": str(self.folder / f"steady{threads}"), "OMP_NUM_THREADS": str(threads)}
        args = ["steady", "artifact", self.model, self.mode, str(self.folder)]
        figures = [harness.fresh_script(SCRIPT, [*args, str(num_pairs)], env)["seconds"] for _ in range(num_processes)]
        ratios = sorted(ours / theirs for ours, theirs in figures)
        ours, theirs = sorted(figures, key=lambda pair: pair[0] / pair[1])[len(figures) // 2]
        texts = "1 thread" if threads == 1 else f"{threads} threads"
        title = f"{self.model}, {self.mode}: a later step over torch.compile's, {texts}"
        return harness.Row(title, ours, theirs, goal=1.02, spread=(ratios[0], ratios[-1]))


def _range(times: list[float]) -> list[float]:
    return [min(times), statistics.median(times), max(times)]


def measure(case: Case, options: Any) -> tuple[list[harness.Row], Mapping[str, Any]]:
    """The rows of one case, and the seconds behind them."""
    case.make()
    for _ in range(options.rounds):
        case.round()
    return case.rows() + case.steady(options.processes, options.pairs), case.seconds()


def main() -> None:
    """Measure and write; what is done is written after each case."""
    options = harness.arguments(
        __doc__, rounds=3, processes=3, pairs=400, models="transformer,nanogpt,llama", modes="inference,training", quick=False
    )
    if options.quick:
        options.rounds, options.processes, options.pairs = 1, 1, 40
    rows: list[harness.Row] = []
    texts: dict[str, Any] = {"transformers": version("transformers"), "models": MODELS, "rounds": options.rounds}
    texts |= {"the_peer_refuses": {}, "load_average": {}, "seconds_lowest_median_highest": {}}
    with tempfile.TemporaryDirectory(prefix="torchspan-") as root:
        for model in options.models.split(","):
            for mode in options.modes.split(","):
                case, name = Case(model, mode, Path(root, f"{model}-{mode}")), f"{model}, {mode}"
                case.folder.mkdir()
                texts["load_average"][name] = os.getloadavg()[0]
                more, texts["seconds_lowest_median_highest"][name] = measure(case, options)
                rows += more
                if case.refused:
                    texts["the_peer_refuses"][name] = case.refused
                harness.write("artifact_load", rows, options.out, **texts)


if __name__ == "__main__":
    main()
