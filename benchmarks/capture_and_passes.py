"""Capture and passes: what a captured training step costs beside torch.compile and eager, and how it grows with the job.

Parts, of which ``--only compile,growth`` chooses some:

compile      capture and pass over the cold torch.compile of the same step: each in a fresh process, imports included
growth       a layer of a deep model over a layer of a shallow one: seconds of capture, and nodes
step         the graph's step over eager's, in one process
ranks        the same on two gloo ranks
scale        the first rank of large jobs, whose other ranks do not exist: nodes, seconds, memory
passes       the pass over a layer of a deep model over that of a shallow one
collectives  nodes and collectives after the pass over before

Every measurement has a process of its own. Large jobs have their models on the meta device, which only train_step captures.
A part replaces what the file of ``--out`` has of it; other parts, if they come from the same torch and machine, are kept there.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

from _harness import Row, arguments, draw, fresh_script, machine, save

from torchspan.capture.joint import is_supported

MEASUREMENTS = Path(__file__).with_name("_capture_measures.py")
CAPTURES = ("train_step", "joint") if is_supported() else ("train_step",)
PASS = "transformer_block_bucketing"
CAPTURE_LIMIT_S, MEMORY_LIMIT_BYTES = 15.0, 600e6  # for Llama 3 405B, 8 layers, on the largest job


@dataclass(frozen=True)
class Model:
    """One model: its degrees on two ranks and on eight, and the large configuration of which `num_layers` are captured.

    Of a large job tensor and expert parallelism have the degrees of `large_degrees`, FSDP the rest.
    """

    module: str
    two_ranks: dict[str, int]
    eight_ranks: dict[str, int]
    large: str
    num_layers: int
    large_degrees: dict[str, int]
    has_limits: bool = False


MODELS = {
    "llama3": Model("llama3", {"dp_shard": 2}, {"dp_shard": 4, "tp": 2}, "405B", 8, {"tp": 8}, has_limits=True),
    "deepseek_v3": Model(
        "deepseek_v3", {"dp_shard": 2, "ep": 2}, {"dp_shard": 4, "tp": 2, "ep": 4}, "671B", 4, {"tp": 8, "ep": 8}
    ),
}


def main() -> None:
    """Measure the parts that are asked for, and write each as soon as it is there."""
    options = arguments(
        __doc__ or "",
        only=",".join(PARTS),
        models=",".join(MODELS),
        captures=",".join(CAPTURES),
        config="debugmodel",
        batch=4,
        seq_len=64,
        repeats=9,
        few=4,
        many=32,
        growth_repeats=2,
        ranks="64,1024,16384",
        large_seq_len=4096,
    )
    captures = _chosen("capture", options.captures, CAPTURES)
    models = [MODELS[name] for name in _chosen("model", options.models, MODELS)]
    rows, dates = _earlier(options.out)
    for part in _chosen("part", options.only, PARTS):
        of_part = [capture for capture in captures if capture == "train_step" or part not in ON_META]
        if not of_part:
            sys.exit(f"the part {part} is measured with train_step only, not with {options.captures}; add it to --captures")
        rows[part] = [row for model in models for capture in of_part for row in PARTS[part](model, capture, options)]
        dates[part] = date.today().isoformat()
        draw(part, rows[part])
        if options.out is not None:
            in_order = [row for name in PARTS for row in rows.get(name, [])]
            save("capture and passes", in_order, options.out, measured=dates)


def _chosen(what: str, text: str, known: Iterable[str]) -> list[str]:
    """The names that `text` lists; ends with a message if one of them is not known."""
    names = text.split(",")
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"no {what} {unknown[0]!r}; there are: {', '.join(known)}")
    return names


def _earlier(out: Path | None) -> tuple[dict[str, list[Row]], dict[str, str]]:
    """Rows and date of each part that `out` has; ends with a message if it was measured with another torch or elsewhere."""
    if out is None or not out.exists():
        return {}, {}
    written = json.loads(out.read_text())
    for what in ("torch", "python", "machine"):
        if written[what] != machine()[what]:
            sys.exit(f"{out} has figures of {what} {written[what]!r}, this is {machine()[what]!r}; give --out another file")
    dates = dict(written.get("measured", {}))
    rows: dict[str, list[Row]] = {part: [] for part in dates}
    for plain in written["rows"]:
        part = plain["name"].partition(":")[0]
        if part in rows:
            rows[part].append(Row(**{field.name: plain[field.name] for field in fields(Row) if field.name in plain}))
    return rows, dates


def measured(name: str, **options: Any) -> dict[str, Any]:
    """What the measurement `name` gives, made in a fresh process with an empty cache of compiled code."""
    with tempfile.TemporaryDirectory() as folder:
        return dict(fresh_script(MEASUREMENTS, [name, json.dumps(options)], {"TORCHINDUCTOR_CACHE_DIR": folder}))


# parts: the rows of one model and one capture


def compile_rows(model: Model, capture: str, options: Namespace) -> list[Row]:
    """Capture and pass over the cold torch.compile of the same step."""
    _keep_bytecode()
    sizes = _sizes(model, options)
    compile_s = _cold_compile_s(**sizes)
    graph_s = measured("cold_graph", **sizes, capture=capture)["seconds"]
    name = f"compile: {model.module}, {capture} and {PASS} / torch.compile"
    return [Row(name, graph_s, compile_s, goal=0.5, note="cold, imports included, forward and backward")]


@cache
def _keep_bytecode() -> None:
    """Run both sides once on a small model: Python keeps the bytecode of what they import for the processes that come."""
    small = {"module": "llama3", "config": "tiny", "batch": 1, "seq_len": 8}
    measured("cold_compile", **small)
    measured("cold_graph", **small, capture=CAPTURES[-1])


@cache
def _cold_compile_s(**sizes: Any) -> float:
    """Seconds of the cold torch.compile, which is the other side of every capture."""
    return float(measured("cold_compile", **sizes)["seconds"])


def growth_rows(model: Model, capture: str, options: Namespace) -> list[Row]:
    """Seconds and nodes a layer, of many layers over few."""
    layers = [options.many, options.few]
    measures = measured("growth", **_sizes(model, options), capture=capture, layers=layers, repeats=options.growth_repeats)
    name = f"growth: {model.module}, {capture}"
    return [
        _a_layer(f"{name}, seconds of capture", measures["seconds"], layers, "s", goal=2.5),
        _a_layer(f"{name}, nodes", [[number] for number in measures["nodes"]], layers, ""),
    ]


def step_rows(model: Model, capture: str, options: Namespace) -> list[Row]:
    """The graph's step over eager's in one process."""
    measures = measured("steps", **_sizes(model, options), capture=capture, repeats=options.repeats)
    return [_step_row(f"step: {model.module}, {capture}", measures)]


def ranks_rows(model: Model, capture: str, options: Namespace) -> list[Row]:
    """The graph's step over eager's on two gloo ranks."""
    degrees = {"degrees": model.two_ranks}
    measures = measured("steps_on_ranks", **_sizes(model, options), capture=capture, repeats=options.repeats, **degrees)
    return [_step_row(f"ranks: {model.module}, {capture}, {_text(model.two_ranks)}", measures)]


def scale_rows(model: Model, capture: str, options: Namespace) -> list[Row]:
    """Nodes, seconds and memory on the first rank of the larger jobs over those of the smallest; limits on the largest."""
    fewest, *others = sorted(map(int, options.ranks.split(",")))
    measures = {
        num_ranks: measured("scale", **_large(model, capture, num_ranks, options), layers=model.num_layers)
        for num_ranks in (fewest, *others)
    }
    name = f"scale: {model.module} {model.large}, {model.num_layers} layers, {capture}, {_text(model.large_degrees)}"
    rows = [
        Row(
            f"{name}: {what}, {num_ranks:,} / {fewest:,} ranks",
            measures[num_ranks][key],
            measures[fewest][key],
            unit,
            goal,
            note,
        )
        for num_ranks in others
        for what, key, unit, goal, note in (
            ("nodes", "nodes", "", 1.01, "within ± 1 %"),
            ("capture", "capture_s", "s", None, "imports included"),
            (PASS, "pass_s", "s", None, "imports included"),
            ("peak memory", "peak_bytes", "B", None, "resident, of the whole process"),
        )
    ]
    if model.has_limits:
        largest = max(measures)
        capture_s, peak_bytes = measures[largest]["capture_s"], measures[largest]["peak_bytes"]
        rows += [
            Row(f"{name}: capture at {largest:,} ranks / its limit", capture_s, CAPTURE_LIMIT_S, goal=1.0),
            Row(f"{name}: peak memory at {largest:,} ranks / its limit", peak_bytes, MEMORY_LIMIT_BYTES, "B", goal=1.0),
        ]
    return rows


def passes_rows(model: Model, capture: str, options: Namespace) -> list[Row]:
    """Seconds of the pass a layer, of many layers over few, on the first of the ranks of the smallest large job."""
    num_ranks = min(map(int, options.ranks.split(",")))
    layers = [options.many, options.many // 4]
    sizes = _large(model, capture, num_ranks, options)
    measures = measured("passes", **sizes, layers=layers, repeats=options.growth_repeats)
    name = f"passes: {model.module} {model.large}, {capture}, {num_ranks:,} ranks, {PASS}"
    return [_a_layer(name, measures["seconds"], layers, "s")]


def collectives_rows(model: Model, capture: str, options: Namespace) -> list[Row]:
    """Nodes and collectives after the pass over before, on the first of eight ranks."""
    measures = measured("collectives", **_sizes(model, options), capture=capture, degrees=model.eight_ranks)
    name = f"collectives: {model.module}, {capture}, {_text(model.eight_ranks)}"
    return [
        Row(f"{name}: {kind}", measures["after"][kind], number, "", note=f"after / before {PASS}")
        for kind, number in measures["before"].items()
    ]


PARTS: dict[str, Callable[[Model, str, Namespace], list[Row]]] = {
    "compile": compile_rows,
    "growth": growth_rows,
    "step": step_rows,
    "ranks": ranks_rows,
    "scale": scale_rows,
    "passes": passes_rows,
    "collectives": collectives_rows,
}


# torch 2.13 exports no joint graph of DTensors on the meta device (the backward of their redistribution fails)
ON_META = ("scale", "passes")


# what they share


def _sizes(model: Model, options: Namespace) -> dict[str, Any]:
    """What a measurement of a small model is given."""
    return {"module": model.module, "config": options.config, "batch": options.batch, "seq_len": options.seq_len}


def _large(model: Model, capture: str, num_ranks: int, options: Namespace) -> dict[str, Any]:
    """What a measurement of a large job is given."""
    degrees = {**model.large_degrees, "dp_shard": num_ranks // model.large_degrees["tp"]}
    sizes = {"module": model.module, "config": model.large, "degrees": degrees, "seq_len": options.large_seq_len}
    return {**sizes, "capture": capture}


def _a_layer(name: str, measures: list[list[float]], layers: list[int], unit: str, goal: float | None = None) -> Row:
    """What a layer takes in the deep model over what one takes in the shallow one; `found` has the runs of each."""
    (many_runs, few_runs), (many, few) = measures, layers
    note = f"a layer, {many} / {few} layers: 1 is linear growth, {many / few:g} quadratic"
    return Row(f"{name} a layer", statistics.median(many_runs) / many, statistics.median(few_runs) / few, unit, goal, note)


def _step_row(name: str, measures: dict[str, list[float]]) -> Row:
    """Medians of the steps of both sides, which were taken in turn."""
    graph, eager = measures["graph"], measures["eager"]
    ratios = [ours / theirs for ours, theirs in zip(graph, eager)]
    medians = statistics.median(graph), statistics.median(eager)
    spread = min(ratios), max(ratios)
    return Row(f"{name}, graph / eager", *medians, goal=1.0, note="forward and backward", spread=spread)


def _text(degrees: dict[str, int]) -> str:
    """Degrees for a person to read, such as ``dp_shard 4 × tp 2``."""
    return " × ".join(f"{axis} {degree}" for axis, degree in degrees.items())


if __name__ == "__main__":
    main()
