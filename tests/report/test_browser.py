"""The page in a real browser: its script runs without an error, its text is there, and no other script can run."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from torchspan.core.report import Report
from torchspan.report import Run, make_page, write_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000 --dump-dom"
)


def opened(page: Path, folder: Path) -> tuple[str, list[str]]:
    """The document after its script ran, and what the browser's console says."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page is not opened")
    command = [browser, *OPTIONS.split(), f"--user-data-dir={folder}", page.as_uri()]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    return process.stdout, [line for line in process.stderr.splitlines() if ":CONSOLE" in line]


@pytest.mark.once
@pytest.mark.slow
def test_the_page_opens_without_an_error(run_python, tmp_path: Path) -> None:
    run_python("import torch\nx = torch.ones(3, device='cuda')  # <script>alert(1)</script>\n", "--help", expect=1)
    run_python(None, "-m", "torchspan", "run", "--quiet", "--compile", "off", "--report", "out.html", "program.py")
    document, console = opened(tmp_path / "out.html", tmp_path / "profile")
    assert console == []
    assert '<span id="left-to-port">1</span>' in document  # the script counted the cards
    for words in ("Migration report", "program.py", "device=<mark>device</mark>", "&lt;script&gt;alert(1)&lt;/script&gt;"):
        assert words in document


@pytest.mark.once
@pytest.mark.slow
def test_the_policy_of_the_page_lets_no_other_script_run_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("import torch\nx = torch.ones(3).cuda()\n")
    report = Report()
    report.decide("device", "Tensor.cuda(device='cuda')", "cpu", "no CUDA device here", f"{tmp_path}/a.py:2")
    write_page(make_page(report, Run((), str(tmp_path)), []), tmp_path / "out.html")
    page = (tmp_path / "out.html").read_text()
    (tmp_path / "out.html").write_text(page.replace("</body>", "<script>document.title = 'changed'</script></body>"))
    document, console = opened(tmp_path / "out.html", tmp_path / "profile")
    assert "<title>changed" not in document and re.search("Content.Security.Policy", "\n".join(console))
