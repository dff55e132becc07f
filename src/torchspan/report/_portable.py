"""The portable form of a program's lines: what to write so that a line runs on the device that is there."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from torchspan.report._editor import Note
from torchspan.report._rewrite import Rewriter
from torchspan.report._rules import HERE, SUBJECT_NOTES, UNREADABLE, WORDS
from torchspan.report._source import Edit, Source

Work = Literal["replace", "nothing", "by hand"]

_ELSEWHERE = "Nothing to do in this line: what it is given comes from elsewhere{names}"
_SET_IN = "Nothing to do in this line: {name} is set in line {line}, {how}"
_NUMBER = "Names the device by its number, which a CPU has not: give it a device"
_PORTABLE = "Nothing to do: the line runs on every device as it is"


@dataclass(frozen=True)
class Port:
    """What a person can write in place of a statement, and what is left to do.

    `work` is ``replace`` where `portable` takes its place as it stands; ``nothing`` where the statement runs on every device as
    it is; ``by hand`` where no line is known that does, or `portable` is only a part of it: `notes` say what.
    """

    portable: str | None
    notes: tuple[str, ...]
    work: Work = "nothing"


class Porter:
    """Ports the statements of one file, one at a time.

    >>> Porter(Source("", 'import torch\\nx = torch.zeros(3, device="cuda")')).port((2, 2)).portable
    'x = torch.zeros(3, device=device)'
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._rewriter = Rewriter(source)
        self._changes = self._rewriter.editor.changes

    def port(self, span: tuple[int, int], subjects: Iterable[str] = ()) -> Port:
        """The statement of these lines, made portable; `subjects` is what torchspan saw it ask for."""
        if self.source.tree is None or span[1] > len(self.source.lines):
            return Port(None, ())
        subjects = list(subjects)
        before, after = self.source.shown(span), self.source.edited(span, self.edits(span, subjects))
        notes = [note for line in range(span[0], span[1] + 1) for note in self._changes.notes.get(line, ())]
        if not notes:
            requests = [subject for subject in subjects if after == before or not subject.startswith("torch.distributed.")]
            words = [word for subject in requests for start, word in SUBJECT_NOTES if subject.startswith(start)][:1]
            notes = [Note(word, is_work=True) for word in words]
        is_whole = after == before or is_python(after) or self._is_python_inside(span, after)
        if not is_whole:
            notes.append(Note(UNREADABLE, is_work=True))
        elif after == before and not notes and subjects:
            notes = [self._nothing_to_do(span, subjects)]
        portable = after if after != before and is_whole else None
        work: Work = "by hand" if any(note.is_work for note in notes) else "nothing" if portable is None else "replace"
        return Port(portable, tuple(dict.fromkeys(note.text for note in notes)), work)

    def _is_python_inside(self, span: tuple[int, int], text: str) -> bool:
        """Whether the file is Python with this in place of these lines, which may be a part of a long statement."""
        lines = [*self.source.lines[: span[0] - 1], text, *self.source.lines[span[1] :]]
        return Source(self.source.path, "\n".join(lines)).tree is not None

    def edits(self, span: tuple[int, int], subjects: Iterable[str] = ()) -> list[Edit]:
        """All that is to be changed in the file, with what only a run tells of the statement of these lines."""
        is_loaded = any(subject.startswith("torch.load, storage") for subject in subjects)
        return [*self._changes.edits, *(self._map_location(span) if is_loaded else ())]

    def named(self) -> list[tuple[int, int]]:
        """The statements that name CUDA, whether or not they were reached."""
        return sorted({self.source.span(line) for line in self._changes.lines})

    def header(self) -> str | None:
        """What the portable lines of this file need at its top, if anything."""
        if not (self._changes.edits or self._changes.words):
            return None
        lines = [] if self._has_torch else ["import torch"]
        lines += [f"{word} = {HERE}" for word in WORDS if word in self._changes.words]
        return "\n".join(lines) or None

    @cached_property
    def _has_torch(self) -> bool:
        """Whether the file's top has ``torch`` under its own name."""
        tree = self.source.tree
        bodies = [tree.body] if tree is not None else []
        bodies += [part.body for part in bodies[0] if isinstance(part, (ast.Try, ast.If))] if bodies else []
        imports = [alias for body in bodies for node in body if isinstance(node, ast.Import) for alias in node.names]
        return any((alias.asname or alias.name.partition(".")[0]) == "torch" for alias in imports)

    def _nothing_to_do(self, span: tuple[int, int], subjects: list[str]) -> Note:
        """Where the device of a line comes from that names none; a number of one is no device of a CPU's."""
        if all(subject.startswith("torch.accelerator.") for subject in subjects):
            return Note(_PORTABLE)
        nodes = [
            node for node in self._expressions(span) if re.search(r"dev|gpu|cuda|rank|accel", self.source.code(node).lower())
        ]
        is_ported = any(
            isinstance(node, ast.Name) and self._rewriter.places.bindings.is_usable(node.id, node) for node in nodes
        )
        if not is_ported and any(re.search(r"\(device='\d+'\)$", subject) for subject in subjects):
            return Note(_NUMBER, is_work=True)
        for node in nodes:
            lines = [
                binding.line for binding in self._rewriter.places.bindings.of_expression(node) if binding.how == "assigned"
            ]
            if lines:
                line = next((line for line in lines if self.source.span(line) in self.named()), lines[0])
                port = self.port(self.source.span(line))
                how = "which is portable as it is" if port.work == "nothing" else "which is to be ported"
                return Note(_SET_IN.format(name=self.source.code(node), line=line, how=how))
        names = ", ".join(list(dict.fromkeys(self.source.code(node) for node in nodes))[:3])
        return Note(_ELSEWHERE.format(names=f" ({names})" if names else ""))

    def _expressions(self, span: tuple[int, int]) -> Iterator[ast.expr]:
        """The names and attributes that are read in these lines; of ``a.b`` the whole alone."""
        parents = self._rewriter.places.bindings.parents
        for node in ast.walk(self.source.tree) if self.source.tree else ():
            if not isinstance(node, (ast.Name, ast.Attribute)) or not isinstance(node.ctx, ast.Load):
                continue
            parent = parents[node]
            is_called = isinstance(parent, ast.Call) and parent.func is node
            if not is_called and not isinstance(parent, ast.Attribute) and span[0] <= node.lineno <= span[1]:
                yield node

    def _map_location(self, span: tuple[int, int]) -> Iterator[Edit]:
        for node in ast.walk(self.source.tree) if self.source.tree else ():
            if not isinstance(node, ast.Call) or self._rewriter.places.dotted(node.func) != "torch.load" or not node.args:
                continue
            is_told = any(keyword.arg == "map_location" for keyword in node.keywords) or len(node.args) > 1
            if span[0] <= node.lineno <= span[1] and not is_told:
                place = self.source.end(node.args[0])
                yield Edit(place, place, f", map_location={self._rewriter.editor.word(node)}")


def is_python(text: str) -> bool:
    """Whether text is a statement, or the head of one.

    >>> is_python("    with x as y:"), is_python("x = (")
    (True, False)
    """
    code = textwrap.dedent(text)
    for whole in (code, f"{code}\n    pass", f"try:\n    pass\n{code}\n    pass", f"if x:\n    pass\n{code}\n    pass"):
        try:
            ast.parse(whole)
        except (SyntaxError, ValueError):
            continue
        return True
    return False
