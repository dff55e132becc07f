"""The page as one HTML file that needs nothing else: no network, no font, no other file."""

from __future__ import annotations

import base64
import difflib
import hashlib
import html
import itertools
import re
import time
from collections.abc import Iterable, Sequence
from importlib.resources import files

from torchspan.core.report import Attempt, Decision
from torchspan.core.text import format_bytes, format_figure
from torchspan.core.topics import Standing
from torchspan.report._page import Entry, File, Page, Run, Statement, shown_site

# What would reorder or hide text that a person is to read: shown by its code instead.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
_TILES = {
    "files": "files to port",
    "lines": "lines that asked",
    "calls": "requests redirected",
    "simulated": "only simulated",
    "unsupported": "unsupported",
    "without_portable_line": "without a portable line",
    "nothing_to_do": "nothing to do",
    "named_only": "only name a device",
    "backports": "backports used",
}
_CHANGED = "This file was written to after the run began: its lines may not be those that ran."
_HOW_TO_READ = (
    "Walk down the page: each card is a statement of the program as it is, beside it one that runs on every device, and below "
    "what it asked for in this run. Where a card says so, nothing is to be done: what it asks for is set in another line. "
    "Dashed cards name a device and asked for nothing themselves. Tick what is ported: "
    '<span id="left-to-port">all</span> left.'
)
_LABELS = {
    (False, False): "portable",
    (False, True): "portable, in part",
    (True, False): "portable, and more by hand",
    (True, True): "portable, in part",
}


def to_html(page: Page) -> str:
    """The page as HTML. All text of the program is escaped, and a policy in the page lets no other script run."""
    style, script = (files("torchspan.report").joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    title = f"Migration report: {_text(_program(page.run))}"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>\n'
        f"<style>\n{style}</style></head>\n<body>\n{''.join(_body(page))}\n<script>{script}</script></body></html>\n"
    )


def _body(page: Page) -> Iterable[str]:
    own = [file for file in page.files if not file.is_installed]
    installed = [file for file in page.files if file.is_installed]
    yield from _head(page, own)
    for number, file in enumerate(own, start=1):
        yield _file(file, number, page)
    if page.unplaced:
        yield f"<h2>At no line of the program</h2>{_entries(page.unplaced, page)}"
    if page.unsupported:
        yield f'<h2 id="unsupported">Unsupported</h2>{_decisions(page.unsupported, page)}'
    yield from _sections(page)
    if installed:
        yield _installed(installed, page)


def _head(page: Page, own: Sequence[File]) -> Iterable[str]:
    run = page.run
    yield f'<header><h1>Migration report</h1><p class="soft"><code>{_text(" ".join(run.command))}</code></p>'
    tiles = (f"<div><dt>{label}</dt><dd>{page.summary[name]:,}</dd></div>" for name, label in _TILES.items())
    yield f'<dl class="figures">{"".join(tiles)}</dl>'
    yield f'<dl class="facts">{"".join(f"<dt>{label}</dt><dd>{value}</dd>" for label, value in _facts(page))}</dl></header>'
    if not own:
        yield "<p>No line of the program asked for a device that is not here, and none of its files that ran names one.</p>"
        return
    yield f'<p class="tools">{_HOW_TO_READ}</p><nav><ol>'
    for number, file in enumerate(own, start=1):
        calls = sum(statement.count for statement in file.statements)
        what = _several(len(file.statements), "statement") + (f", {_several(calls, 'request')}" if calls else "")
        yield f'<li><a href="#file-{number}">{_text(file.name)}</a> <span class="soft">{what}</span></li>'
    yield "</ol></nav>"


def _facts(page: Page) -> Iterable[tuple[str, str]]:
    run = page.run
    is_bad = run.outcome != "ended"
    yield "outcome", f'<span class="{"outcome-bad" if is_bad else ""}">{_text(run.outcome)}</span> after {run.seconds:.1f} s'
    if page.usual:
        device, reason = page.usual
        yield "given", f"<b>{_text(device)}</b>, where a card says nothing else: {_text(reason)}"
    if run.world_size and run.world_size > 1:
        yield "rank", f"{run.rank} of {run.world_size}: this page is of this rank alone"
    if run.num_processes > 1:
        yield "processes", f"{run.num_processes}: the counts are of all together"
    if run.started:
        yield "when", time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(run.started))
    yield "with", _text(", ".join(f"{name} {version}" for name, version in run.versions.items()) or "unknown")


# one file


def _file(file: File, number: int, page: Page) -> str:
    parts = [f'<section><h2 id="file-{number}">{_text(file.name)}</h2>']
    if file.is_changed:
        parts.append(f'<p class="outcome-bad">{_CHANGED}</p>')
    if file.header:
        parts.append(f'<div class="top">The portable lines below need this near its top:<pre>{_text(file.header)}</pre></div>')
    parts += (_statement(statement, file, number, page) for statement in file.statements)
    return "".join([*parts, "</section>"])


def _statement(statement: Statement, file: File, number: int, page: Page) -> str:
    anchor = f"file-{number}-line-{statement.first}"
    lines = f"{statement.first}" if statement.first == statement.last else f"{statement.first}–{statement.last}"
    key = hashlib.sha256(f"{file.path}\0{statement.source}".encode("utf-8", "surrogatepass")).hexdigest()[:24]
    count = f"{statement.count:,}×" if statement.is_reached else "named only"
    details = "".join([_entries(statement.entries, page), _notes(statement)])
    details = details and f'<div class="said">{details}</div>'
    return (
        f'<article class="line{"" if statement.is_reached else " unreached"}" id="{anchor}">'
        f'<div class="where"><a href="#{anchor}" title="{_text(file.name)}:{lines}">{lines}</a>'
        f'<span class="count soft">{count}</span>'
        f'<label class="tools"><input type="checkbox" data-key="torchspan-{key}">ported</label></div>'
        f'<div class="body">{_pair(statement)}{details}</div></article>'
    )


def _pair(statement: Statement) -> str:
    """The statement, and beside it the portable one, with what differs marked."""
    source = statement.source or "(the source cannot be read)"
    if statement.portable is None:
        label = "nothing to do" if statement.work == "nothing" else "as it is; no portable line"
        return f'<div class="pair single"><pre class="plain" data-label="{label}">{_text(_dedented(source)[0])}</pre></div>'
    old, new = _dedented(source, statement.portable)
    before, after = _marked(old, new)
    return (
        f'<div class="pair"><pre class="now" data-label="as it is">{before}</pre>'
        f'<pre class="then" data-label="{_LABELS[statement.work == "by hand", statement.is_partial]}">{after}</pre></div>'
    )


def _marked(old: str, new: str) -> tuple[str, str]:
    """Both texts with what differs between them marked, word by word."""
    a, b = (re.findall(r"\w+|\s+|.", text) for text in (old, new))
    before, after = [], []
    for kind, a1, a2, b1, b2 in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left, right = _text("".join(a[a1:a2])), _text("".join(b[b1:b2]))
        before.append(left if kind == "equal" or not left else f"<mark>{left}</mark>")
        after.append(right if kind == "equal" or not right else f"<mark>{right}</mark>")
    return "".join(before), "".join(after)


def _entries(entries: Sequence[Entry], page: Page) -> str:
    return f"<ul>{''.join(_entry(entry, page, is_only=len(entries) == 1) for entry in entries)}</ul>" if entries else ""


def _entry(entry: Entry, page: Page, *, is_only: bool) -> str:
    is_usual = (entry.given, entry.reason) == page.usual
    target = "" if entry.standing is Standing.SIMULATED else f" → <b>{_text(entry.given)}</b>"
    badge = f' <span class="badge {entry.standing.badge}">{entry.standing}</span>' if entry.standing.badge else ""
    times = f' <span class="soft">{entry.count:,}×</span>' if entry.count > 1 and not is_only else ""
    reason = "" if is_usual else f' <span class="why">{_text(entry.reason)}</span>'
    inside = f' <span class="soft">in {_text(entry.function)}</span>' if entry.function and entry.function != "<module>" else ""
    return f"<li><code>{_text(entry.asked)}</code>{target}{badge}{reason}{times}{inside}</li>"


def _notes(statement: Statement) -> str:
    notes = "".join(f"<li>{_text(note)}</li>" for note in statement.notes)
    return f'<ul class="notes">{notes}</ul>' if notes else ""


def _installed(installed: Sequence[File], page: Page) -> str:
    """What installed packages asked for: nothing to port, but good to know."""
    rows = [
        (f"{file.name}:{statement.first}", statement.source.strip(), _entries(statement.entries, page), f"{statement.count:,}×")
        for file in installed
        for statement in file.statements
    ]
    body = "".join(
        f"<tr><td><code>{_text(place)}</code></td><td><code>{_text(source)}</code></td><td>{request}</td>"
        f'<td class="number">{count}</td></tr>'
        for place, source, request, count in rows
    )
    head = '<tr><th>line</th><th>source</th><th>asked</th><th class="number">times</th></tr>'
    return (
        f"<h2>In installed packages <small>not yours to port</small></h2><details{' open' if len(rows) < 20 else ''}>"
        f'<summary>{_several(len(rows), "line")}</summary><div class="scroll"><table>{head}{body}</table></div></details>'
    )


# backports, compiles


def _sections(page: Page) -> Iterable[str]:
    if page.backports:
        yield "<h2>Backports used <small>names that a newer torch has; nothing to port, but this torch lacks them</small></h2>"
        yield _decisions(page.backports, page)
    if page.attempts or page.choices:
        yield "<h2>Compiles and other choices</h2>"
        yield _attempts(page.attempts) + _decisions(page.choices, page)
    if page.figures:
        yield _table(("figure", "value"), itertools.starmap(format_figure, page.figures.items()))


def _decisions(decisions: Sequence[Decision], page: Page) -> str:
    rows = ((d.subject, d.choice, d.reason, shown_site(d.site, page.run.folder), f"{d.count:,}×") for d in decisions)
    return _table(("asked for", "given", "why", "first line", "times"), rows) if decisions else ""


def _attempts(attempts: Sequence[Attempt]) -> str:
    rows = (
        (
            attempt.region,
            attempt.strategy,
            attempt.backend,
            attempt.outcome,
            f"{attempt.seconds:.1f} s",
            format_bytes(attempt.peak_bytes) if attempt.peak_bytes else "unknown",
            " at ".join(filter(None, (attempt.cause, attempt.where))),
        )
        for attempt in attempts
    )
    return (
        _table(("compile attempt", "strategy", "backend", "outcome", "seconds", "peak memory", "cause"), rows)
        if attempts
        else ""
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    numbers = {"times", "seconds", "peak memory", "value"}
    kinds = [' class="number"' if name in numbers else "" for name in head]
    top = "".join(f"<th{kind}>{name}</th>" for name, kind in zip(head, kinds))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{_text(cell)}</td>" for cell, kind in zip(row, kinds)) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{top}</tr>{body}</table></div>'


# text


def _text(text: str) -> str:
    """Text for HTML, in an attribute too; what would not be seen is shown by its code."""
    return html.escape(_INVISIBLE.sub(lambda match: f"\\u{{{ord(match[0]):x}}}", text))


def _dedented(*texts: str) -> list[str]:
    """Texts without the indent that they share."""
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    indent = min((len(line) - len(line.lstrip()) for line in lines), default=0)
    return ["\n".join(line[indent:] for line in text.split("\n")) for text in texts]


def _several(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _program(run: Run) -> str:
    return run.command[0] if run.command else "a program"
