"""The portable form of a program's lines: what to write so that a line runs on the device that is there."""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torchspan.report._rules import (
    BACKEND,
    CALLS,
    HERE,
    HERE_DEVICE,
    IS_HERE,
    KIND,
    MODULE,
    ONLY_CUDA,
    SAME,
    STAYS,
    SUBJECT_NOTES,
    TAKES_KIND,
    Rule,
)
from torchspan.report._source import Edit, Source

_CUDA = re.compile(r"cuda(?::(\d+))?")
_TAKES_TEXT = frozenset(
    ("print", "debug", "info", "warning", "error", "startswith", "endswith", "split", "replace", "join", "getattr", "hasattr")
)
"""Functions to which text is just text."""
_ELSEWHERE = "The line names no device itself: what it is given comes from elsewhere ({names}); port the line that sets it"


@dataclass(frozen=True)
class Port:
    """What a person can write in place of a statement. `portable` is None where there is no such line, or none is needed."""

    portable: str | None
    notes: tuple[str, ...]


@dataclass
class _Found:
    """What was found in one file."""

    edits: list[Edit] = field(default_factory=list)
    notes: dict[int, list[str]] = field(default_factory=dict)
    lines: set[int] = field(default_factory=set)


class Porter:
    """Ports the statements of one file, one at a time.

    >>> Porter(Source("", 'import torch\\nx = torch.zeros(3, device="cuda")')).port((2, 2)).portable
    'x = torch.zeros(3, device=device)'
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self._found = _Found()
        self._parents: dict[ast.AST, ast.AST] = {}
        self._globals_bound: dict[str, int] = {}
        self._functions: list[ast.FunctionDef | ast.AsyncFunctionDef] = []
        if source.tree is not None:
            self._functions = [
                node for node in ast.walk(source.tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            ]
            self._parents = {child: node for node in ast.walk(source.tree) for child in ast.iter_child_nodes(node)}
            self._globals_bound = _bound_at_top(source.tree)
            self._visit(source.tree)

    def port(self, span: tuple[int, int], subjects: Iterable[str] = ()) -> Port:
        """The statement of these lines, made portable; `subjects` is what torchspan saw it ask for."""
        if self.source.tree is None or span[1] > len(self.source.lines):
            return Port(None, ())
        edits = list(self._found.edits)
        subjects = list(subjects)
        if any(subject.startswith("torch.load, storage") for subject in subjects):
            edits += self._map_location(span)
        before, after = self.source.shown(span), self.source.edited(span, edits)
        notes = [note for line in range(span[0], span[1] + 1) for note in self._found.notes.get(line, ())]
        if not notes:
            notes = [note for subject in subjects for start, note in SUBJECT_NOTES if subject.startswith(start)][:1]
        if after == before and not notes and subjects:
            notes = [self._where_from(span)]
        return Port(after if after != before and is_python(after) else None, tuple(dict.fromkeys(notes)))

    def named(self) -> list[tuple[int, int]]:
        """The statements that name CUDA, whether or not they were reached."""
        return sorted({self.source.span(line) for line in self._found.lines})

    def header(self) -> str | None:
        """What the portable lines of this file need at its top, if anything."""
        lines = [] if self.source.names.get("torch") == "torch" else ["import torch"]
        if not self._found.edits:
            return None
        if any(self._needs_device(edit) for edit in self._found.edits):
            lines.append(f"device = {HERE}")
        return "\n".join(lines) or None

    # which names are bound

    def _needs_device(self, edit: Edit) -> bool:
        """Whether an edit names `device` where the program has none of that name."""
        if not re.search(r"\bdevice\b(?!\s*=|\()", edit.text.replace("torch.device", "").replace('"device"', "")):
            return False
        line = self.source.data.count(b"\n", 0, edit.begin) + 1
        around = [node for node in self._functions if node.body[0].lineno <= line <= (node.end_lineno or node.lineno)]
        if any(_binds(node, "device") for node in around):
            return False
        bound = self._globals_bound.get("device")
        return bound is None or (not around and bound > line)

    def _where_from(self, span: tuple[int, int]) -> str:
        words = re.findall(r"[A-Za-z_][\w.]*\b(?!\s*=(?!=))", self.source.shown(span))
        names = [word for word in dict.fromkeys(words) if re.search(r"dev|gpu|cuda|rank|accel", word.lower())]
        return _ELSEWHERE.format(names=", ".join(names[:3])) if names else _ELSEWHERE.replace(" ({names})", "")

    # walking

    def _visit(self, tree: ast.AST) -> None:
        waiting = [tree]
        while waiting:
            node = waiting.pop()
            if not self._port_node(node):
                waiting += reversed(list(ast.iter_child_nodes(node)))

    def _port_node(self, node: ast.AST) -> bool:
        """Port a node as a whole; False where its parts are to be looked at."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._port_import(node)
            return True
        if isinstance(node, ast.Compare):
            return self._port_comparison(node)
        if isinstance(node, ast.IfExp):
            return self._port_choice(node)
        if isinstance(node, ast.Call):
            return self._port_call(node)
        if isinstance(node, ast.Attribute):
            return self._port_attribute(node)
        if isinstance(node, ast.JoinedStr):
            return self._port_f_string(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self._port_text(node, node.value)
        if isinstance(node, ast.List) and any(self._dotted(part).endswith("ProfilerActivity.CUDA") for part in node.elts):
            self._edit(node, "torch.profiler.supported_activities()")
            return True
        return False

    def _port_import(self, node: ast.Import | ast.ImportFrom) -> None:
        module = getattr(node, "module", None) or ""
        if module.startswith("torch.cuda"):
            self._note(node, "Not needed once the lines that use it are portable")
            self._found.lines.add(node.lineno)

    def _port_comparison(self, node: ast.Compare) -> bool:
        parts = [node.left, *node.comparators]
        if any(isinstance(part, ast.Constant) and isinstance(part.value, str) and _CUDA.match(part.value) for part in parts):
            self._note(node, f'Asks for CUDA by name: where any accelerator will do, compare with "cpu" or ask {IS_HERE}')
            self._found.lines.add(node.lineno)
            return True
        return False

    def _port_choice(self, node: ast.IfExp) -> bool:
        """``"cuda" if torch.cuda.is_available() else "cpu"``."""
        if not _is_cuda(node.body):
            return False
        test = node.test
        if self._is_choice(node):
            self._edit(node, self._free(node, HERE))
            return True
        if isinstance(test, ast.Compare) and _is_cuda(test.left) and isinstance(test.ops[0], ast.In):
            self._edit(node, f"torch.device({self.source.code(test.comparators[0])}).type")
            return True
        return False

    def _is_choice(self, node: ast.AST) -> bool:
        """Whether it is the accelerator where there is one, and the CPU elsewhere: no more and no less."""
        if not (isinstance(node, ast.IfExp) and isinstance(node.test, ast.Call) and _is_cuda(node.body)):
            return False
        is_other = isinstance(node.orelse, ast.Constant) and isinstance(node.orelse.value, str)
        return is_other and self._dotted(node.test.func) == "torch.cuda.is_available"

    def _port_call(self, node: ast.Call) -> bool:
        name = self._dotted(node.func)
        if name.startswith("torch.cuda."):
            self._port_cuda_call(node, name)
        elif name == "torch.device":
            return self._port_device(node)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "cuda" and not name:
            self._port_movement(node, node.func)
        elif isinstance(node.func, ast.Attribute) and node.func.attr == "pin_memory" and not node.args and not name:
            return self._port_pinning(node, node.func)
        elif name in ("torch.set_default_tensor_type",):
            self._note(node, "torch.set_default_device(device), and torch.set_default_dtype(…) for the type")
        self._port_keywords(node)
        return False

    def _port_cuda_call(self, node: ast.Call, name: str) -> None:
        rule = self._rule(name)
        self._found.lines.add(node.lineno)
        if name.endswith("is_available") and self._guards_cuda(node):
            self._note(node, "Stays as it is: what it guards is CUDA's alone")
            return
        if isinstance(self._parents.get(node), ast.Assert) and name.endswith("is_available"):
            self._note(node, "Refuses to run without an accelerator: leave the line out where the CPU will do")
        if rule.note:
            self._note(node, rule.note)
        if rule.shape == "rename":
            self._edit(node.func, rule.to)
        elif rule.shape == "typed":
            self._port_typed(node, rule)
        elif rule.shape == "figure":
            self._edit(node.func, f"({rule.to}")
            self._insert(self.source.end(node), f" if {IS_HERE} else 0)")
        elif rule.shape == "guard":
            self._port_guarded(node, rule)

    def _port_typed(self, node: ast.Call, rule: Rule) -> None:
        """``autocast(True, torch.float16)`` takes its arguments by place; its portable form takes the kind of device first."""
        self._edit(node.func, rule.to)
        is_decorated = rule.to.endswith(("_fwd", "_bwd"))
        names = (
            ("fwd",)
            if is_decorated
            else ("enabled", "dtype", "cache_enabled")
            if rule.to == "torch.autocast"
            else ("init_scale",)
        )
        for argument, keyword in zip(node.args, names):
            if not is_decorated:
                self._insert(self.source.begin(argument), f"{keyword}=")
        text = f"device_type={KIND}" if rule.to != "torch.amp.GradScaler" else KIND
        rest = ", " if node.args or node.keywords else ""
        if is_decorated and node.args:
            self._insert(self.source.end(node.args[-1]), f", {text}")
        else:
            self._insert(self._after_paren(node), text + rest)

    def _port_guarded(self, node: ast.Call, rule: Rule) -> None:
        """A statement of its own goes under an ``if``; elsewhere what the module of the device has is called."""
        statement = self._parents.get(node)
        line = self.source.lines[node.lineno - 1]
        is_alone = isinstance(statement, ast.Expr) and line.strip() == self.source.code(node)
        if is_alone and not node.keywords:
            indent = line[: len(line) - len(line.lstrip())]
            self._insert(self.source.begin(node), f"if {IS_HERE}:\n{indent}    ")
            self._edit(node.func, rule.to)
        elif rule.to.endswith("synchronize"):
            self._edit(node.func, f"{MODULE}.synchronize")
        else:
            self._edit(node.func, rule.to)
            self._note(node, f"An error where there is no accelerator: guard it with {IS_HERE}")

    def _port_device(self, node: ast.Call) -> bool:
        """``torch.device("cuda")``, ``torch.device("cuda", 1)``, ``torch.device("cuda:0" if … else "cpu")``."""
        first = node.args[0] if node.args else None
        is_choice = first is not None and self._is_choice(first)
        if len(node.args) + len(node.keywords) != 1 or first is None:
            return False
        if (isinstance(first, ast.Constant) and _is_cuda(first) and _index(first) == 0) or is_choice:
            own = self._assigns_device(node) or is_choice or isinstance(self._parents.get(node), (ast.Assign, ast.AnnAssign))
            self._edit(node, self._free(node, HERE_DEVICE) if own else "torch.device(device)")
            return True
        return False

    def _port_movement(self, node: ast.Call, func: ast.Attribute) -> None:
        """``x.cuda()``, ``x.cuda(0)``, ``x.cuda(rank)``, ``x.cuda(non_blocking=True)``."""
        self._found.lines.add(func.end_lineno or node.lineno)
        self._found.edits.append(Edit(self.source.end(func) - len("cuda"), self.source.end(func), "to"))
        given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "device")]
        if not given:
            rest = ", " if node.keywords else ""
            self._insert(self._after_paren(node), f"device{rest}")
            return
        (argument,) = given[:1]
        if isinstance(argument, ast.Constant) and argument.value in (0, None):
            self._edit(argument, "device")
        elif not (isinstance(argument, ast.Constant) and isinstance(argument.value, str)) and "dev" not in self.source.code(
            argument
        ):
            self._insert(self.source.begin(argument), f"torch.device({KIND}, ")
            self._insert(self.source.end(argument), ")")

    def _port_pinning(self, node: ast.Call, func: ast.Attribute) -> bool:
        self._found.lines.add(func.end_lineno or node.lineno)
        self._note(node, "Pinned memory needs an accelerator: without one, pin_memory() is an error")
        if isinstance(func.value, (ast.Name, ast.Attribute)):
            held = self.source.code(func.value)
            self._edit(node, f"({held}.pin_memory() if {IS_HERE} else {held})")
            return True
        return False

    def _port_keywords(self, node: ast.Call) -> None:
        for keyword in node.keywords:
            value = keyword.value
            if keyword.arg == "pin_memory" and isinstance(value, ast.Constant) and value.value is True:
                self._edit(value, IS_HERE)
            elif keyword.arg == "device_ids" and isinstance(value, ast.List):
                self._insert(self.source.end(value), f" if {IS_HERE} else None")
                self._found.lines.add(value.lineno)

    def _port_attribute(self, node: ast.Attribute) -> bool:
        """What is named and not called: a function handed on, a class, a setting, ``x.is_cuda``."""
        if node.attr == "is_cuda":
            text = f'{self.source.code(node.value)}.device.type != "cpu"'
            self._edit(node, text if isinstance(self._parents.get(node), ast.BoolOp) else self._free(node, text))
            return True
        name = self._dotted(node)
        if name.startswith(("torch.backends.cuda.", "torch.backends.cudnn.")):
            self._note(node, STAYS)
            return True
        parent = self._parents.get(node)
        if not name.startswith("torch.cuda.") or isinstance(parent, ast.Attribute) or self._is_called(node):
            return False
        rule = self._rule(name)
        self._found.lines.add(node.lineno)
        if isinstance(node.ctx, ast.Store):
            self._note(node, "Changes torch.cuda itself: nothing takes its place")
        elif rule.shape == "rename":
            self._edit(node, rule.to)
        elif rule.shape != "none":
            self._note(node, "Handed on, not called here: port the place that calls it")
        if rule.note and not isinstance(node.ctx, ast.Store):
            self._note(node, rule.note)
        return True

    def _port_f_string(self, node: ast.JoinedStr) -> bool:
        """``f"cuda:{rank}"``."""
        first = node.values[0] if node.values else None
        if not (isinstance(first, ast.Constant) and str(first.value).startswith("cuda:")):
            return False
        kind = f"({HERE_DEVICE}).type".replace('"', "'") if self._assigns_device(node) else KIND
        begin = self.source.data.index(b"cuda:", self.source.begin(node))
        if "'" in kind and "'" in self.source.code(node)[:3]:
            kind = kind.replace("'", '"')
        self._found.edits.append(Edit(begin, begin + len("cuda"), "{" + kind + "}"))
        self._found.lines.add(node.lineno)
        return True

    def _port_text(self, node: ast.Constant, text: str) -> None:
        """A device or a backend that is named by text, by what it is text for."""
        parent = self._parents.get(node)
        is_value = isinstance(parent, (ast.Assign, ast.AnnAssign)) and parent.value is node
        if text == "nccl" and self._is_backend(node, parent):
            self._edit(node, BACKEND)
            return
        match = _CUDA.fullmatch(text)
        if not match or isinstance(parent, (ast.Expr, ast.JoinedStr, ast.Subscript, ast.List, ast.Tuple, ast.Set)):
            return
        if isinstance(parent, ast.Call) and node in parent.args and self.source.code(parent.func).split(".")[-1] in _TAKES_TEXT:
            return
        index = int(match[1] or 0)
        if is_value:
            self._edit(node, HERE if not index else f'f"{{{KIND}}}:{index}"')
        elif self._takes_kind(node, parent):
            self._edit(node, KIND)
        elif index:
            self._edit(node, f'f"{{{KIND}}}:{index}"')
            self._note(node, f"Names device {index}: there must be as many")
        else:
            self._edit(node, f"({HERE})" if self._assigns_device(node) else "device")

    # small questions

    def _dotted(self, node: ast.AST) -> str:
        name = self.source.dotted(node) or ""
        return SAME.get(name, name)

    def _rule(self, name: str) -> Rule:
        short = name.removeprefix("torch.cuda.")
        return CALLS.get(short) or CALLS.get(short.partition(".")[0]) or Rule("none", note=ONLY_CUDA)

    def _guards_cuda(self, node: ast.AST) -> bool:
        """Whether what runs only where `node` is true calls what CUDA alone has."""
        guarded: ast.AST | None = None
        while node in self._parents and not isinstance(node, ast.stmt):
            node = self._parents[node]
            guarded = node if isinstance(node, (ast.If, ast.IfExp, ast.BoolOp)) else guarded
        calls = (inner for inner in ast.walk(guarded) if isinstance(inner, ast.Call)) if guarded is not None else ()
        names = (self._dotted(call.func) for call in calls)
        return any(name.startswith("torch.cuda.") and self._rule(name).shape == "none" for name in names)

    def _takes_kind(self, node: ast.expr, parent: ast.AST | None) -> bool:
        """Whether text stands where a kind of device is expected: ``device_type=``, or the first of torch.device's two."""
        call = self._parents.get(parent) if isinstance(parent, ast.keyword) and parent else parent
        if not isinstance(call, ast.Call):
            return False
        if isinstance(parent, ast.keyword) and parent.arg == "device_type":
            return True
        return self._dotted(call.func) in TAKES_KIND or (self._dotted(call.func) == "torch.device" and len(call.args) > 1)

    def _is_backend(self, node: ast.expr, parent: ast.AST | None) -> bool:
        if isinstance(parent, ast.keyword):
            return parent.arg == "backend"
        if isinstance(parent, ast.Call):
            return parent.args[:1] == [node] and self._dotted(parent.func).endswith("init_process_group")
        return isinstance(parent, ast.Assign) and parent.value is node

    def _is_called(self, node: ast.expr) -> bool:
        parent = self._parents.get(node)
        return isinstance(parent, ast.Call) and parent.func is node

    def _assigns_device(self, node: ast.AST) -> bool:
        """Whether the statement around `node` is what gives `device` its value."""
        while node in self._parents and not isinstance(node, ast.stmt):
            node = self._parents[node]
        targets: list[Any] = [*getattr(node, "targets", ()), getattr(node, "target", None)]
        names = [inner for target in targets if isinstance(target, ast.AST) for inner in ast.walk(target)]
        return any(isinstance(name, ast.Name) and name.id == "device" for name in names)

    def _free(self, node: ast.AST, text: str) -> str:
        """`text` in the place of `node`, in brackets where they are needed."""
        parent = self._parents.get(node)
        free = (ast.Assign, ast.AnnAssign, ast.Return, ast.keyword, ast.If, ast.While, ast.Assert, ast.Expr)
        is_argument = isinstance(parent, ast.Call) and node in parent.args
        is_test = isinstance(parent, ast.IfExp) and parent.test is node
        return text if isinstance(parent, free) or is_argument or is_test or text == HERE else f"({text})"

    def _after_paren(self, node: ast.Call) -> int:
        return self.source.data.index(b"(", self.source.end(node.func)) + 1

    # what is kept

    def _edit(self, node: ast.expr, text: str) -> None:
        self._found.edits.append(Edit(self.source.begin(node), self.source.end(node), text))
        self._found.lines.add(node.lineno)

    def _insert(self, place: int, text: str) -> None:
        self._found.edits.append(Edit(place, place, text))

    def _note(self, node: ast.expr | ast.stmt, text: str) -> None:
        self._found.notes.setdefault(node.lineno, []).append(text)

    def _map_location(self, span: tuple[int, int]) -> Iterator[Edit]:
        for node in ast.walk(self.source.tree) if self.source.tree else ():
            if not isinstance(node, ast.Call) or self._dotted(node.func) != "torch.load" or not node.args:
                continue
            is_told = any(keyword.arg == "map_location" for keyword in node.keywords) or len(node.args) > 1
            if span[0] <= node.lineno <= span[1] and not is_told:
                place = self.source.end(node.args[0])
                yield Edit(place, place, ", map_location=device")


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


def _is_cuda(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and _CUDA.fullmatch(node.value) is not None


def _index(node: ast.Constant) -> int:
    match = _CUDA.fullmatch(str(node.value))
    return int(match[1] or 0) if match else 0


def _binds(function: ast.FunctionDef | ast.AsyncFunctionDef, name: str) -> bool:
    """Whether a function has a parameter or a variable of that name."""
    arguments = function.args
    given = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    stored = (node.id for node in ast.walk(function) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    return name in {argument.arg for argument in given} or name in set(stored)


def _bound_at_top(tree: ast.Module) -> dict[str, int]:
    """Each name that the module gives a value, and the first line that does; functions and classes are not looked into."""
    bound: dict[str, int] = {}
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound[node.id] = min(node.lineno, bound.get(node.id, node.lineno))
        inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)
        waiting += [child for child in ast.iter_child_nodes(node) if not isinstance(child, inner)]
    return bound
