"""What a Python file uses of torch, read from its syntax tree: which name, on which line, and whether the program guards it."""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torchspan.scan._guards import ALL, NO_GUARD, Guard, Guards

ROOTS = ("torch", "functorch")

Kind = Literal["module", "name", "keyword", "store", "member"]


@dataclass(frozen=True)
class Use:
    """One use of a dotted name of torch; `keyword` is an argument passed to it; `guard` says why it is no need, or is empty.

    A ``member`` is asked of an instance of a class, which a variable is by its annotation or its making.
    """

    line: int
    name: str
    kind: Kind
    keyword: str = ""
    guard: str = ""


@dataclass(frozen=True)
class FileUses:
    """What one file uses, and the dotted names of torch that it sets itself."""

    uses: tuple[Use, ...]
    sets: frozenset[str]


def read_uses(text: str | bytes) -> FileUses:
    """What the program `text` uses of torch.

    Raises:
        SyntaxError: `text` is no Python.

    >>> [(use.line, use.name) for use in read_uses("from torch.nn import attention as a\\na.varlen.varlen_attn").uses]
    [(1, 'torch.nn.attention'), (2, 'torch.nn.attention.varlen.varlen_attn')]
    """
    tree = ast.parse(text)
    reader = _Reader(tree, has_walrus=b":=" in (text if isinstance(text, bytes) else text.encode()))
    reader.scope_of(tree.body, None, is_class=False)
    reader.visit_block(tree.body, NO_GUARD, is_module=True)
    return FileUses(tuple(dict.fromkeys(reader.uses)), frozenset(reader.sets))


@dataclass(frozen=True)
class _Binding:
    """What a name is bound to: a dotted name of torch, an expression that may be one, or (both None) something else.

    Something else may be an instance of the class that the expression `class_of` spells.
    """

    target: str | None = None
    value: ast.expr | None = None
    guard: str = ""
    class_of: ast.expr | None = None


_ELSEWHERE = _Binding()


class _Scope:
    """The names of a module, class, function or comprehension."""

    def __init__(self, parent: _Scope | None, is_class: bool) -> None:
        self.parent = parent
        self.is_class = is_class
        self.bindings: dict[str, _Binding] = {}
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

    def find(self, name: str) -> tuple[_Binding, _Scope] | None:
        scope: _Scope | None = self
        is_own = True
        while scope is not None:
            if name in scope.bindings and (is_own or not scope.is_class):
                return scope.bindings[name], scope
            scope, is_own = scope.parent, False
        return None


class _Reader:
    """Visits a module's syntax tree, scope by scope."""

    def __init__(self, tree: ast.Module, has_walrus: bool) -> None:
        self.uses: list[Use] = []
        self.sets: set[str] = set()
        self.scope: _Scope = _Scope(None, False)
        self.has_walrus = has_walrus
        self.is_in_function = False
        self.guards = Guards(tree)
        self.lazy_annotations = any(
            isinstance(node, ast.ImportFrom)
            and node.module == "__future__"
            and any(a.name == "annotations" for a in node.names)
            for node in tree.body
        )

    # scopes: what each name in them is bound to

    def scope_of(self, body: Iterable[ast.stmt], arguments: ast.arguments | None, *, is_class: bool) -> None:
        """Enter a new scope and bind its names."""
        self.scope = _Scope(self.scope, is_class)
        if arguments is not None:
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
                if argument is not None:
                    is_one = argument not in (arguments.vararg, arguments.kwarg)
                    self.scope.bind(argument.arg, _Binding(class_of=argument.annotation if is_one else None))
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
                if isinstance(target, ast.Name) and isinstance(node.value, (ast.Name, ast.Attribute)):  # type: ignore[attr-defined]
                    self.scope.bind(target.id, _Binding(value=node.value, guard=guard.reason))  # type: ignore[attr-defined]
                elif isinstance(target, ast.Name) and isinstance(node.value, ast.Call):  # type: ignore[attr-defined]
                    self.scope.bind(target.id, _Binding(class_of=node.value.func))  # type: ignore[attr-defined]
                else:
                    self.bind_target(target)
        elif kind is ast.Import or kind is ast.ImportFrom:
            self.bind_import(node, guard)  # type: ignore[arg-type]
        elif kind in (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
            self.scope.bind(node.name, _ELSEWHERE)  # type: ignore[attr-defined]
        elif kind in (ast.For, ast.AsyncFor, ast.AugAssign, ast.AnnAssign):
            self.bind_target(node.target)  # type: ignore[attr-defined]
        elif kind in (ast.With, ast.AsyncWith):
            for item in node.items:  # type: ignore[attr-defined]
                if item.optional_vars is not None:
                    self.bind_target(item.optional_vars)
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

    def resolve(self, name: str, scope: _Scope | None = None) -> tuple[str, str] | None:
        """The dotted name of torch that a name stands for in `scope` (here), and the guard it was bound under."""
        scope = scope or self.scope
        seen: set[int] = set()
        rest = guard = ""
        while scope is not None:
            found = scope.find(name)
            if found is None:
                return None
            binding, scope = found
            guard = guard or binding.guard
            if binding.target is not None:
                return binding.target + rest, guard
            if binding.value is None or id(binding) in seen:
                return None
            seen.add(id(binding))
            chain = _chain(binding.value)
            if chain is None:
                return None
            root, *parts = chain
            rest = "".join(f".{part}" for part in parts) + rest
            if root == name:  # x = x.y in an inner scope
                scope = scope.parent
            name = root
        return None

    def class_of(self, name: str) -> tuple[str, str] | None:
        """The class of torch that the variable `name` is an instance of, and the guard that the class was bound under."""
        found = self.scope.find(name)
        if found is None or found[0].class_of is None:
            return None
        class_of, scope = found[0].class_of, found[1]
        # a function's arguments are annotated in the scope around it
        return self.spelled(class_of, scope) or (self.spelled(class_of, scope.parent) if scope.parent else None)

    # visiting: every use

    def visit_block(self, body: Iterable[ast.stmt], guard: Guard, *, is_module: bool) -> None:
        for node, its in self.guards.of_block(body, guard, is_module=is_module):
            self.visit_statement(node, its)
            for inner, inner_guard in self.guards.blocks_in(node, its):
                self.visit_block(inner, inner_guard, is_module=is_module)

    def visit_statement(self, node: ast.stmt, guard: Guard) -> None:
        """The expressions of one statement; the blocks inside it are visited by `visit_block`, but for new scopes."""
        kind = type(node)
        if kind is ast.Expr or kind is ast.Return:
            if node.value is not None:  # type: ignore[attr-defined]
                self.visit(node.value, guard)  # type: ignore[attr-defined]
        elif kind is ast.Import:
            for alias in node.names:  # type: ignore[attr-defined]
                if is_torch(alias.name):
                    self.add(node, alias.name, "module", guard)
        elif kind is ast.ImportFrom:
            self.visit_import_from(node, guard)  # type: ignore[arg-type]
        elif kind in (ast.FunctionDef, ast.AsyncFunctionDef):
            self.visit_function(node, guard)  # type: ignore[arg-type]
        elif kind is ast.ClassDef:
            self.visit_class(node, guard)  # type: ignore[arg-type]
        elif kind is ast.AnnAssign:
            self.visit_annotation(node.annotation, guard, is_evaluated=not self.is_in_function)  # type: ignore[attr-defined]
            for part in (node.target, node.value):  # type: ignore[attr-defined]
                if part is not None:
                    self.visit(part, guard)
        else:
            for name, value in ast.iter_fields(node):
                if name not in ("body", "orelse", "finalbody", "cases"):
                    self.visit_field(value, guard)

    def visit_field(self, value: object, guard: Guard) -> None:
        if isinstance(value, ast.expr):
            self.visit(value, guard)
        elif isinstance(value, list):
            for part in value:
                self.visit_field(part, guard)
        elif isinstance(value, ast.withitem):
            self.visit_field([value.context_expr, value.optional_vars], guard)
        elif isinstance(value, ast.ExceptHandler):
            self.visit_field(value.type, guard)

    def visit_import_from(self, node: ast.ImportFrom, guard: Guard) -> None:
        if node.level or not node.module or not is_torch(node.module):
            return
        for alias in node.names:
            if alias.name == "*":
                self.add(node, node.module, "module", guard)
            else:
                self.add(alias, f"{node.module}.{alias.name}", "name", guard, is_import=True)

    def visit_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda, guard: Guard) -> None:
        arguments = node.args
        for default in (*arguments.defaults, *arguments.kw_defaults):
            if default is not None:
                self.visit(default, guard)
        outer, was_in_function = self.scope, self.is_in_function
        if isinstance(node, ast.Lambda):
            self.scope_of((), arguments, is_class=False)
            self.visit(node.body, guard)
        else:
            self.visit_field(node.decorator_list, guard)
            for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg):
                if argument is not None and argument.annotation is not None:
                    self.visit_annotation(argument.annotation, guard)
            if node.returns is not None:
                self.visit_annotation(node.returns, guard)
            inner = self.guards.of_decorators(node, guard)
            self.is_in_function = True
            self.scope_of(node.body, arguments, is_class=False)
            self.visit_block(node.body, inner, is_module=False)
        self.scope, self.is_in_function = outer, was_in_function

    def visit_class(self, node: ast.ClassDef, guard: Guard) -> None:
        self.visit_field([*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)], guard)
        outer, was_in_function = self.scope, self.is_in_function
        inner = self.guards.of_decorators(node, guard)
        self.is_in_function = False
        self.scope_of(node.body, None, is_class=True)
        self.visit_block(node.body, inner, is_module=False)
        self.scope, self.is_in_function = outer, was_in_function

    def visit_annotation(self, node: ast.expr, guard: Guard, *, is_evaluated: bool = True) -> None:
        """An annotation is a need only where Python evaluates it."""
        is_need = is_evaluated and not self.lazy_annotations
        self.visit(node, guard if is_need else guard.narrowed(ALL, "an annotation that is not evaluated"))

    def visit(self, node: ast.expr, guard: Guard) -> None:
        kind = type(node)
        if kind is ast.Name or kind is ast.Constant:
            return
        if kind is ast.Attribute:
            self.visit_attribute(node, guard)  # type: ignore[arg-type]
        elif kind is ast.Call:
            self.visit_call(node, guard)  # type: ignore[arg-type]
        elif kind is ast.BoolOp:
            for value in node.values:  # type: ignore[attr-defined]
                self.visit(value, guard)
                guard = self.guards.after_operand(value, guard)
        elif kind is ast.IfExp:
            self.visit(node.test, guard)  # type: ignore[attr-defined]
            inner = self.guards.of_test(node.test, guard)  # type: ignore[attr-defined]
            self.visit(node.body, inner)  # type: ignore[attr-defined]
            self.visit(node.orelse, inner)  # type: ignore[attr-defined]
        elif kind is ast.Lambda:
            self.visit_function(node, guard)  # type: ignore[arg-type]
        elif kind in (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp):
            self.visit_comprehension(node, guard)
        else:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    self.visit(child, guard)
                elif isinstance(child, ast.keyword):
                    self.visit(child.value, guard)

    def visit_comprehension(self, node: ast.expr, guard: Guard) -> None:
        outer = self.scope
        self.scope = _Scope(outer, False)
        for generator in node.generators:  # type: ignore[attr-defined]
            self.bind_target(generator.target)
        for generator in node.generators:  # type: ignore[attr-defined]
            self.visit_field([generator.iter, generator.ifs], guard)
        self.visit_field([getattr(node, name, None) for name in ("key", "value", "elt")], guard)
        self.scope = outer

    def visit_attribute(self, node: ast.Attribute, guard: Guard) -> None:
        found = self.spelled(node)
        if found is None:
            self.visit_member(node, guard)
            inner: ast.expr = node
            while isinstance(inner, ast.Attribute):
                inner = inner.value
            self.visit(inner, guard)
            return
        dotted, bound_under = found
        its = guard.narrowed(ALL, bound_under) if bound_under else guard
        if isinstance(node.ctx, ast.Store):
            self.add(node, dotted, "store", its)
        elif isinstance(node.ctx, ast.Load):
            self.add(node, dotted, "name", its)

    def spelled(self, node: ast.expr, scope: _Scope | None = None) -> tuple[str, str] | None:
        """The dotted name of torch that an expression spells, and the guard under which its first part was bound."""
        chain = _chain(node)
        if chain is None:
            return None
        found = self.resolve(chain[0], scope)
        if found is None:
            return None
        return ".".join([found[0], *chain[1:]]), found[1]

    def visit_member(self, node: ast.Attribute, guard: Guard) -> None:
        """``x.y`` where x is an instance of a class of torch."""
        chain = _chain(node)
        owner = self.class_of(chain[0]) if chain is not None else None
        if chain is None or owner is None:
            return
        if isinstance(node.ctx, ast.Load) or len(chain) > 2:
            its = guard.narrowed(ALL, owner[1]) if owner[1] else guard
            self.add(node, f"{owner[0]}.{chain[1]}", "member", its)

    def visit_call(self, node: ast.Call, guard: Guard) -> None:
        function = self.spelled(node.func)
        self.visit(node.func, guard)
        if function is not None:
            self.add_keywords(node, *function, guard)
            self.add_options(node, function[0], guard)
        elif isinstance(node.func, ast.Attribute):
            self.visit_other_call(node, guard)
        elif isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr"):
            self.visit_getattr(node, guard)
        else:
            self.visit_other_call(node, guard)
        for argument in node.args:
            self.visit(argument, guard)
        for keyword in node.keywords:
            self.visit(keyword.value, guard)

    def visit_other_call(self, node: ast.Call, guard: Guard) -> None:
        """``partial(torch.f, x=1)``, ``import_module("torch.x")``, and calls of an instance's method."""
        last = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        function = None
        if last == "partial" and first is not None:
            function = self.spelled(first)
        elif last == "import_module" and isinstance(first, ast.Constant):
            if isinstance(first.value, str) and is_torch(first.value):
                self.add(node, first.value, "module", guard)
        elif isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name):
            owner = self.class_of(node.func.value.id)
            function = (f"{owner[0]}.{last}", owner[1]) if owner is not None else None
        if function is not None:
            self.add_keywords(node, *function, guard)

    def visit_getattr(self, node: ast.Call, guard: Guard) -> None:
        """``getattr(torch.x, "y")`` is a need, with a default it is guarded, as is ``hasattr``."""
        if len(node.args) < 2 or not isinstance(node.args[1], ast.Constant) or not isinstance(node.args[1].value, str):
            return
        holder = self.spelled(node.args[0])
        if holder is None:
            return
        asks = node.func.id == "hasattr" or len(node.args) == 3  # type: ignore[attr-defined]
        its = guard.narrowed(ALL, holder[1]) if holder[1] else guard
        if asks:
            its = its.narrowed(ALL, f"{node.func.id}()")  # type: ignore[attr-defined]
        self.add(node, f"{holder[0]}.{node.args[1].value}", "name", its)

    def add_options(self, node: ast.Call, function: str, guard: Guard) -> None:
        """Options that a call names as text: ``torch.compile(options={…})``, ``torch._inductor.config.patch(…)``."""
        place = "torch._inductor.config"
        values = [keyword.value for keyword in node.keywords if function == "torch.compile" and keyword.arg == "options"]
        if function.endswith(".config.patch"):
            place = function.removesuffix(".patch")
            values = [*node.args[:1]]
        for value in values:
            for key in value.keys if isinstance(value, ast.Dict) else [value]:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self.add(key, f"{place}.{key.value}", "name", guard)

    def add_keywords(self, node: ast.Call, function: str, bound_under: str, guard: Guard) -> None:
        its = guard.narrowed(ALL, bound_under) if bound_under else guard
        for keyword in node.keywords:
            if keyword.arg is not None:
                self.add(keyword, function, "keyword", its, keyword=keyword.arg)

    def add(self, node: ast.AST, name: str, kind: Kind, guard: Guard, *, keyword: str = "", is_import: bool = False) -> None:
        if kind == "store":
            self.sets.add(name)
        reason = guard.for_kind("import" if kind == "module" or is_import else kind)
        self.uses.append(Use(node.lineno, name, kind, keyword, reason))  # type: ignore[attr-defined]


def is_torch(dotted: str) -> bool:
    """Whether a dotted name is one of torch's."""
    return dotted in ROOTS or dotted.partition(".")[0] in ROOTS


def _chain(node: ast.expr) -> list[str] | None:
    """``a.b.c`` as its parts; None for any other expression."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return None
    parts.append(node.id)
    return parts[::-1]
