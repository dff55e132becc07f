"""Where a program checks that torch has something before it uses it: what stands under such a check is no need.

A guard is one of: a ``try`` that catches what a missing name raises and goes on; an ``if`` (or ``and``, ``… if … else``) over a
version of torch, ``hasattr``, ``TYPE_CHECKING`` or a flag that was made by one of these; a decorator with such a test; a
``return`` under such an ``if``. Both branches of an ``if`` are guarded: the other is for torches that no longer have a name.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

IMPORT, NAME, KEYWORD, MEMBER = 1, 2, 4, 8
ALL = IMPORT | NAME | KEYWORD | MEMBER

_BITS = {"import": IMPORT, "name": NAME, "store": NAME, "member": MEMBER, "set": MEMBER, "keyword": KEYWORD}
_CATCHES = {
    "ImportError": IMPORT | NAME,
    "ModuleNotFoundError": IMPORT,
    "AttributeError": IMPORT | NAME | MEMBER,
    "TypeError": KEYWORD,
    "Exception": IMPORT,
    "BaseException": IMPORT,
}
_TORCH_VERSION = re.compile(
    r"torch.*(version|(^|_)(ge|gt|le|lt|gte|lte)(_|$)|greater|less|at_least|since|higher|newer|older|nightly|\d)"
    r"|torch_(?!cuda_|distributed_)\w+_available"  # a part of torch; "is_torch_available" asks for torch itself
    r"|^_?(has|have|supports?|requires?)_.*torch",
    re.IGNORECASE,
)
_FLAG = re.compile(r"^_?(IS|HAS|HAVE|SUPPORTS?|CAN|USE)_[A-Z0-9_]+$|^_?[A-Z0-9_]+_(AVAILABLE|SUPPORTED)$")


@dataclass(frozen=True)
class Guard:
    """Which kinds of use are guarded here, and by what."""

    kinds: int = 0
    reason: str = ""

    def narrowed(self, kinds: int, reason: str) -> Guard:
        """This guard and another one."""
        return self if not kinds & ~self.kinds else Guard(self.kinds | kinds, self.reason or reason)

    def for_kind(self, kind: str) -> str:
        """Why a use of this kind is guarded, or nothing."""
        return self.reason if self.kinds & _BITS[kind] else ""


NO_GUARD = Guard()


class Guards:
    """The guards of one file."""

    def __init__(self, tree: ast.Module) -> None:
        self.torch_names = {"torch"}
        self.flags: set[str] = set()
        self._tests: dict[int, str] = {}
        self._find_torch_names(tree.body)
        self._find_flags(tree.body, is_guarded=False)

    def of_block(self, body: Iterable[ast.stmt], guard: Guard, *, is_module: bool) -> Iterator[tuple[ast.stmt, Guard]]:
        """Each statement of a block with the guard it stands under: after ``if not hasattr(…): return`` one begins."""
        for node in body:
            yield node, guard
            if isinstance(node, ast.Assert) and not is_module:
                guard = self.of_test(node.test, guard)
            elif isinstance(node, ast.If) and not node.orelse:
                last = node.body[-1]
                leaves = isinstance(last, (ast.Return, ast.Continue, ast.Break)) or (
                    isinstance(last, ast.Raise) and not is_module
                )
                if leaves or _skips(last):
                    guard = self.of_test(node.test, guard)

    def blocks_in(self, node: ast.stmt, guard: Guard) -> Iterator[tuple[list[ast.stmt], Guard]]:
        """The blocks inside a statement that belong to the same scope, each with its guard."""
        if isinstance(node, ast.If):
            inner = self.of_test(node.test, guard)
            yield node.body, inner
            yield node.orelse, inner
        elif isinstance(node, ast.Try) or type(node).__name__ == "TryStar":
            kinds, reason = _caught(node)  # type: ignore[arg-type]
            inner = guard.narrowed(kinds, reason)
            yield node.body, inner  # type: ignore[attr-defined]
            for handler in node.handlers:  # type: ignore[attr-defined]
                yield handler.body, guard.narrowed(ALL, reason) if kinds else guard
            yield node.orelse, inner  # type: ignore[attr-defined]
            yield node.finalbody, guard  # type: ignore[attr-defined]
        elif isinstance(node, (ast.With, ast.AsyncWith)):
            yield node.body, self._of_with(node, guard)
        elif isinstance(node, ast.While):
            yield node.body, self.of_test(node.test, guard)
            yield node.orelse, guard
        elif isinstance(node, (ast.For, ast.AsyncFor)):
            yield node.body, guard
            yield node.orelse, guard
        elif isinstance(node, ast.Match):
            for case in node.cases:
                yield case.body, guard

    def of_test(self, test: ast.expr, guard: Guard) -> Guard:
        """The guard of what stands under a condition."""
        reason = self.reason_of(test)
        if not reason and not guard.kinds & MEMBER and any(map(_asks_object, ast.walk(test))):
            return guard.narrowed(MEMBER, "hasattr()")
        return guard.narrowed(ALL, reason) if reason else guard

    after_operand = of_test  # of what follows it in an "and" or "or"

    def of_decorators(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, guard: Guard) -> Guard:
        """The guard of what is decorated by a condition, such as ``skipIf(torch.__version__ …)``."""
        for decorator in node.decorator_list:
            guard = self.of_test(decorator, guard)
        return guard

    def reason_of(self, test: ast.expr) -> str:
        """What a condition asks about torch, or nothing."""
        answer = self._tests.get(id(test))
        if answer is None:
            answer = self._tests[id(test)] = next((reason for node in ast.walk(test) if (reason := self._asks(node))), "")
        return answer

    def _asks(self, node: ast.AST) -> str:
        if isinstance(node, ast.Name):
            if node.id == "TYPE_CHECKING":
                return "TYPE_CHECKING"
            is_flag = node.id in self.flags or (node.id not in self.torch_names and _is_flag(node.id))
            return f"if {node.id}" if is_flag else ""
        if isinstance(node, ast.Attribute):
            if node.attr == "TYPE_CHECKING":
                return "TYPE_CHECKING"
            root = _root(node)
            if node.attr in ("__version__", "TorchVersion") or (node.attr == "version" and root in self.torch_names):
                return "a version check" if root in self.torch_names else ""
            is_flag = node.attr in self.flags or _is_flag(node.attr)
            return f"if {node.attr}" if root not in self.torch_names and is_flag else ""
        if isinstance(node, ast.Call):
            return self._call_asks(node)
        if (
            isinstance(node, ast.Compare)
            and isinstance(node.left, ast.Constant)
            and isinstance(node.ops[0], (ast.In, ast.NotIn))
        ):
            is_name = isinstance(node.left.value, str)
            return "a look at what is there" if is_name and self._is_look(node.comparators[0]) else ""
        return ""

    def _call_asks(self, node: ast.Call) -> str:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in ("hasattr", "getattr") and node.args:
            asks = name == "hasattr" or len(node.args) == 3
            return f"{name}()" if asks and _root(node.args[0]) in self.torch_names else ""
        if name in ("fields", "signature") and node.args:
            return "a look at what is there" if _root(node.args[0]) in self.torch_names else ""
        if name == "find_spec" and node.args and isinstance(node.args[0], ast.Constant):
            return "find_spec()" if str(node.args[0].value).startswith("torch.") else ""
        return ""

    def _is_look(self, node: ast.expr) -> bool:
        """``dir(torch.x)``, ``signature(torch.f).parameters``, ``torch.x.__dict__``, ``sys.modules``."""
        text = ast.unparse(node)
        if text == "sys.modules":
            return True
        looks = text.startswith(("dir(", "vars(")) or "signature(" in text or text.endswith("__dict__")
        return looks and any(isinstance(inner, ast.Name) and inner.id in self.torch_names for inner in ast.walk(node))

    def _of_with(self, node: ast.With | ast.AsyncWith, guard: Guard) -> Guard:
        for item in node.items:
            call = item.context_expr
            if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in (
                "suppress",
                "raises",
                "assertRaises",
            ):
                kinds = sum({_CATCHES.get(ast.unparse(argument), 0) for argument in call.args})
                guard = guard.narrowed(kinds, ast.unparse(call)[:60]) if kinds else guard
        return guard

    # what the file's names are

    def _find_torch_names(self, body: Iterable[ast.stmt]) -> None:
        for node in body:
            if isinstance(node, ast.Import):
                self.torch_names |= {alias.asname for alias in node.names if alias.asname and alias.name.startswith("torch")}
            elif isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "torch":
                self.torch_names |= {alias.asname or alias.name for alias in node.names}
            for inner in _blocks(node):
                self._find_torch_names(inner)

    def _find_flags(self, body: Iterable[ast.stmt], *, is_guarded: bool) -> None:
        """Names that are made by such questions: ``HAS_X = hasattr(…)``, ``except ImportError: HAS_X = False``."""
        for node in body:
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                is_constant = isinstance(node.value, ast.Constant) and isinstance(node.value.value, (bool, type(None)))
                asks = isinstance(node.value, (ast.Call, ast.Compare, ast.BoolOp, ast.UnaryOp)) and self.reason_of(node.value)
                if (is_guarded and is_constant) or asks:
                    self.flags |= {target.id for target in targets if isinstance(target, ast.Name)}
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._find_flags(node.body, is_guarded=False)
                if self._is_question(node):
                    self.flags.add(node.name)
            elif isinstance(node, (ast.ClassDef, ast.With, ast.For, ast.While)):
                self._find_flags(node.body, is_guarded=False)
            elif isinstance(node, ast.Try):
                guarded = is_guarded or bool(_caught(node)[0])
                for part in (node.body, node.orelse, *(handler.body for handler in node.handlers)):
                    self._find_flags(part, is_guarded=guarded)
            elif isinstance(node, ast.If):
                for part in (node.body, node.orelse):
                    self._find_flags(part, is_guarded=is_guarded or bool(self.reason_of(node.test)))

    def _is_question(self, function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
        """Whether a function only answers whether something is there."""
        returns = [node.value for node in ast.walk(function) if isinstance(node, ast.Return) and node.value is not None]
        if not returns or not all(
            (isinstance(v, ast.Constant) and isinstance(v.value, bool)) or self.reason_of(v) for v in returns
        ):
            return False
        tries = [node for node in ast.walk(function) if isinstance(node, ast.Try)]
        return any(_caught(node)[0] & IMPORT for node in tries) or any(self.reason_of(value) for value in returns)


def _blocks(node: ast.stmt) -> Iterator[list[ast.stmt]]:
    """The statements inside a statement."""
    for name in ("body", "orelse", "finalbody"):
        yield getattr(node, name, None) or []
    for handler in getattr(node, "handlers", ()):
        yield handler.body


def _is_flag(name: str) -> bool:
    return bool(_FLAG.search(name)) or ("torch" in name.lower() and bool(_TORCH_VERSION.search(name)))


def _caught(node: ast.Try) -> tuple[int, str]:
    """What kinds of use a ``try`` guards: those whose error it catches, unless all that it then does is raise another."""
    kinds, names = 0, []
    for handler in node.handlers:
        if isinstance(handler.body[-1], ast.Raise):
            continue
        caught = [handler.type] if not isinstance(handler.type, ast.Tuple) else list(handler.type.elts)
        for part in caught:
            name = "BaseException" if part is None else ast.unparse(part).rpartition(".")[2]
            if name in _CATCHES:
                kinds |= _CATCHES[name] | (NAME if name.endswith("Exception") and len(node.body) <= 3 else 0)
                names.append("" if part is None else f" {name}")
    return kinds, f"except{names[0]}" if names else ""


def _skips(node: ast.stmt) -> bool:
    """``pytest.skip(…)``, ``self.skipTest(…)``, ``sys.exit(…)``: what follows does not run."""
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    return ast.unparse(node.value.func).rpartition(".")[2] in ("skip", "skipTest", "exit", "_exit")


def _asks_object(node: ast.AST) -> bool:
    """``hasattr(x, …)`` of anything: it guards the members of objects."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"


def _root(node: ast.expr) -> str:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""
