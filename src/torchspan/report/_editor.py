"""What is changed in a file and what is said of it, collected place by place."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field

from torchspan.report._places import Places
from torchspan.report._rules import HERE, IS_HERE, KIND, WORDS
from torchspan.report._source import Edit


@dataclass(frozen=True)
class Note:
    """What is to be known of a place; `is_work` where it has to be done by hand."""

    text: str
    is_work: bool = False


@dataclass
class Changes:
    """The changes to one file. `words` are the names that its portable lines need at its top."""

    edits: list[Edit] = field(default_factory=list)
    notes: dict[int, list[Note]] = field(default_factory=dict)
    lines: set[int] = field(default_factory=set)
    words: set[str] = field(default_factory=set)


class Editor:
    """Collects the edits of one file in `changes`."""

    def __init__(self, places: Places) -> None:
        self.changes = Changes()
        self._places = places
        self._source = places.source

    def asked(self, line: int) -> None:
        """A statement in `line` asked for CUDA."""
        self.changes.lines.add(line)

    def add(self, edit: Edit) -> None:
        """Add an edit as it is."""
        self.changes.edits.append(edit)

    def word(self, node: ast.AST) -> str:
        """What the device is called where `node` is; the top of the file has to say so where nothing there does."""
        usable = {word: self._places.bindings.is_usable(word, node) for word in WORDS}
        word = next((word for word, is_usable in usable.items() if is_usable is not False), WORDS[0])
        if usable[word] is None:
            self.changes.words.add(word)
        return word

    def here(self, node: ast.AST, text: str) -> str:
        """`text`, which names ``device``, with what the device is called where `node` is."""
        if "(device)" not in text:
            return text
        if self._places.assigns_device(node):  # it has no value yet
            return HERE if text == KIND else text.replace("(device)", f"({HERE})")
        return text.replace("(device)", f"({self.word(node)})")

    def here_in_text(self, node: ast.AST) -> str:
        """The kind of the device here, as code inside of an f-string."""
        return self.here(node, KIND).replace('"', "'")

    def free(self, node: ast.AST, text: str) -> str:
        """`text` in the place of `node`, in brackets where they are needed."""
        parent = self._places.parent(node)
        free = (ast.Assign, ast.AnnAssign, ast.Return, ast.keyword, ast.If, ast.While, ast.Assert, ast.Expr)
        is_argument = isinstance(parent, ast.Call) and node in parent.args
        is_test = isinstance(parent, ast.IfExp) and parent.test is node
        return text if isinstance(parent, free) or is_argument or is_test or text == HERE else f"({text})"

    def after_paren(self, node: ast.Call) -> int:
        """Where the arguments of a call begin."""
        return self._source.data.index(b"(", self._source.end(node.func)) + 1

    def before_paren(self, node: ast.Call) -> int:
        """The end of the last argument of a call."""
        return max(self._source.end(part) for part in [*node.args, *(keyword.value for keyword in node.keywords)])

    def guard(self, node: ast.Call) -> None:
        """Make the call only where there is an accelerator."""
        self.changes.lines.add(node.lineno)
        line = self._source.lines[node.lineno - 1]
        if isinstance(self._places.parent(node), ast.Expr) and self._places.is_alone(node):
            indent = line[: len(line) - len(line.lstrip())]
            self.open(node, f"if {IS_HERE}:\n{indent}    ")
        else:
            self.open(node, "(")
            self.insert(self._source.end(node), f" if {IS_HERE} else None)")

    def edit(self, node: ast.expr, text: str) -> None:
        """Put `text` in the place of an expression."""
        edit = Edit(self._source.begin(node), self._source.end(node), text)
        if edit not in self.changes.edits:
            self.changes.edits.append(edit)
        self.changes.lines.add(node.lineno)

    def insert(self, place: int, text: str) -> None:
        """Put `text` at a place."""
        self.changes.edits.append(Edit(place, place, text))

    def open(self, node: ast.expr, text: str) -> None:
        """Put `text` before an expression."""
        self.changes.edits.append(Edit(self._source.begin(node), self._source.begin(node), text, opens=True))

    def note(self, node: ast.expr | ast.stmt, text: str, *, is_work: bool = False) -> None:
        """Say what is to be known of a place."""
        self.changes.notes.setdefault(node.lineno, []).append(Note(text, is_work))
        if is_work:
            self.changes.lines.add(node.lineno)

    def numbered(self, argument: ast.expr) -> None:
        """Make a number the device of that number."""
        self.open(argument, f"torch.device({self.here(argument, KIND)}, ")
        self.insert(self._source.end(argument), ")")

    def unless_here(self, value: ast.expr, other: str) -> None:
        """`value` where there is an accelerator, `other` where there is none."""
        if isinstance(value, ast.Constant) and value.value is None:
            return
        if isinstance(value, ast.IfExp) and "is_available" in self._source.code(value.test):
            return
        is_loose = isinstance(value, (ast.IfExp, ast.Lambda, ast.NamedExpr))
        self.changes.lines.add(value.lineno)
        if is_loose:
            self.open(value, "(")
        self.insert(self._source.end(value), f"{')' if is_loose else ''} if {IS_HERE} else {other}")
