"""The source of a program: its statements by line, and what its names stand for. Nothing of it is run."""

from __future__ import annotations

import ast
import io
import linecache
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

MOST_LINES = 12
"""A statement that is longer than this is shown as the one line that is meant."""


@dataclass(frozen=True)
class Edit:
    """Text to be put in place of what is between two places of the file, in bytes of its UTF-8.

    Where several put something at one place, what `opens` (a bracket before an expression) stands next to what follows it.
    """

    begin: int
    end: int
    text: str
    opens: bool = False


class Source:
    """One file of a program. What cannot be read has no lines; what is no Python (any more) has lines and no tree."""

    def __init__(self, path: str, text: str | None = None) -> None:
        self.path = path
        self.text = _read(path) if text is None else text
        self.lines = self.text.split("\n") if self.text else []

    @cached_property
    def tree(self) -> ast.Module | None:
        """The file as Python reads it, or None."""
        try:
            return ast.parse(self.text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            return None

    @cached_property
    def names(self) -> dict[str, str]:
        """What each imported name stands for, dotted."""
        names: dict[str, str] = {}
        for node in ast.walk(self.tree) if self.tree else ():
            if isinstance(node, ast.Import):
                for alias in node.names:
                    first = alias.name.partition(".")[0]
                    names[alias.asname or first] = alias.name if alias.asname else first
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        return names

    def dotted(self, node: ast.AST) -> str | None:
        """What an expression names, if it is a name that was imported or an attribute of one.

        >>> source = Source("", "from torch import cuda as c\\nc.Stream")
        >>> source.dotted(source.tree.body[1].value)
        'torch.cuda.Stream'
        """
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.dotted(node.value)
            return base and f"{base}.{node.attr}"
        return None

    @cached_property
    def _spans(self) -> dict[int, tuple[int, int]]:
        """The first and last line of the statement (of a compound one, its head) on each line."""
        spans: dict[int, tuple[int, int]] = {}
        for first, last in sorted(_statements(self.tree) if self.tree else (), key=lambda span: span[0] - span[1]):
            spans |= dict.fromkeys(range(first, last + 1), (first, last))  # the shorter come later
        return spans

    def span(self, line: int) -> tuple[int, int]:
        """The first and last line of the statement that `line` is of.

        >>> Source("", "with open(\\n    'a'\\n):\\n    pass").span(2)
        (1, 3)
        """
        first, last = self._spans.get(line, (line, line))
        return (first, last) if last - first < MOST_LINES else (line, line)

    def shown(self, span: tuple[int, int]) -> str:
        """The lines from the first to the last, as they are in the file."""
        return "\n".join(self.lines[span[0] - 1 : span[1]])

    # places, in bytes

    @cached_property
    def data(self) -> bytes:
        """The file in UTF-8, in which Python counts columns."""
        return self.text.encode("utf-8", "surrogatepass")

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line.encode("utf-8", "surrogatepass")) + 1)
        return starts

    def place(self, line: int, column: int) -> int:
        """Where a line and column of the tree are in `data`."""
        return self._starts[line - 1] + column

    def begin(self, node: ast.expr | ast.stmt) -> int:
        """Where a node begins."""
        return self.place(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        """Where a node ends."""
        return self.place(node.end_lineno or node.lineno, node.end_col_offset or 0)

    def code(self, node: ast.expr | ast.stmt) -> str:
        """The text of a node."""
        return self.data[self.begin(node) : self.end(node)].decode("utf-8", "surrogatepass")

    def edited(self, span: tuple[int, int], edits: list[Edit]) -> str:
        """The lines from the first to the last with those `edits` made that lie in them."""
        begin, end = self._starts[span[0] - 1], self._starts[span[1]] - 1
        data = self.data
        for edit in reversed(_in_order([edit for edit in edits if begin <= edit.begin and edit.end <= end])):
            data = data[: edit.begin] + edit.text.encode() + data[edit.end :]
        return data[begin : end + len(data) - len(self.data)].decode("utf-8", "surrogatepass")


def _in_order(edits: list[Edit]) -> list[Edit]:
    """Edits as they follow each other, without those inside a text that is replaced as a whole; outer ones were found first."""
    replaced = [edit for edit in edits if edit.begin < edit.end]
    kept = [
        edit
        for edit in edits
        if not any(
            r is not edit
            and r.begin <= edit.begin
            and edit.end <= r.end
            and (r.begin < edit.begin < r.end or edit.begin < edit.end)
            for r in replaced
        )
    ]
    order = {id(edit): place if edit.opens else -place for place, edit in enumerate(kept)}
    return sorted(kept, key=lambda edit: (edit.begin, edit.begin < edit.end, edit.opens, order[id(edit)]))


def _read(path: str) -> str:
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError, ValueError):  # ValueError: a NUL in the name
        return "".join(linecache.getlines(path))  # a notebook's cell, code in a zip file


def without_comments(text: str) -> str:
    """Lines of Python without their comments.

    >>> without_comments("x = '#'  # 'cuda'")
    "x = '#'  "
    """
    lines = text.split("\n")
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                line, column = token.start
                lines[line - 1] = lines[line - 1][:column]
    except (tokenize.TokenError, SyntaxError):
        return "\n".join(lines)  # the head of a statement alone: what could be read of it has been
    return "\n".join(lines)


def _statements(tree: ast.Module) -> Iterator[tuple[int, int]]:
    """The first and last line of each simple statement and of each compound statement's head."""
    for node in ast.walk(tree):
        if not isinstance(node, (ast.stmt, ast.ExceptHandler)):
            continue
        body = getattr(node, "body", None) or getattr(node, "cases", None)
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        if not body:
            yield first, node.end_lineno or first
            continue
        inner = body[0].pattern if isinstance(body[0], ast.match_case) else body[0]
        begin = min([inner.lineno, *(decorator.lineno for decorator in getattr(inner, "decorator_list", ()))])
        yield first, max(first, min(begin - 1, _head_end(node, first)))


def _head_end(node: ast.AST, first: int) -> int:
    """The last line of what is written in a compound statement's head, and the line that closes it."""
    ends = [first]
    for name, value in ast.iter_fields(node):
        if name in ("body", "orelse", "finalbody", "handlers", "cases"):
            continue
        for part in value if isinstance(value, list) else [value]:
            if isinstance(part, ast.AST):
                ends += [end for inner in ast.walk(part) if (end := getattr(inner, "end_lineno", None))]
    return max(ends) + 1 if max(ends) > first else first
