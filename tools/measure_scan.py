"""Measure the scan: of names drawn from two torch releases, how many that the older one lacks are found, and nothing else.

    python tools/measure_scan.py --old .envs/torch-2.8.0/bin/python --new .envs/torch-2.15.0/bin/python

Both torches are asked for their names by themselves, without the scan's database: what is there is what can be looked up. Of
each kind as many names that only the newer one has are drawn as names that both have; each becomes a program that uses it, and
the scan of that program says whether the older torch has it. The result is written beside the other benchmarks' results.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from torchspan.scan import scan

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "scan_names.json"

# run by each torch: prints its candidates, [kind, program, probe]; a probe is a module, a path in it, and a parameter
ASK = r"""
import enum, importlib, inspect, io, contextlib, json, pkgutil, sys, typing, warnings
warnings.simplefilter("ignore")
import torch
LEFT_OUT = ("torch.utils.tensorboard", "torch.utils.benchmark", "torch.testing", "torch.distributed.elastic.rendezvous",
            "torch.utils.model_dump", "torch.onnx", "torch.utils.bottleneck", "torch.ao", "torch.backends.xeon")

def walk(package):
    yield package
    for info in pkgutil.iter_modules(getattr(package, "__path__", ())):
        name = f"{package.__name__}.{info.name}"
        is_private = info.name.startswith("_") and not package.__name__.startswith("torch.distributed")
        if name.startswith(LEFT_OUT) or is_private or info.name == "__main__":
            continue
        try:
            yield from walk(importlib.import_module(name))
        except Exception:
            continue

def is_torchs(value):
    return (getattr(value, "__module__", None) or "").startswith("torch")

def keywords(value):
    try:
        parameters = inspect.signature(value).parameters.values()
    except (ValueError, TypeError):
        return
    for one in parameters:
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY) and one.name != "self":
            yield one.name

def of_module(module):
    place = module.__name__
    for name in sorted(vars(module)):
        value = vars(module)[name]
        if name.startswith("__") or not (inspect.isclass(value) or inspect.isroutine(value)) or not is_torchs(value):
            continue
        if name.startswith("_") and value.__module__ != place:
            continue
        yield "import", f"from {place} import {name}\n", [place, [name], ""]
        yield "name", f"import {place}\n{place}.{name}\n", [place, [name], ""]
        if value.__module__ != place:
            continue
        for keyword in keywords(value):
            yield "keyword", f"import {place}\n{place}.{name}({keyword}=given)\n", [place, [name], keyword]
        if inspect.isclass(value):
            yield from of_class(place, name, value)

def of_class(place, name, value):
    if issubclass(value, enum.Enum):
        for member in value.__members__:
            yield "enum", f"import {place}\n{place}.{name}.{member}\n", [place, [name, member], ""]
        return
    for member in sorted(vars(value)):
        if member.startswith("__"):
            continue
        yield "member", f"import {place}\ndef f(x: {place}.{name}):\n    x.{member}\n", [place, [name, member], ""]

def of_results(module):
    for name in sorted(vars(module)):
        function = vars(module)[name]
        if not inspect.isfunction(function) or function.__module__ != module.__name__:
            continue
        try:
            result = typing.get_type_hints(function).get("return")
        except Exception:
            continue
        if inspect.isclass(result) and is_torchs(result) and not issubclass(result, torch.Tensor):
            for member in sorted(vars(result)):
                if not member.startswith("__"):
                    program = f"import {module.__name__}\n{module.__name__}.{name}(given).{member}\n"
                    path = [*result.__qualname__.split("."), member]
                    yield "returned", program, [result.__module__, path, "", [module.__name__, name]]

def of_tensors():
    for member in sorted(dir(torch.Tensor)):
        if not member.startswith("__"):
            yield "tensor", f"import torch\nx = torch.ones(2)\nx.{member}\n", ["torch", ["Tensor", member], ""]
            program = f"import torch\ndef f(x: torch.Tensor):\n    return (x + 1).{member}\n"
            yield "tensor", program, ["torch", ["Tensor", member], ""]
    for member in dir(torch.Tag):
        if not member.startswith("_"):
            yield "enum", f"import torch\ntorch.Tag.{member}\n", ["torch", ["Tag", member], ""]

def of_options():
    for place in ("torch._dynamo.config", "torch._inductor.config", "torch._functorch.config", "torch.fx.experimental._config"):
        for option in importlib.import_module(place)._config:
            path = option.split(".")
            yield "option", f"import {place}\n{place}.{option} = given\n", [place, path, ""]
            if len(path) == 1:
                yield "option", f"import {place} as cfg\ncfg.patch({option}=given)\n", [place, path, ""]

def of_settings():
    for module in walk(torch.backends):
        place = module.__name__
        for name in sorted({*vars(type(module)), *vars(module)}):
            value = getattr(module, name, None)
            if name.startswith("_") or callable(value) or inspect.ismodule(value):
                continue
            if isinstance(value, (bool, int, str)) and name in vars(type(module)):
                yield "setting", f"import torch\n{place}.{name} = given\n", [place, [name], ""]
            for attribute in ("fp32_precision", "allow_tf32", "allow_fp16_accumulation"):
                if is_torchs(type(value)) and has(value, attribute):
                    yield "setting", f"import torch\n{place}.{name}.{attribute} = given\n", [place, [name, attribute], ""]

def has(value, name):
    try:
        getattr(value, name)
        return True
    except Exception:
        return False

def probe(question):
    place, path, keyword, *function = question
    if function and not probe([function[0][0], [function[0][1]], ""]):
        return None  # what is asked is the member of what it gives
    try:
        value = importlib.import_module(place)
        for part in path:
            value = getattr(value, part)
    except Exception as error:
        return None if not isinstance(error, (ImportError, AttributeError)) else False
    if not keyword:
        return True
    try:
        parameters = inspect.signature(value).parameters
    except (ValueError, TypeError):
        return None
    return keyword in parameters or any(one.kind is one.VAR_KEYWORD for one in parameters.values())

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    if len(sys.argv) > 2:
        found = [probe(question) for question in json.load(open(sys.argv[2]))]
    else:
        modules = list({id(module): module for module in walk(torch)}.values())
        found = [*of_tensors(), *of_options(), *of_settings()]
        for module in modules:
            found += [*of_module(module), *of_results(module)]
json.dump(found, open(sys.argv[1], "w"))
"""


def main() -> None:
    """Draw, scan, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", required=True, help="the Python of the older torch")
    parser.add_argument("--new", required=True, help="the Python of the newer torch")
    parser.add_argument("--count", type=int, default=200, help="how many names to draw")
    parser.add_argument("--seed", type=int, default=19)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    versions = [_version(python) for python in (options.old, options.new)]
    with tempfile.TemporaryDirectory() as folder:
        candidates = _unique(_ask(options.new, Path(folder)))
        is_there = _ask(options.old, Path(folder), [probe for _, _, probe in candidates])
        drawn = _draw(candidates, is_there, options.count, random.Random(options.seed))
        questions = [entry | {"found": _scanned(entry["program"], versions[0], Path(folder))} for entry in drawn]
    result = _result(questions, versions, options.seed)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    sys.stderr.write(f"{json.dumps({key: value for key, value in result.items() if key != 'names'})}\n")


def _version(python: str) -> str:
    process = subprocess.run(
        [python, "-c", "import torch; print(torch.__version__)"], capture_output=True, text=True, check=True
    )
    return process.stdout.strip().partition("+")[0]


def _ask(python: str, folder: Path, probes: list[Any] | None = None) -> list[Any]:
    (folder / "ask.py").write_text(ASK)
    (folder / "probes.json").write_text(json.dumps(probes))
    arguments = [str(folder / "answers.json"), *([] if probes is None else [str(folder / "probes.json")])]
    subprocess.run([python, str(folder / "ask.py"), *arguments], check=True, cwd=folder)
    return list(json.loads((folder / "answers.json").read_text()))


def _unique(candidates: list[Any]) -> list[Any]:
    return list({program: entry for entry in candidates for program in [entry[1]]}.values())


def _draw(candidates: list[Any], is_there: list[bool | None], count: int, chance: random.Random) -> list[dict[str, Any]]:
    """Half of them names that the old torch lacks, half others; each kind as often as there are names of it."""
    pools: dict[tuple[bool, str], list[dict[str, Any]]] = {}
    for (kind, program, probe), there in zip(candidates, is_there):
        if there is not None:
            pools.setdefault((there, kind), []).append({"kind": kind, "program": program, "probe": probe, "there": there})
    drawn = []
    for there in (False, True):
        pools_left = {kind: chance.sample(pool, len(pool)) for (its, kind), pool in sorted(pools.items()) if its is there}
        half: list[dict[str, Any]] = []
        while len(half) < count // 2 and any(pools_left.values()):
            half += [pool.pop() for pool in pools_left.values() if pool]
        drawn += half[: count // 2]
    return drawn


def _scanned(program: str, torch: str, folder: Path) -> list[str]:
    """What the scan says of the program."""
    (folder / "program.py").write_text(program)
    return [f"{finding.name} {finding.says}" for finding in scan([folder / "program.py"], torch).findings]


def _result(questions: list[dict[str, Any]], versions: list[str], seed: int) -> dict[str, Any]:
    lacking = [entry for entry in questions if not entry["there"]]
    positives = [entry for entry in questions if entry["found"]]
    right = [entry for entry in positives if not entry["there"]]
    by_kind = Counter(entry["kind"] for entry in lacking)
    found_by_kind = Counter(entry["kind"] for entry in right)
    return {
        "torch": {"old": versions[0], "new": versions[1]},
        "machine": platform.machine(),
        "seed": seed,
        "drawn": len(questions),
        "lacking": len(lacking),
        "recall": round(len(right) / len(lacking), 4),
        "precision": round(len(right) / max(1, len(positives)), 4),
        "recall_by_kind": {kind: f"{found_by_kind[kind]} of {number}" for kind, number in sorted(by_kind.items())},
        "missed": [entry["program"] for entry in lacking if not entry["found"]],
        "wrong": [entry for entry in positives if entry["there"]],
        "names": [{key: entry[key] for key in ("kind", "program", "there", "found")} for entry in questions],
    }


if __name__ == "__main__":
    main()
