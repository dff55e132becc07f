"""Which modules of installed packages import here, without and with torchspan, and what the others miss first.

    python benchmarks/import_sweep.py torchtitan peft --out sweep.json
    python benchmarks/import_sweep.py verl --without-tests --out sweep.json    leaving out modules of tests

The modules, those of namespace packages too, are first imported one after another in a fork of a process that imported all
that were found to import, up to the first that fails, hangs or ends the fork: so a sweep is fast, and a failure leaves nothing.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import _harness as harness
from rich.console import Console
from rich.table import Table

OK = "ok"
SIDES = ("without", "with")
TIMEOUT_S = 180


def main() -> None:
    """Sweep the packages given by name on both sides, draw the counts, write everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", help="names of distributions or of top-level modules")
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--without-tests", action="store_true", help="leave modules of tests out")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        answer = os.fdopen(os.dup(1), "w")
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        json.dump({name: _sweep(name, options.side, options.without_tests) for name in options.packages}, answer)
        answer.flush()
        os._exit(0)  # without the exit handlers of what was imported
    packages = [package for name in options.packages for package in _top_level(name)]
    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        sides = dict(zip(SIDES, pool.map(lambda side: json.loads(_run_side(side, packages, options.without_tests)), SIDES)))
    swept = {package: _summary(package, {side: sides[side][package] for side in SIDES}) for package in packages}
    _draw(swept)
    if options.out is not None:
        seconds = round(time.perf_counter() - start, 1)
        found = {"benchmark": "import_sweep", **harness.machine(), "seconds": seconds, "packages": swept}
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def _top_level(name: str) -> list[str]:
    """The top-level modules with something in them that the distribution or module `name` has."""
    owned = sorted(module for module, owners in importlib.metadata.packages_distributions().items() if name in owners)
    found = [module for module in owned if _is_of(name, module)]
    if not found and importlib.util.find_spec(name) is not None:
        found = [name]
    if not found:
        sys.exit(f"import_sweep: no package {name!r} is installed here: {sys.executable} -m pip install {name}")
    return found


def _is_of(distribution: str, module: str) -> bool:
    """Whether `module` is found in the distribution's own folder: a folder ``test`` that it brings is hidden by Python's."""
    spec = importlib.util.find_spec(module)
    root = str(importlib.metadata.distribution(distribution).locate_file(""))
    return spec is not None and any(
        place.startswith(root) for place in (spec.origin or "", *(spec.submodule_search_locations or ()))
    )


def _run_side(side: str, packages: list[str], without_tests: bool) -> str:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("TORCHSPAN")}
    environ |= {"OMP_NUM_THREADS": "1"} | ({"TORCHSPAN": "1"} if side == "with" else {})
    command = [sys.executable, __file__, "--side", side, *(["--without-tests"] if without_tests else []), *packages]
    return subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True).stdout


def _sweep(package: str, side: str, without_tests: bool) -> dict[str, str]:
    """For each module of `package`, ``ok`` or what it misses."""
    import torch  # noqa: F401 - the one thing that all processes share; it activates torchspan where that is asked for

    assert ("torchspan.api" in sys.modules) == (side == "with"), "torch did not load torchspan's entry point"
    gc.disable()  # which would copy the whole of this process's memory in each fork
    spec = importlib.util.find_spec(package)
    assert spec is not None, package
    places = list(spec.submodule_search_locations or ())
    names = sorted({package}.union(*(_modules(package, Path(place)) for place in places)))
    if without_tests:
        names = [name for name in names if not is_of_tests(name)]
    found: dict[str, str] = {}
    while len(found) < len(names):
        for name, outcome in zip(names[len(found) :], _import_in_child(names[len(found) :])):
            found[name] = _import(name) if outcome == OK else outcome
        for name in names[len(found) :]:
            above = found.get(name.rpartition(".")[0], OK)
            if above == OK:
                break
            found[name] = above
    return found


def _modules(package: str, folder: Path) -> Iterator[str]:
    """The dotted names of the modules below `folder`, and of the folders that hold some, without programs."""
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        if parts[-1] == "__main__" or not all(part.isidentifier() for part in parts):
            continue
        for end in range(len(parts)):
            yield ".".join((package, *parts[: end + 1])).removesuffix(".__init__")


def is_of_tests(name: str) -> bool:
    """Whether a module is of a package's tests, by its dotted name.

    >>> is_of_tests("verl.tests.a"), is_of_tests("torchao.b_test"), is_of_tests("torchao.testing.utils")
    (True, True, False)
    """
    parts = name.split(".")
    return any(part in ("test", "tests", "conftest") or part.startswith("test_") or part.endswith("_test") for part in parts)


def _import_in_child(names: list[str]) -> list[str]:
    """The outcomes of the imports of `names` up to the first failure, in a fork of this process, which stays as it was."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        os.setpgid(0, 0)
        for name in names:
            outcome = _import(name)
            os.write(writing, outcome.encode() + b"\0")
            if outcome != OK:
                break
        os._exit(0)  # without the exit handlers of what was imported
    os.close(writing)
    answer, part = b"", b"-"
    while part and (ended := bool(select.select([reading], [], [], TIMEOUT_S)[0])):
        part = os.read(reading, 1 << 16)
        answer += part
    os.close(reading)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    outcomes = answer.decode().split("\0")[:-1]
    if len(outcomes) < len(names) and set(outcomes) <= {OK}:
        outcomes.append(f"ended the process: {_ending(status)}" if ended else f"took more than {TIMEOUT_S} s")
    return outcomes


def _import(name: str) -> str:
    """Import one module; ``ok`` or what it misses."""
    try:
        importlib.import_module(name)
    except BaseException as cause:  # noqa: BLE001 - whatever a foreign module raises, an exit too, is the finding
        return missing(cause)
    return OK


def missing(cause: BaseException) -> str:
    """The first name that an import did not find, dotted; for any other failure, its type and first line.

    >>> missing(ImportError("cannot import name 'varlen_attn' from 'torch.nn.attention' (/x/y.py)"))
    'torch.nn.attention.varlen_attn'
    >>> missing(AttributeError("module 'torch.cuda' has no attribute '_POOL_HANDLE'"))
    'torch.cuda._POOL_HANDLE'
    >>> missing(ModuleNotFoundError("No module named 'vllm'", name="vllm"))
    'vllm'
    """
    while cause.__cause__ is not None:  # lazy packages wrap what failed
        cause = cause.__cause__
    message = str(cause).partition("\n")[0]
    if isinstance(cause, ModuleNotFoundError) and cause.name:
        return cause.name
    if match := re.match(r"cannot import name '([\w.]+)' from (?:partially initialized module )?'([\w.]+)'", message):
        return f"{match[2]}.{match[1]}"
    if match := re.match(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        return f"{match[1]}.{match[2]}"
    if match := re.match(r"'_OpNamespace' '(\w+)' object has no attribute '(\w+)'", message):
        return f"torch.ops.{match[1]}.{match[2]}"
    return f"{type(cause).__name__}: {message}"[:200]


def _ending(status: int) -> str:
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"


def _summary(package: str, found: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Counts, what is missing how often on each side, and each module that fails on a side."""
    counts = {side: Counter(found[side].values()) for side in SIDES}
    missed = sorted((set(counts["without"]) | set(counts["with"])) - {OK}, key=lambda name: -counts["without"][name])
    owners = importlib.metadata.packages_distributions().get(package, ())
    return {
        "version": importlib.metadata.version(owners[0]) if owners else "",
        "modules": len(found["with"]),
        **{side: counts[side][OK] for side in SIDES},
        "missing": {name: {side: counts[side][name] for side in SIDES} for name in missed},
        "failures": {
            module: {side: found[side][module] for side in SIDES}
            for module in found["with"]
            if {found[side][module] for side in SIDES} != {OK}
        },
    }


def _draw(swept: dict[str, Any]) -> None:
    table = Table(title="modules that import, and the first name that others miss", box=None, title_justify="left")
    for column in ("package", "modules", "without torchspan", "with torchspan"):
        table.add_column(column, overflow="fold")
    for package, found in swept.items():
        table.add_row(f"{package} {found['version']}", str(found["modules"]), str(found["without"]), str(found["with"]))
        for name, counts in found["missing"].items():
            table.add_row(f"  {name}", "", *(f"-{counts[side]}" if counts[side] else "" for side in SIDES))
    Console().print(table)


if __name__ == "__main__":
    main()
