"""Run the backports' tests on releases of torch, and write what passed on each into docs/releases.md.

    python tools/try_releases.py                     every release from 2.8.0 on, as tools/make_names_database.py lists them
    python tools/try_releases.py 2.9.1 2.10.0        these; what is known of others stays
    python tools/try_releases.py --keep 2.9.1        keep the environment that was made for it
    python tools/try_releases.py --tests tests/scan 2.9.1    other tests, whose result is printed and not written

Each release gets an environment as `dev.py` makes it, one at a time: some GB, deleted afterwards unless it was there before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from pathlib import Path
from typing import Any

from make_names_database import RELEASES

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "releases.json"
PAGE = ROOT / "docs" / "releases.md"
BEGIN, END = "<!-- table: made by tools/try_releases.py -->", "<!-- end of table -->"
TESTS = ("tests/backports", "tests/test_api.py")
SUPPORTED = RELEASES[RELEASES.index("2.8.0") :]


def main() -> None:
    """Try each release, and write the table after each: what is done stays where a later one cannot be had."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("releases", nargs="*", default=SUPPORTED, metavar="RELEASE", help="torch releases (default: all)")
    parser.add_argument("--keep", action="store_true", help="keep the environments that are made")
    parser.add_argument("--tests", nargs="+", help="what pytest is given; the result is printed and not written")
    options = parser.parse_args()
    for release in options.releases:
        found = try_release(release, options.tests or TESTS, is_kept=options.keep)
        sys.stderr.write(f"torch {release}: {_counts(found)}\n" + "".join(f"  {name}\n" for name in found["failed"]))
        if not options.tests:
            write({release: found})


def try_release(release: str, tests: list[str] | tuple[str, ...], *, is_kept: bool) -> dict[str, Any]:
    """What `tests` did on torch `release`."""
    environ = os.environ | {"TORCH": release, "PYTHON": ""}
    folder = ROOT / ".envs" / f"torch-{release}"
    is_new = not folder.exists()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        results = Path(temporary) / "results.xml"
        dev = [sys.executable, str(ROOT / "dev.py")]
        subprocess.run([*dev, "shell"], cwd=ROOT, env=environ, stdout=sys.stderr, check=True)
        # torch 2.9 to 2.12 compile C++ with it, and neither they nor what they bring require it before Python 3.12
        uv = [str(ROOT / ".envs" / "tools" / "bin" / "uv"), "pip", "install", "-q", "--python", str(folder / "bin" / "python")]
        subprocess.run([*uv, "setuptools"], cwd=ROOT, check=True)
        done = subprocess.run(
            [*dev, "test", "-q", f"--junitxml={results}", *tests], cwd=ROOT, env=environ, stdout=sys.stderr, check=False
        )
        if is_new and not is_kept:
            shutil.rmtree(folder, ignore_errors=True)
        if not results.exists():
            sys.exit(f"torch {release}: no test ran (exit code {done.returncode}); its message is above")
        return read_results(results.read_text()) | {
            "seconds": round(time.monotonic() - start),
            "date": datetime.date.today().isoformat(),
        }


def read_results(text: str) -> dict[str, Any]:
    """The counts in pytest's JUnit XML, and the names of what failed.

    >>> found = read_results('<t><testcase classname="a.b" name="c"><failure/></testcase><testcase name="d"/></t>')
    >>> found["passed"], found["failed"]
    (1, ['a.b::c'])
    """
    cases = list(xml.fromstring(text).iter("testcase"))
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case for case in cases if case.find("skipped") is not None]
    return {
        "passed": len(cases) - len(failed) - len(skipped),
        "skipped": len(skipped),
        "failed": sorted(f"{case.get('classname')}::{case.get('name')}" for case in failed),
    }


def write(results: dict[str, Any]) -> None:
    """Put `results` beside what is known of other releases, and all of it into the page."""
    known = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    known = {release: (known | results)[release] for release in RELEASES if release in known | results}
    RESULT.write_text(json.dumps(known, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n{table(known)}\n{END}{rest.partition(END)[2]}")


def table(results: dict[str, Any]) -> str:
    """The table, and below it what failed."""
    lines = ["| torch | passed | skipped | failed | tried |", "| --- | --: | --: | --: | --- |"]
    for release, found in results.items():
        counts = f"{found['passed']} | {found['skipped']} | {len(found['failed'])}"
        lines.append(f"| {release} | {counts} | {found['date']} |")
    for release, found in results.items():
        if found["failed"]:
            lines += ["", f"Failed on torch {release}:", "", *(f"- `{name}`" for name in found["failed"])]
    return "\n".join(lines)


def _counts(found: dict[str, Any]) -> str:
    return f"{found['passed']} passed, {found['skipped']} skipped, {len(found['failed'])} failed, {found['seconds']} s"


if __name__ == "__main__":
    main()
