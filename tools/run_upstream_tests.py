"""Run torch's own tests of what torchspan backports, from a checkout of torch's repository, and write what passed into docs.

    python tools/run_upstream_tests.py CHECKOUT                  on torch 2.8.0 under torchspan, beside torch 2.15.0 by itself
    python tools/run_upstream_tests.py CHECKOUT --torch 2.9.1    on another torch under torchspan
    python tools/run_upstream_tests.py CHECKOUT --only stager    files whose path has this in it; the lines of others stay

CHECKOUT is the root of the repository at a commit that fits the newer torch, or a folder with some of its files. Nothing is
fetched and nothing is copied: the tests are read from there. Each file runs in a process of its own, in the environment that
`dev.py` makes (with the package expecttest added to it, which torch's tests need).
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "upstream_tests.json"
PAGE = ROOT / "docs" / "upstream_tests.md"
BEGIN, END = "<!-- table: made by tools/run_upstream_tests.py -->", "<!-- end of table -->"

# A file of torch's repository, and which of its tests are asked of the backport (pytest's -k; all where it is empty).
FILES = {
    "test/distributed/pipelining/test_schedule.py": "",
    "test/distributed/pipelining/test_schedule_multiproc.py": "dualpipev or DualPipeV",
    "test/distributed/checkpoint/test_consolidate_hf_safetensors.py": "",
    "test/distributed/checkpoint/test_hf_storage.py": "",
    "test/distributed/checkpoint/test_hf_safetensor_e2e.py": "",
    "test/distributed/checkpoint/test_quantized_hf_storage.py": "",
    "test/distributed/checkpoint/test_state_dict_stager.py": "",
    "test/distributed/test_device_mesh.py": "CuTeLayout or unflatten or concatenate or backend_override or OpaqueType or fake",
    "test/dynamo/test_regional_inductor.py": "RegionalInductorTests and not True",
    "test/dynamo/test_fx_annotate.py": "",
    "test/functorch/test_aot_joint_with_descriptors.py": "annotate",
    "test/test_varlen_attention.py": "",
}
# What processes that a test starts do first.
CUSTOMIZE = """
import pathlib, sys
import _missing_names
sys.meta_path.insert(0, _missing_names.ImportOf(pathlib.Path({path!r})))
"""
Outcomes = dict[str, tuple[str, str]]


def main() -> None:
    """Run each file on both torches, and write the page after each: what is done stays where a later one hangs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path, help="the folder that has torch's test folder in it")
    parser.add_argument("--torch", default="2.8.0", help="the release that runs under torchspan")
    parser.add_argument("--beside", default="2.15.0", help="the release that runs without torchspan")
    parser.add_argument("--only", default="", help="run the files whose path has this in it")
    parser.add_argument("--timeout-s", type=float, default=900, help="the time for one file on one torch")
    options = parser.parse_args()
    results: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    for name, chosen in FILES.items():
        file = options.checkout.resolve() / name
        if options.only in name and file.exists():
            ours = run(file, chosen, options.torch, options.timeout_s, is_activated=True)
            theirs = run(file, chosen, options.beside, options.timeout_s, is_activated=False)
            circumstances = {"torch": [options.torch, options.beside], "date": datetime.date.today().isoformat()}
            results[name] = compare(ours, theirs) | circumstances
            write(results)


def run(file: Path, chosen: str, release: str, timeout_s: float, *, is_activated: bool) -> Outcomes:
    """What became of each test of `file`: passed, failed or skipped, and the reason."""
    python = ROOT / ".envs" / f"torch-{release}" / "bin" / "python"
    if not python.exists():
        sys.exit(f"{python.relative_to(ROOT)} is not there; 'TORCH={release} python3 dev.py shell' makes it")
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results.xml"
        options = ["-q", "--noconftest", "-c", os.devnull, f"--rootdir={file.parent}", "-p", "_missing_names", f"-k={chosen}"]
        command = [str(python), "-m", "pytest", *options, f"--junitxml={results}", str(file)]
        Path(temporary, "sitecustomize.py").write_text(CUSTOMIZE.format(path=str(file)))
        paths = [temporary, ROOT / "tools", ROOT / "src", file.parent]
        environ = {name: value for name, value in os.environ.items() if not name.startswith("TORCHSPAN")}
        environ |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "TMPDIR": temporary}
        environ |= {"TORCHSPAN": "1", "TORCHSPAN_DEVICE": "off"} if is_activated else {}
        start = time.monotonic()
        with subprocess.Popen(command, cwd=file.parent, env=environ, start_new_session=True, stdout=sys.stderr) as process:
            try:
                ending = f"exit code {process.wait(timeout_s)}"
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                ending = f"ended after {timeout_s:.0f} s"
        sys.stderr.write(f"{file.name} on torch {release}: {ending}, {time.monotonic() - start:.0f} s\n")
        return read_outcomes(results.read_text()) if results.exists() else {file.stem: ("failed", ending)}


def read_outcomes(text: str) -> Outcomes:
    """Each test of pytest's JUnit XML with its outcome and the first line of its reason.

    >>> read_outcomes('<t><testcase name="a"/><testcase name="b"><failure message="no"/></testcase></t>')
    {'a': ('passed', ''), 'b': ('failed', 'no')}
    """
    outcomes: Outcomes = {}
    for case in xml.fromstring(text).iter("testcase"):
        kinds = {child.tag: child.get("message") or "" for child in case}
        kind = next((kind for kind in ("failure", "error", "skipped") if kind in kinds), "")
        outcome = {"": "passed", "skipped": "skipped"}.get(kind, "failed")
        reason = re.split(r"\\n\\nTo execute this|\n", kinds.get(kind, "").strip())[0]
        name = ".".join(filter(None, [(case.get("classname") or "").rpartition(".")[2], case.get("name")]))
        outcomes[name] = (outcome, reason[:160])
    return outcomes


def compare(ours: Outcomes, theirs: Outcomes) -> dict[str, Any]:
    """The counts of both, why tests did not pass, and which of them fail under torchspan though they pass beside it.

    >>> compare({"a": ("failed", "no")}, {"a": ("passed", "")})["only_here"]
    {'a': 'no'}
    """
    passed = {name for name, (outcome, _) in theirs.items() if outcome == "passed"}
    return {
        "ours": _counts(ours),
        "theirs": _counts(theirs),
        "only_here": {name: reason for name, (outcome, reason) in ours.items() if outcome == "failed" and name in passed},
        "reasons": {
            side: dict(collections.Counter(f"{outcome}: {reason}" for outcome, reason in outcomes.values() if reason))
            for side, outcomes in (("ours", ours), ("theirs", theirs))
        },
    }


def _counts(outcomes: Outcomes) -> list[int]:
    return [sum(outcome == kind for outcome, _ in outcomes.values()) for kind in ("passed", "failed", "skipped")]


def write(results: dict[str, Any]) -> None:
    """Put `results` into the JSON file and the page."""
    RESULT.write_text(json.dumps(results, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(results)}\n{END}{rest.partition(END)[2]}")


def table(results: dict[str, Any]) -> str:
    """The table (passed / failed / skipped on each side), and below it why tests did not pass under torchspan."""
    lines = [
        "| file | torch under torchspan: passed, failed, skipped | torch by itself | fails here, passes there |",
        "| --- | --: | --: | --: |",
    ]
    files = [name for name in FILES if name in results]
    for name in files:
        result = results[name]
        sides = zip(result["torch"], (result["ours"], result["theirs"]), strict=True)
        counts = " | ".join(f"{release}: {', '.join(map(str, numbers))}" for release, numbers in sides)
        lines.append(f"| `{name.removeprefix('test/')}` | {counts} | {len(result['only_here'])} |")
    lines += ["", "Not run: " + ", ".join(f"`{name.removeprefix('test/')}`" for name in FILES if name not in results) + "."]
    for name in files:
        reasons = results[name]["reasons"]["ours"]
        lines += ["", f"`{name.removeprefix('test/')}`:", ""] if reasons else []
        lines += [f"- {count} × {reason.replace('|', '/')}" for reason, count in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
