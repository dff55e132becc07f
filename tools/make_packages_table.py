"""Make the table of docs/packages.md, and benchmarks/results/import_sweep.json, from what sweeps of imports found.

    python benchmarks/import_sweep.py peft torchao --out sweep.json
    python tools/make_packages_table.py sweep.json …
    python tools/make_packages_table.py sweep.json --native newest.json    beside a sweep on the newest torch

A package of a later file replaces that of an earlier one, and of the result there was; with no file, only the table is made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT = ROOT / "benchmarks" / "results" / "import_sweep.json"
PAGE = ROOT / "docs" / "packages.md"
BEGIN, END = "<!-- table: made by tools/make_packages_table.py -->", "<!-- end of table -->"
NUM_NAMED = 6


def main() -> None:
    """Merge the files into the result, and the result into the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="what import_sweep.py wrote on the older torch")
    parser.add_argument("--native", type=Path, help="what it wrote on the newest torch, for its imports without torchspan")
    options = parser.parse_args()
    native = json.loads(options.native.read_text()) if options.native else {"packages": {}}
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {"packages": {}}
    for file in options.files:
        answer = json.loads(file.read_text())
        for name, of in answer["packages"].items():
            if name in native["packages"]:
                of["native"] = [native["torch"], native["packages"][name]["without"]]
        result = answer | {"packages": result["packages"] | {name: _brief(of) for name, of in answer["packages"].items()}}
    result.pop("seconds", None)  # of the last file only
    result["packages"] = dict(sorted(result["packages"].items()))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    before, _, rest = PAGE.read_text().partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{_table(result['packages'])}\n{END}{after}")


def _brief(swept: dict[str, Any]) -> dict[str, Any]:
    """The counts; what each single module misses stays in the sweep's own file, without paths of the machine."""
    missing = {name: counts for name, counts in swept["missing"].items() if "/" not in name}
    return {key: value for key, value in swept.items() if key not in ("failures", "missing")} | {"missing": missing}


def _table(packages: dict[str, Any]) -> str:
    rows = [
        "| package | modules | import without | with | on a newer torch, without | what those miss that still do not |",
        "| --- | --: | --: | --: | --: | --- |",
    ]
    for name, counts_of in packages.items():
        counted = {name: counts["with"] for name, counts in counts_of["missing"].items() if counts["with"]}
        still_missing = dict(sorted(counted.items(), key=lambda item: -item[1]))
        named = ", ".join(f"{_plain(name)} {count}" for name, count in list(still_missing.items())[:NUM_NAMED])
        more = f", and {len(still_missing) - NUM_NAMED} more" if len(still_missing) > NUM_NAMED else ""
        without = "not measured" if counts_of["without"] is None else counts_of["without"]
        torch, native = counts_of.get("native", ("", ""))
        newer = f"{native} ({torch.partition('+')[0]})" if torch else ""
        counts = f"{counts_of['modules']} | {without} | {counts_of['with']} | {newer}"
        rows.append(f"| {name} {counts_of['version']} | {counts} | {named}{more} |")
    return "\n".join(rows)


def _plain(name: str) -> str:
    """A dotted name as code; an error's message as text that a table can hold."""
    return f"`{name}`" if " " not in name else name.replace("|", "/").replace("`", "'")[:80]


if __name__ == "__main__":
    main()
