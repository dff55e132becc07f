"""What names stand for in a file: dotted paths of torch, followed through imports, aliases, variables, annotations, calls."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass

from torchspan.scan._guards import NO_GUARD, Guard, Guards

ROOTS = ("torch", "functorch")
_DEPTH = 20  # of expressions in expressions
_SPELLING = (ast.Name, ast.Attribute, ast.Call, ast.Subscript, ast.BinOp)
_OPERATORS = {
    ast.Add: "__add__",
    ast.Sub: "__sub__",
    ast.Mult: "__mul__",
    ast.Div: "__truediv__",
    ast.MatMult: "__matmul__",
    ast.Pow: "__pow__",
}


@dataclass(frozen=True)
class _Binding:
    """What a name is bound to: a dotted name of torch, an expression that may be one, or (both None) something else.

    Something else may be an instance of the class that the expression `annotation` spells.
    """

    target: str | None = None
    value: ast.expr | None = None
    guard: str = ""
    annotation: ast.expr | None = None


_ELSEWHERE = _Binding()


class Scope:
    """The names of a module, class, function or comprehension."""

    def __init__(self, parent: Scope | None, is_class: bool) -> None:
        self.parent = parent
        self.is_class = is_class
        self.bases: list[ast.expr] = []
        self.bindings: dict[str, _Binding] = {}
        self.attributes: dict[str, _Binding] = {}  # of a class's instances
        self.outer: set[str] = set()  # declared global or nonlocal

    def bind(self, name: str, binding: _Binding) -> None:
        before = self.bindings.get(name)
        if name in self.outer:
            if self.parent is not None and binding.target is None:
                self.parent.bind(name, _ELSEWHERE)
        elif before is None:
            self.bindings[name] = binding
        elif before.target is None or before.target != binding.target:
            self.bindings[name] = _ELSEWHERE  # which of them holds is not known
        elif before.guard and not binding.guard:
            self.bindings[name] = binding

    def bind_attribute(self, name: str, binding: _Binding) -> None:
        self.attributes[name] = _ELSEWHERE if name in self.attributes else binding

    def find_attribute(self, name: str) -> tuple[_Binding, Scope] | None:
        """What an attribute of the instance is bound to, in the class that this scope is in."""
        scope: Scope | None = self
        while scope is not None and not scope.is_class:
            scope = scope.parent
        return (scope.attributes[name], scope) if scope is not None and name in scope.attributes else None

    def find(self, name: str) -> tuple[_Binding, Scope] | None:
        scope: Scope | None = self
        is_own = True
        while scope is not None:
            if name in scope.bindings and (is_own or not scope.is_class):
                return scope.bindings[name], scope
            scope, is_own = scope.parent, False
        return None


class Paths:
    """The scopes of one file, and the dotted paths that expressions in them spell."""

    def __init__(self, tree: ast.Module, has_walrus: bool) -> None:
        self.scope: Scope = Scope(None, False)
        self.has_walrus = has_walrus
        self.guards = Guards(tree)

    # scopes: what each name in them is bound to

    def scope_of(self, body: Iterable[ast.stmt], arguments: ast.arguments | None, *, is_class: bool) -> None:
        """Enter a new scope and bind its names."""
        self.scope = Scope(self.scope, is_class)
        if arguments is not None:
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
                if argument is not None:
                    is_one = argument not in (arguments.vararg, arguments.kwarg)
                    self.scope.bind(argument.arg, _Binding(annotation=argument.annotation if is_one else None))
        self.bind_block(body, NO_GUARD, is_module=self.scope.parent is None or self.scope.parent.parent is None)

    def bind_block(self, body: Iterable[ast.stmt], guard: Guard, *, is_module: bool) -> None:
        for node, its in self.guards.of_block(body, guard, is_module=is_module):
            self.bind_statement(node, its)
            for inner, inner_guard in self.guards.blocks_in(node, its):
                self.bind_block(inner, inner_guard, is_module=is_module)

    def bind_statement(self, node: ast.stmt, guard: Guard) -> None:
        kind = type(node)
        if kind is ast.Assign:
            for target in node.targets:  # type: ignore[attr-defined]
                self.bind_value(target, node.value, guard)  # type: ignore[attr-defined]
        elif kind is ast.Import or kind is ast.ImportFrom:
            self.bind_import(node, guard)  # type: ignore[arg-type]
        elif kind in (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
            self.scope.bind(node.name, _ELSEWHERE)  # type: ignore[attr-defined]
        elif kind is ast.AnnAssign and isinstance(node.target, ast.Name):  # type: ignore[attr-defined]
            self.scope.bind(node.target.id, _Binding(annotation=node.annotation))  # type: ignore[attr-defined]
        elif kind in (ast.For, ast.AsyncFor, ast.AugAssign, ast.AnnAssign):
            self.bind_target(node.target)  # type: ignore[attr-defined]
        elif kind in (ast.With, ast.AsyncWith):
            for item in node.items:  # type: ignore[attr-defined]
                if item.optional_vars is not None:
                    self.bind_value(item.optional_vars, item.context_expr, NO_GUARD)
        elif kind in (ast.Global, ast.Nonlocal):
            self.scope.outer.update(node.names)  # type: ignore[attr-defined]
        elif isinstance(node, ast.Try) or kind.__name__ == "TryStar":
            for handler in node.handlers:  # type: ignore[attr-defined]
                if handler.name:
                    self.scope.bind(handler.name, _ELSEWHERE)
        elif kind is ast.Match:
            for inner in ast.walk(node):
                name = getattr(inner, "name", None) or getattr(inner, "rest", None)
                if isinstance(inner, (ast.MatchAs, ast.MatchStar, ast.MatchMapping)) and name:
                    self.scope.bind(name, _ELSEWHERE)
        if self.has_walrus and kind not in (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.NamedExpr):
                    self.bind_target(inner.target)

    def bind_value(self, target: ast.expr, value: ast.expr, guard: Guard) -> None:
        if isinstance(target, ast.Name) and isinstance(value, _SPELLING):
            self.scope.bind(target.id, _Binding(value=value, guard=guard.reason))
        else:
            self.bind_target(target)

    def bind_attributes(self, node: ast.ClassDef) -> None:
        """What a class's methods set on ``self``, and what its body annotates."""
        for part in node.body:
            if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                self.scope.bind_attribute(part.target.id, _Binding(annotation=part.annotation))
            for inner in ast.walk(part) if isinstance(part, ast.FunctionDef) else ():
                if isinstance(inner, ast.Assign) and isinstance(inner.value, _SPELLING):
                    targets, binding = inner.targets, _Binding(value=inner.value)
                elif isinstance(inner, ast.AnnAssign):
                    targets, binding = [inner.target], _Binding(annotation=inner.annotation)
                else:
                    continue
                for target in targets:
                    if isinstance(target, ast.Attribute) and is_self(target.value):
                        self.scope.bind_attribute(target.attr, binding)

    def bind_target(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.scope.bind(target.id, _ELSEWHERE)
        elif isinstance(target, (ast.Tuple, ast.List)):
            for part in target.elts:
                self.bind_target(part)
        elif isinstance(target, ast.Starred):
            self.bind_target(target.value)

    def bind_import(self, node: ast.Import | ast.ImportFrom, guard: Guard) -> None:
        for alias in node.names:
            if isinstance(node, ast.Import):
                target = alias.name if alias.asname else alias.name.partition(".")[0]
                name = alias.asname or target
            else:
                target = f"{node.module}.{alias.name}" if node.module and not node.level else ""
                name = alias.asname or alias.name
            # "import torch.x" inside a try binds torch, which is there anyway
            reason = "" if target in ROOTS else guard.reason
            self.scope.bind(name, _Binding(target, guard=reason) if is_torch(target) else _ELSEWHERE)

    def path(self, node: ast.expr, scope: Scope | None = None, depth: int = 0) -> tuple[str, str] | None:
        """The dotted path of torch that an expression spells, "()" after what is called, and the guard it was bound under."""
        scope = scope or self.scope
        if depth > _DEPTH:
            return None
        if isinstance(node, ast.Name):
            return self.path_of_binding(scope.find(node.id), node.id, depth)
        if isinstance(node, ast.Attribute) and is_self(node.value):
            return self.path_of_binding(scope.find_attribute(node.attr), node.attr, depth)
        inner, suffix = _step(node)
        base = self.path(inner, scope, depth + 1) if inner is not None else None
        if base is None or (suffix.startswith(".__") and "()" not in base[0]):
            return None
        return base[0] + suffix, base[1]

    def path_of_binding(self, entry: tuple[_Binding, Scope] | None, name: str, depth: int) -> tuple[str, str] | None:
        if entry is None:
            return None
        binding, scope = entry
        if binding.target is not None:
            return binding.target, binding.guard
        if binding.annotation is not None:
            annotation = _plain_annotation(binding.annotation)
            # a function's arguments are annotated in the scope around it
            spelled = self.path(annotation, scope, depth + 1) if annotation is not None else None
            if spelled is None and scope.parent is not None and annotation is not None:
                spelled = self.path(annotation, scope.parent, depth + 1)
            return None if spelled is None or "()" in spelled[0] else (spelled[0] + "()", spelled[1])
        if binding.value is None:
            return None
        around = scope.parent if _root(binding.value) == name else scope  # x = x.y in an inner scope
        spelled = self.path(binding.value, around, depth + 1) if around is not None else None
        return None if spelled is None else (spelled[0], binding.guard or spelled[1])


def is_torch(dotted: str) -> bool:
    """Whether a dotted name is one of torch's."""
    return dotted in ROOTS or dotted.partition(".")[0] in ROOTS


def _step(node: ast.expr) -> tuple[ast.expr | None, str]:
    """An expression as the one inside it and what is done with that: ``x.y``, ``x(…)``, ``x[…]``, ``x + …``."""
    if isinstance(node, ast.Attribute):
        return node.value, f".{node.attr}"
    if isinstance(node, ast.Call):
        return node.func, "()"
    if isinstance(node, ast.Subscript):
        return node.value, ".__getitem__()"
    if isinstance(node, ast.BinOp):
        return node.left, f".{_OPERATORS.get(type(node.op), '__add__')}()"
    return None, ""


def _plain_annotation(node: ast.expr | None) -> ast.expr | None:
    """The class in an annotation: of ``"C"``, ``Optional[C]`` and ``C | None`` as well."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return _plain_annotation(ast.parse(node.value, mode="eval").body)
        except SyntaxError:
            return None
    if isinstance(node, ast.Subscript):
        return _plain_annotation(node.slice) if ast.unparse(node.value).rpartition(".")[2] == "Optional" else None
    if isinstance(node, ast.BinOp):
        sides = [side for side in (node.left, node.right) if not (isinstance(side, ast.Constant) and side.value is None)]
        return _plain_annotation(sides[0]) if len(sides) == 1 else None
    return node if isinstance(node, (ast.Name, ast.Attribute)) else None


def _root(node: ast.expr) -> str:
    """The name that an expression begins with."""
    inner: ast.expr | None = node
    while inner is not None and not isinstance(inner, ast.Name):
        inner = _step(inner)[0]
    return inner.id if inner is not None else ""


def is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
