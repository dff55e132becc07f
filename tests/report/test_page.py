"""The page, from a Report given by hand: what is on it, and that nothing of the program's text can harm it."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from torchspan.core.errors import InputError
from torchspan.core.report import Attempt, Report
from torchspan.core.topics import Standing
from torchspan.report import Run, make_page, report_path, write_page
from torchspan.report._html import to_html

DOCUMENT = Path(__file__).parents[2] / "docs" / "porting.md"
WHY = "no CUDA device here, nor another accelerator"


def example(folder: Path, name: str = "train.py", text: str = 'import torch\nx = torch.ones(3, device="cuda")\n') -> Report:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    report = Report()
    report.tally("device", "torch.ones(device='cuda')", "cpu", WHY, f"{path}:2").count += 3
    report.decide(
        "device", "torch.cuda.Stream()", "simulated", "work is done when it is asked for", f"{path}:2", Standing.SIMULATED
    )
    report.decide("backport", "torch.fx.traceback.annotate", "torchspan's annotate", "torch has it since 2.10.0", f"{path}:1")
    report.decide("compile", "Net", "whole → eager", "one region")
    report.decide("unsupported", "torch.distributed.thing", "an error", "no such operator", f"{path}:2")
    report.attempt(Attempt("whole", "Net", "inductor", "compiled", 2.5, 3 * 2**20))
    report.figure("first_step_wait_s", 0.25)
    return report


class _Text(HTMLParser):
    """The text of a page, and its tags in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.attributes = "", [], []
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_has_all_of_the_report(tmp_path: Path) -> None:
    page = make_page(example(tmp_path), Run(("train.py",), str(tmp_path), started=1.0), [])
    text = _Text(to_html(page)).text
    for words in (
        'x = torch.ones(3, device="cuda")',
        "x = torch.ones(3, device=device)",
        "device = str(torch.accelerator.current_accelerator(check_available=True)",
        "work is done when it is asked for",
        WHY,
        "torchspan's annotate",
        "whole → eager",
        "3.0 MiB",
        "no such operator",
        "first step wait",
        "written to after the run began",
    ):
        assert words in text, words
    assert page.summary["unsupported"] == 1 and page.summary["calls"] == 4 and page.summary["simulated"] == 1


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    parsed = _Text(to_html(make_page(example(tmp_path), Run(("train.py",), str(tmp_path)), [])))
    assert not {"link", "img", "iframe", "object", "embed"} & set(parsed.tags)
    assert not [value for name, value in parsed.attributes if name in ("src", "href") and not (value or "").startswith("#")]
    assert "://" not in to_html(make_page(Report(), Run(), []))


HOSTILE = '</pre><script>alert("x")</script>&lt;\'"><img src=x onerror=alert(1)> \u202eevil\u2066\x1b[31m {0} %s'


def test_text_of_the_program_is_shown_as_text(tmp_path: Path) -> None:
    name = "a&b<script>alert(1)<'\">.py".replace("/", "")
    report = example(tmp_path, name, f"import torch\nx = torch.ones(3, device='cuda')  # {HOSTILE}\n")
    report.decide("device", HOSTILE, HOSTILE, HOSTILE, f"{tmp_path / name}:2")
    report.decide("backport", HOSTILE, HOSTILE, HOSTILE, HOSTILE)
    report.attempt(Attempt(HOSTILE, HOSTILE, HOSTILE, "failed", 0.0, None, HOSTILE, HOSTILE))
    run = Run((name, HOSTILE), str(tmp_path), f"failed: {HOSTILE}", versions={"torch": HOSTILE})
    plain = to_html(make_page(example(tmp_path), Run(("train.py",), str(tmp_path)), []))
    page = to_html(make_page(report, run, []))
    assert page.count("<script>") == plain.count("<script>") == 1
    parsed = _Text(page)
    assert "img" not in parsed.tags and not [name for name, _ in parsed.attributes if name.startswith("on")]
    assert "\u202e" not in page and "\x1b" not in page and "\\u{202e}evil" in parsed.text
    assert name in parsed.text


def test_a_name_that_is_no_text_is_written_all_the_same(tmp_path: Path) -> None:
    name = b"caf\xe9.py".decode("utf-8", "surrogateescape")
    report = example(tmp_path, name)
    page = make_page(report, Run((name,), str(tmp_path)), [str(tmp_path / name)])
    for kind in ("html", "json"):
        write_page(page, tmp_path / f"out.{kind}")
        assert "caf" in (tmp_path / f"out.{kind}").read_text("utf-8")


def test_files_that_cannot_be_read_are_there_by_their_lines(tmp_path: Path) -> None:
    report = Report()
    for site in ("<stdin>:3", f"{tmp_path}/gone.py:7", "relative.py:1", "nothing", None):
        report.decide("device", "Tensor.cuda(device='cuda')", "cpu", WHY, site)
    page = make_page(report, Run((), str(tmp_path)), [str(tmp_path / "absent.py")])
    assert [file.name for file in page.files] == ["gone.py", "relative.py", "<stdin>"]
    assert [statement.first for file in page.files for statement in file.statements] == [7, 1, 3]
    assert len(page.unplaced) == 2 and page.summary["calls"] == 5
    assert "the source cannot be read" in _Text(to_html(page)).text


def test_installed_packages_are_apart_and_have_nothing_to_port(tmp_path: Path) -> None:
    package = tmp_path / "lib" / "site-packages" / "library"
    package.mkdir(parents=True)
    report = example(tmp_path)
    example_of = example(package, "model.py")
    for decision in example_of.decisions:
        report.decide(decision.topic, decision.subject, decision.choice, decision.reason, decision.site)
    page = make_page(report, Run((), str(tmp_path)), [])
    assert [(file.name, file.is_installed) for file in page.files] == [("train.py", False), ("library/model.py", True)]
    assert page.files[1].statements[0].portable is None and page.summary["files"] == 1
    assert "In installed packages" in _Text(to_html(page)).text


def keys(value: Any, path: str = "") -> Iterator[str]:
    """Each name in a JSON value, with the names above it."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if path in ("figures", "summary", "run.versions", "backports[]", "choices[]", "unsupported[]"):
                continue  # described by a sentence, or as elements of `decisions`
            yield f"{path}.{name}".lstrip(".")
            yield from keys(inner, f"{path}.{name}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from keys(inner, f"{path}[]")


@pytest.mark.once
def test_the_schema_is_what_the_document_says(tmp_path: Path) -> None:
    write_page(make_page(example(tmp_path), Run(("train.py",), str(tmp_path)), []), tmp_path / "out.json")
    values = json.loads((tmp_path / "out.json").read_text())
    written = set(keys(values))
    described = set(re.findall(r"^\| `([^`]+)` \|", DOCUMENT.read_text(), flags=re.MULTILINE))
    assert written <= described, sorted(written - described)
    assert described <= written, sorted(described - written)
    assert set(re.findall(r"`(\w+)`: ", DOCUMENT.read_text().partition("<!-- summary -->")[2])) == set(values["summary"])


@pytest.mark.parametrize(
    ("name", "message"), [("out.txt", "ends in .html or .json"), ("absent/out.html", "no folder 'absent'")]
)
def test_a_report_that_cannot_be_written_is_refused_before_the_run(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=re.escape(message)):
        report_path(Path(name))


def test_a_rank_is_in_the_name_of_all_pages_but_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, name in (("0", "out.html"), ("1", "out.rank1.html")):
        monkeypatch.setenv("RANK", rank)
        assert report_path(tmp_path / "out.html") == tmp_path / name


def test_differences_are_marked_and_nothing_is_lost(tmp_path: Path) -> None:
    page = to_html(make_page(example(tmp_path), Run((), str(tmp_path)), []))
    (now,) = re.findall(r'<pre class="now"[^>]*>(.*?)</pre>', page, flags=re.DOTALL)
    assert html.unescape(re.sub("</?mark>", "", now)) == 'x = torch.ones(3, device="cuda")'
    assert re.findall("<mark>(.*?)</mark>", now) == ["&quot;cuda&quot;"]
