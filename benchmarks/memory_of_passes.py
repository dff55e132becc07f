"""Memory of passes: what activation checkpointing takes off the peak of a step, and what it adds to its time.

Every row is a graph with a pass over another side of the same step: the graph without the pass, eager, or eager with torch's
own checkpointing. Memory is the most bytes of tensors that were held at once during a step (forward, backward, gradients),
without the parameters; seconds are of steps taken in turn, in one process on one thread.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from _harness import Row, arguments, fresh_script, write

MEASUREMENTS = Path(__file__).with_name("_memory_measures.py")
MODELS: dict[str, dict[str, Any]] = {
    "debugmodel": {},
    "8 layers, 512 wide": {"dim": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 4, "hidden_dim": 1536},
}
PASSES = {
    "apply_sac": "eager, selective checkpoint",
    'apply_sac{save=""}': "eager, checkpoint",
    "apply_sac{budget=0.5}": "eager, selective checkpoint",
    "apply_sac{budget=0.25}": "eager, checkpoint",
}
"""Each with the way of torch's own checkpointing that it is compared with."""


def main() -> None:
    """Measure both models, and write the ratios."""
    options = arguments(__doc__ or "", batch=4, seq_len=256, repeats=5)
    sides = ["graph", "eager", "eager, checkpoint", "eager, selective checkpoint", *PASSES]
    rows: list[Row] = []
    for model, sizes in MODELS.items():
        settings = {
            "sizes": sizes,
            "batch": options.batch,
            "seq_len": options.seq_len,
            "sides": sides,
            "repeats": options.repeats,
        }
        measures = dict(fresh_script(MEASUREMENTS, [json.dumps(settings)]))
        rows += _rows(model, measures)
    write("memory of passes", rows, options.out, batch=options.batch, seq_len=options.seq_len, threads=1)


def _rows(model: str, measures: dict[str, Any]) -> list[Row]:
    rows = [*_compared(model, measures, "graph", "eager", None)]
    for name, theirs in PASSES.items():
        rows += _compared(model, measures, name, "graph", 1.0)
        rows += _compared(model, measures, name, theirs, None)
        figures = measures["figures"][name]
        before, after = figures["sac_kept_before_bytes"], figures["sac_kept_after_bytes"]
        rows.append(Row(f"{model}: kept for the backward, {name} / graph", after, before, "B", note="predicted from shapes"))
    return rows


def _compared(model: str, measures: dict[str, Any], ours: str, theirs: str, goal: float | None) -> list[Row]:
    peaks, seconds = measures["peak_bytes"], measures["seconds"]
    ratios = [name / other for name, other in zip(seconds[ours], seconds[theirs])]
    medians = statistics.median(seconds[ours]), statistics.median(seconds[theirs])
    return [
        Row(f"{model}: peak memory, {ours} / {theirs}", peaks[ours], peaks[theirs], "B", goal),
        Row(f"{model}: step, {ours} / {theirs}", *medians, note="one thread", spread=(min(ratios), max(ratios))),
    ]


if __name__ == "__main__":
    main()
