"""A compile's profile as one page: HTML with its style and a drawing inside, without scripts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from torchspan.core.text import format_bytes
from torchspan.diagnosis.profile import Event, Profile
from torchspan.regions.phases import PHASES

COLOURS = {
    "start": "#9aa0a6",
    "dynamo": "#4c78a8",
    "backend": "#72b7b2",
    "aot": "#eeca3b",
    "inductor": "#54a24b",
    "c++": "#e45756",
    "triton": "#b279a2",
    "run": "#c9c9c9",
}
ROW, WIDTH = 18, 1000
MIN_SHARE = 0.001  # of the whole, below which an event is not drawn

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th { text-align: left; font-weight: 600; }
td, th { padding: .25rem .6rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
td.n, th.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.bar { display: flex; height: 1.6rem; border-radius: .3rem; overflow: hidden; margin: 1rem 0; }
.key { display: inline-block; width: .8rem; height: .8rem; border-radius: .2rem; margin-right: .4rem; }
.ended { border-left: .3rem solid #e45756; padding: .1rem 1rem; background: var(--soft); }
pre { overflow: auto; max-height: 24rem; background: var(--soft); padding: .7rem; font-size: 12.5px; }
svg { width: 100%; height: auto; background: var(--soft); border-radius: .3rem; } svg text { font: 11px system-ui, sans-serif; }
td.site { min-width: 12rem; }
.soft { opacity: .75; }
"""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(profiles: Sequence[Profile], title: str = "Compile profile") -> str:
    """The whole page, a section a profile."""
    parts = "".join(part for profile in profiles for part in _section(profile))
    nothing = "" if profiles else "<p>Nothing was compiled.</p>"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{nothing}{parts}</body></html>\n"
    )


def _section(profile: Profile) -> Iterator[str]:
    peak = f", at most {format_bytes(profile.peak_bytes)}" if profile.peak_bytes else ""
    yield f"<h1>{escape(profile.region)}: {profile.outcome}</h1><p>{profile.seconds:.2f} s{peak}</p>"
    yield f'<p class="soft">{escape(_pairs(profile))}</p>'
    if profile.outcome != "compiled":
        yield _ended(profile)
    yield _bar(profile)
    yield _phase_table(profile)
    if profile.graphs:
        yield _graph_table(profile)
    if profile.breaks:
        rows = [
            f"<td class='site'>{escape(graph_break.site or '-')}</td><td>{escape(_first_lines(graph_break.reason))}</td>"
            for graph_break in profile.breaks
        ]
        yield f"<h2>Graph breaks</h2>{_table(('where', 'why'), rows)}"
    if profile.events:
        yield f"<h2>Timeline</h2>{_timeline(profile)}"


def _pairs(profile: Profile) -> str:
    return " · ".join(f"{name} {value}" for name, value in {**profile.versions, **profile.settings}.items())


def _ended(profile: Profile) -> str:
    lines = [f"<p><b>{escape(profile.cause or profile.outcome)}</b></p>"]
    if profile.where:
        lines.append(f"<p>at {escape(profile.where)}</p>")
    if profile.open_events:
        lines.append(f"<p>in the middle of: {escape(' › '.join(profile.open_events))}</p>")
    lines += [f"<p>waiting for <code>{escape(command)}</code></p>" for command in profile.commands]
    stack = f"<details open><summary>Stack</summary><pre>{escape(profile.stack)}</pre></details>" if profile.stack else ""
    return f'<div class="ended">{"".join(lines)}{stack}</div>'


def _bar(profile: Profile) -> str:
    whole = sum(phase.seconds for phase in profile.phases) or 1.0
    parts = (
        f'<span title="{escape(phase.name)}: {phase.seconds:.2f} s" '
        f'style="background:{COLOURS[phase.name]};width:{100 * phase.seconds / whole:.2f}%"></span>'
        for phase in profile.phases
    )
    return f'<div class="bar">{"".join(parts)}</div>'


def _phase_table(profile: Profile) -> str:
    whole = sum(phase.seconds for phase in profile.phases) or 1.0
    rows = [
        f'<td><span class="key" style="background:{COLOURS[phase.name]}"></span>{escape(phase.name)}</td>'
        f"<td>{escape(PHASES[phase.name])}</td>"
        f'<td class="n">{phase.seconds:.2f}</td><td class="n">{100 * phase.seconds / whole:.0f} %</td>'
        f'<td class="n">{format_bytes(phase.peak_bytes) if phase.peak_bytes else "-"}</td>'
        for phase in profile.phases
    ]
    return f"<h2>Phases</h2>{_table(('phase', 'what', 'seconds', 'share', 'peak memory'), rows)}"


def _graph_table(profile: Profile) -> str:
    names = [phase.name for phase in profile.phases if any(phase.name in graph.seconds for graph in profile.graphs)]
    rows = [
        f"<td>{escape(graph.function or '-')} <span class='soft'>{escape(graph.compile_id)}</span><br>"
        f'<span class="soft">{escape(graph.site or "")}</span></td>'
        f'<td class="n">{graph.num_operations}</td><td class="n">{graph.num_guards}</td>'
        + "".join(f'<td class="n">{graph.seconds.get(name, 0.0):.2f}</td>' for name in names)
        + f'<td class="n">{graph.total_seconds:.2f}</td>'
        for graph in profile.graphs
    ]
    return f"<h2>Graphs</h2>{_table(('graph', 'operations', 'guards', *names, 'seconds'), rows)}"


def _timeline(profile: Profile) -> str:
    """The events as a drawing: a row a depth, and the memory below."""
    whole = max(profile.seconds, max(event.began_s + event.seconds for event in profile.events), 1e-9)
    shown = [event for event in profile.events if event.seconds >= MIN_SHARE * whole]
    rows = 1 + max((event.depth for event in shown), default=0)
    drawn = "".join(_box(event, whole) for event in shown)
    top = rows * ROW + 6
    line, height = _memory_line(profile, whole, top)
    return f'<svg viewBox="0 0 {WIDTH} {top + height}" role="img" aria-label="timeline">{drawn}{line}</svg>'


def _box(event: Event, whole: float) -> str:
    left, width = WIDTH * event.began_s / whole, max(0.5, WIDTH * event.seconds / whole)
    room = int(width // 6)
    label = event.name if len(event.name) <= room else event.name[: max(0, room - 1)] + "…" if room > 3 else ""
    mark = ' stroke="#e45756" stroke-width="2"' if event.is_open else ""
    return (
        f"<g><title>{escape(event.name)}: {event.seconds:.3f} s{', never ended' if event.is_open else ''}</title>"
        f'<rect x="{left:.2f}" y="{event.depth * ROW}" width="{width:.2f}" height="{ROW - 2}" '
        f'fill="{COLOURS[event.phase]}"{mark}/>'
        f'<text x="{left + 3:.2f}" y="{event.depth * ROW + 12}" fill="#111">{escape(label)}</text></g>'
    )


def _memory_line(profile: Profile, whole: float, top: int) -> tuple[str, int]:
    if not profile.memory:
        return "", 0
    most = max(used for _, used in profile.memory) or 1
    points = " ".join(f"{WIDTH * when / whole:.1f},{top + 80 - 70 * used / most:.1f}" for when, used in profile.memory)
    return (
        f'<polyline points="{points}" fill="none" stroke="#4c78a8" stroke-width="1.5"/>'
        f'<text x="4" y="{top + 92}" fill="#888">memory, at most {format_bytes(most)}</text>'
    ), 98


def _first_lines(reason: str) -> str:
    return " ".join(line.strip() for line in reason.splitlines()[:3])


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    texts = ("phase", "what", "graph", "where", "why")
    head = "".join(f"<th{'' if title in texts else ' class=n'}>{escape(title)}</th>" for title in heads)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"
