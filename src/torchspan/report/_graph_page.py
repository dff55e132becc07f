"""A pipeline's graphs as one HTML page, on which a person steps through the passes; no network, no other file.

The page has each node once, and for each pass the lines of the graph after it beside those of the graph before: what was added,
removed, changed or moved. Its script draws only the lines that are in sight, so a graph may have tens of thousands.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from torch.fx import Node

from torchspan.core.files import write_whole
from torchspan.core.graph import PHASE, Graph, is_async_collective
from torchspan.passes._base import Pass, PassContext
from torchspan.passes._instruments import Instrument, count
from torchspan.passes._values import shown_value, target_name

SAME, ADDED, REMOVED, CHANGED, MOVED, LEFT = range(6)
"""What a line is: there before and after; new; gone; of the same name and different; moved here; moved from here."""


class GraphPage(Instrument):
    """Writes the page to a file, anew after each pass, so that it is there when the next one fails."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._graphs: list[tuple[str, Graph]] = []

    def before(self, pass_: Pass, graph: Graph) -> None:
        """The graph that the first pass is given is on the page too."""
        if not self._graphs:
            self._add("captured", graph)

    def after(self, pass_: Pass, before: Graph, after: Graph) -> None:
        """Put the result on the page."""
        self._add(str(pass_), after)

    def failed(self, pass_: Pass, graph: Graph, error: Exception, context: PassContext) -> str | None:
        """The page ends with the graph that the pass was given."""
        return f"the graphs before it: {self._path}"

    def _add(self, name: str, graph: Graph) -> None:
        self._graphs.append((name, graph))
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self._path, graph_page(self._graphs).encode())


def graph_page(graphs: Sequence[tuple[str, Graph]], title: str = "Graph after each pass") -> str:
    """The page of graphs, each with the name of what gave it."""
    style, script = (files("torchspan.report").joinpath(name).read_text("utf-8") for name in ("graph.css", "graph.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    data = json.dumps(page_data(graphs), separators=(",", ":"), ensure_ascii=True).replace("<", "\\u003c")
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{html.escape(title)}</title>\n'
        f"<style>\n{style}</style></head>\n<body>\n{_BODY}\n"
        f'<script type="application/json" id="data">{data}</script>\n<script>{script}</script></body></html>\n'
    )


_BODY = """<header><h1>Graph after each pass</h1>
<nav id="stages" aria-label="passes"></nav>
<div class="tools">
<input id="search" type="search" placeholder="find a layer, an operator, a node  ( / )" aria-label="find" spellcheck="false">
<span id="hits" class="soft" aria-live="polite"></span>
<button id="previous" title="previous one (Shift+Enter)">↑</button><button id="next" title="next one (Enter)">↓</button>
<label><input id="only" type="checkbox"> only what changed</label>
<button id="collapse" title="close or open all parts">close all parts</button>
<span class="key"><i class="added"></i>added <i class="removed"></i>removed
<i class="changed"></i>changed <i class="moved"></i>moved</span>
</div></header>
<main><aside><div id="outline" aria-label="parts of the model"></div></aside>
<section id="lines" tabindex="0" aria-label="nodes"><div id="room"><div id="seen"></div></div></section>
<aside id="about"><p class="soft">Choose a node to see what it reads, what reads it, and, of a collective, its wait.
Keys: ← → passes, / find, n next change, w from a collective to its wait and back.</p></aside></main>"""


# what is on it


def page_data(graphs: Sequence[tuple[str, Graph]]) -> dict[str, Any]:
    """Everything on the page as plain values.

    ``nodes`` are rows of name, what is called, arguments, value, place in the model, phase, and kind (0 an operator, 1 a
    collective, 2 a wait, 3 an input, 4 the output); ``reads`` the names that each reads. Of each of the ``stages``, ``lines``
    are pairs of a node and what it is (`SAME`, `ADDED`, …) against the stage before, flat.
    """
    table = _Table()
    stages: list[dict[str, Any]] = []
    earlier: list[int] | None = None
    for name, graph in graphs:
        stands_for = _stands_for(graph)
        rows = [table.row(node, stands_for) for node in graph.module.graph.nodes]
        lines = list(_difference(table, earlier if earlier is not None else rows, rows))
        kinds = [kind for _, kind in lines]
        stages.append(
            {
                "name": name,
                "counts": count(graph),
                "changes": [kinds.count(kind) for kind in (ADDED, REMOVED, CHANGED, MOVED)],
                "lines": [number for line in lines for number in line],
            }
        )
        earlier = rows
    return {"nodes": table.rows, "reads": table.reads, "stages": stages, "strings": table.strings}


class _Table:
    """Each different node once; texts that recur are numbers into `strings`."""

    def __init__(self) -> None:
        self.rows: list[list[Any]] = []
        self.reads: list[list[str]] = []
        self.strings: list[str] = []
        self._index: dict[Any, int] = {}
        self._texts: dict[str, int] = {}

    def row(self, node: Node, stands_for: Mapping[Node, str]) -> int:
        """The number of a node's row."""
        reads = tuple(dict.fromkeys(source.name for source in node.all_input_nodes))
        arguments = stands_for.get(node) or _arguments(node)
        custom = node.meta.get("custom") or {}
        value = shown_value(node.meta["val"]) if node.meta.get("val") is not None else ""
        texts = (target_name(node) if node.op != "output" else "return", value, str(custom.get("module", "")))
        cells = (node.name, arguments, _kind(node), int(_is_backward(node)), *texts)
        if cells not in self._index:
            self._index[cells] = len(self.rows)
            self.rows.append([*cells[:4], *map(self._text, texts)])
            self.reads.append(list(reads))
        return self._index[cells]

    def _text(self, text: str) -> int:
        if text not in self._texts:
            self._texts[text] = len(self.strings)
            self.strings.append(text)
        return self._texts[text]


def _arguments(node: Node) -> str:
    named = [f"{key}={value}" for key, value in node.kwargs.items()]
    return ", ".join([*map(str, node.args), *named])


def _stands_for(graph: Graph) -> dict[Node, str]:
    """What each input is."""
    return {node: f"{spec.kind} {spec.name}" for node, spec in zip(graph.placeholders(), graph.inputs)}


def _is_backward(node: Node) -> bool:
    """Whether a node is of the backward, as either capture says it."""
    phase = (node.meta.get("custom") or {}).get(PHASE)
    return phase == "backward" or str(node.meta.get("partitioner_tag", "")).endswith("_backward")


def _kind(node: Node) -> int:
    if node.op in ("placeholder", "output"):
        return 3 if node.op == "placeholder" else 4
    if str(node.target).startswith("_c10d_functional.wait_tensor"):
        return 2
    return int(is_async_collective(node))


def _difference(table: _Table, before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The lines of both graphs in one order: those of the graph after, with what was before where it was."""
    old = {table.rows[row][0]: place for place, row in enumerate(before)}
    new = {table.rows[row][0]: place for place, row in enumerate(after)}
    common = [(place, old[name]) for name, place in new.items() if name in old]
    stayed = _longest_rising([was for _, was in common])
    next_old = 0
    for row in after:
        name = table.rows[row][0]
        if name not in old:
            yield row, ADDED
        elif old[name] not in stayed:
            yield row, MOVED
        else:
            for was in range(next_old, old[name]):
                gone = table.rows[before[was]][0]
                yield before[was], LEFT if gone in new else REMOVED
            next_old = old[name] + 1
            yield row, SAME if before[old[name]] == row else CHANGED
    for was in range(next_old, len(before)):
        yield before[was], LEFT if table.rows[before[was]][0] in new else REMOVED


def _longest_rising(numbers: Sequence[int]) -> set[int]:
    """The members of a longest rising subsequence: what need not move for the rest to be in order.

    >>> sorted(_longest_rising([3, 0, 1, 2]))
    [0, 1, 2]
    """
    ends: list[int] = []
    places: list[int] = []
    previous: list[int] = []
    for index, number in enumerate(numbers):
        length = bisect_left(ends, number)
        previous.append(places[length - 1] if length else -1)
        ends[length : length + 1] = [number]
        places[length : length + 1] = [index]
    members, at = set[int](), places[-1] if places else -1
    while at >= 0:
        members.add(numbers[at])
        at = previous[at]
    return members
