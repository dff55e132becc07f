"""The page of a pipeline's graphs: what it has of each pass, and that its script runs in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.fx import GraphModule, Node

from torchspan.core.graph import Graph, InputSpec, OutputSpec
from torchspan.report._graph_page import ADDED, CHANGED, LEFT, MOVED, REMOVED, SAME, graph_page, page_data

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
OPTIONS = "--headless --no-sandbox --disable-gpu --enable-logging=stderr --virtual-time-budget=3000 --dump-dom"
c10d = torch.ops._c10d_functional


def made(*lines: tuple[str, Any, tuple[str, ...], str]) -> Graph:
    """A graph of lines: name, what is called, what is read, the path of the module."""
    module = GraphModule(torch.nn.Module(), torch.fx.Graph())
    nodes: dict[str, Node] = {"x": module.graph.placeholder("x")}
    for name, target, reads, path in lines:
        nodes[name] = module.graph.create_node("call_function", target, tuple(nodes[source] for source in reads), name=name)
        nodes[name].meta["custom"] = {"module": path}
    module.graph.output([nodes[lines[-1][0]]])
    return Graph(module, (InputSpec("parameter", "layers.0.w</script><b>"),), (OutputSpec("output", "0"),))


GATHER, WAIT = c10d.all_gather_into_tensor.default, c10d.wait_tensor.default
BEFORE = made(
    ("gather", GATHER, ("x",), "layers.0.wq"),
    ("wait", WAIT, ("gather",), "layers.0.wq"),
    ("early", torch.neg, ("x",), "layers.0.norm"),
    ("old", torch.relu, ("wait",), "layers.1"),
    ("end", torch.add, ("old", "early"), "layers.1"),
)
AFTER = made(
    ("early", torch.neg, ("x",), "layers.0.norm"),
    ("gather", GATHER, ("x",), "layers.0.wq"),
    ("wait", WAIT, ("gather",), "layers.0.wq"),
    ("new", torch.abs, ("wait",), "layers.1"),
    ("end", torch.add, ("new", "early"), "layers.1"),
)


def test_each_line_says_what_the_pass_did_to_it() -> None:
    data = page_data([("captured", BEFORE), ("my_pass", AFTER)])
    flat = data["stages"][1]["lines"]
    lines = [(data["nodes"][row][0], kind) for row, kind in zip(flat[::2], flat[1::2])]
    assert lines == [
        ("x", SAME),
        ("early", MOVED),
        ("gather", SAME),
        ("wait", SAME),
        ("new", ADDED),
        ("early", LEFT),
        ("old", REMOVED),
        ("end", CHANGED),
        ("output", SAME),
    ]
    assert data["stages"][1]["changes"] == [1, 1, 1, 1] and data["stages"][0]["changes"] == [0, 0, 0, 0]
    assert data["stages"][1]["counts"] == {"nodes": 7, "all_gather_into_tensor": 1}
    assert len(data["nodes"]) == 9  # a node that two stages have alike is there once


def test_the_page_is_one_file_that_asks_for_no_other_and_escapes_what_the_program_says() -> None:
    page = graph_page([("captured", BEFORE), ("my_pass", AFTER)])
    assert not re.search(r"(src|href)=|url\(|https?://|@import", page)
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    assert json.loads(text)["nodes"][0][1] == "parameter layers.0.w</script><b>"


def opened(page: Path, fragment: str, folder: Path) -> str:
    """The document after its script ran for an address that ends with `asked`; fails where the console says anything."""
    browser = next(filter(None, map(shutil.which, NAMES)), None)
    if browser is None:
        pytest.skip("no Chromium on this machine: the page is not opened")
    command = [browser, *OPTIONS.split(), f"--user-data-dir={folder}", f"{page.as_uri()}#{fragment}"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert [line for line in process.stderr.splitlines() if ":CONSOLE" in line] == []
    return process.stdout


@pytest.mark.once
@pytest.mark.slow
def test_in_a_browser_a_layer_is_found_and_a_collectives_wait_is_jumped_to(tmp_path: Path) -> None:
    (tmp_path / "graph.html").write_text(graph_page([("captured", BEFORE), ("my_pass", AFTER)]))
    document = opened(tmp_path / "graph.html", "stage=1&find=layers.0&node=gather&wait", tmp_path / "profile")
    assert "<h2>wait</h2>" in document and "the collective it waits for" in document  # the wait is chosen
    assert re.search(r'id="hits"[^>]*>\d+ of 5<', document)  # the input, early twice, gather, wait
    assert document.count('class="row removed') == 1 and "row changed" in document and "row moved" in document
    assert "layers.0.w&lt;/script&gt;&lt;b&gt;" in document
