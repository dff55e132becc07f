"""What a Python file uses of torch, read from its syntax tree: which name, on which line, and whether the program guards it."""

from __future__ import annotations

import ast
from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import Literal

from torchspan.scan._guards import ALL, NO_GUARD, Guard
from torchspan.scan._paths import Paths, Scope, is_self, is_torch

Kind = Literal["module", "name", "keyword", "store", "member", "set"]


@dataclass(frozen=True)
class Use:
    """One use of a dotted name of torch; `keyword` is an argument passed to it; `guard` says why it is no need, or is empty.

    A ``member`` is asked of an instance of a class, and a ``set`` one is set on it: ``torch.ones().grad_dtype`` stands for the
    attribute of what ``torch.ones`` gives, ``torch.nn.Linear().weight`` for one of an instance of the class. `argument` is the
    kind of the argument, such as ``list``, where the syntax shows it.
    """

    line: int
    name: str
    kind: Kind
    keyword: str = ""
    guard: str = ""
    argument: str = ""


@dataclass(frozen=True)
class FileUses:
    """What one file uses, and the dotted names of torch that it sets itself."""

    uses: tuple[Use, ...]
    sets: frozenset[str]


def read_uses(text: str | bytes, of_tensors: Container[str] = ()) -> FileUses:
    """What the program `text` uses of torch; `of_tensors` are names of attributes that nothing but a tensor has.

    Raises:
        SyntaxError: `text` is no Python.

    >>> [(use.line, use.name) for use in read_uses("from torch.nn import attention as a\\na.varlen.varlen_attn").uses]
    [(1, 'torch.nn.attention'), (2, 'torch.nn.attention.varlen.varlen_attn')]
    """
    tree = ast.parse(text)
    reader = _Reader(tree, b":=" in (text if isinstance(text, bytes) else text.encode()), of_tensors)
    reader.scope_of(tree.body, None, is_class=False)
    reader.visit_block(tree.body, NO_GUARD, is_module=True)
    return FileUses(tuple(dict.fromkeys(reader.uses)), frozenset(reader.sets))


class _Reader(Paths):
    """Visits a module's syntax tree, scope by scope."""

    def __init__(self, tree: ast.Module, has_walrus: bool, of_tensors: Container[str]) -> None:
        super().__init__(tree, has_walrus)
        self.of_tensors = of_tensors
        self.uses: list[Use] = []
        self.sets: set[str] = set()
        self.is_in_function = False
        self.lazy_annotations = any(
            isinstance(node, ast.ImportFrom)
            and node.module == "__future__"
            and any(a.name == "annotations" for a in node.names)
            for node in tree.body
        )

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
        self.scope.bases = node.bases
        self.bind_attributes(node)
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
        self.scope = Scope(outer, False)
        for generator in node.generators:  # type: ignore[attr-defined]
            self.bind_target(generator.target)
        for generator in node.generators:  # type: ignore[attr-defined]
            self.visit_field([generator.iter, generator.ifs], guard)
        self.visit_field([getattr(node, name, None) for name in ("key", "value", "elt")], guard)
        self.scope = outer

    def visit_attribute(self, node: ast.Attribute, guard: Guard) -> None:
        path = self.path(node)
        is_store = isinstance(node.ctx, ast.Store)
        if path is None or "()" in path[0]:
            if path is None and node.attr in self.of_tensors and not is_self(node.value):
                path = f"torch.Tensor().{node.attr}", ""
            if path is not None and "." in path[0].rpartition("()")[2] and not isinstance(node.ctx, ast.Del):
                self.add(node, path[0], "set" if is_store else "member", _bound(guard, path[1]))
            self.visit(node.value, guard)
        elif not isinstance(node.ctx, ast.Del):
            self.add(node, path[0], "store" if is_store else "name", _bound(guard, path[1]))

    def spelled(self, node: ast.expr) -> tuple[str, str] | None:
        """The dotted name of torch that an expression spells without a call, and the guard it was bound under."""
        path = self.path(node)
        return None if path is None or "()" in path[0] else path

    def visit_call(self, node: ast.Call, guard: Guard) -> None:
        function = self.path(node.func)
        self.visit(node.func, guard)
        if function is not None:
            if not function[0].endswith("onfig.patch"):
                self.add_keywords(node, *function, guard)
            self.add_options(node, function[0], guard)
        if isinstance(node.func, ast.Name) and node.func.id in ("hasattr", "getattr", "setattr"):
            self.visit_getattr(node, guard)
        elif function is None:
            self.visit_other_call(node, guard)
        for argument in node.args:
            self.visit(argument, guard)
        for keyword in node.keywords:
            self.visit(keyword.value, guard)

    def visit_other_call(self, node: ast.Call, guard: Guard) -> None:
        """``partial(torch.f, x=1)``, ``import_module("torch.x")``, ``super().__init__(x=1)``, ``patch.object(torch.x, …)``."""
        last = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        function = None
        if last == "partial" and first is not None:
            function = self.path(first)
        elif last == "__init__" and ast.unparse(node.func) == "super().__init__":
            function = self.base_of_class()
        elif last == "import_module" and isinstance(first, ast.Constant):
            if isinstance(first.value, str) and is_torch(first.value):
                self.add(node, first.value, "module", guard)
        elif ast.unparse(node.func).endswith(("patch.object", "monkeypatch.setattr")):
            self.visit_getattr(node, guard)
        if function is not None:
            self.add_keywords(node, *function, guard)

    def base_of_class(self) -> tuple[str, str] | None:
        """The one base of the class that this is in, if it is torch's."""
        scope: Scope | None = self.scope
        while scope is not None and not scope.is_class:
            scope = scope.parent
        bases = scope.bases if scope is not None else ()
        return self.path(bases[0], scope) if len(bases) == 1 else None

    def visit_getattr(self, node: ast.Call, guard: Guard) -> None:
        """``getattr(torch.x, "y")`` is a need, with a default it is guarded, as is ``hasattr``; ``setattr`` sets it."""
        if len(node.args) < 2 or not isinstance(node.args[1], ast.Constant) or not isinstance(node.args[1].value, str):
            return
        holder = self.path(node.args[0])
        if holder is None:
            return
        function = getattr(node.func, "id", "")
        its = _bound(guard, holder[1])
        if function == "hasattr" or (function == "getattr" and len(node.args) == 3):
            its = its.narrowed(ALL, f"{function}()")
        is_instance = "()" in holder[0]
        kind: Kind = ("set" if is_instance else "store") if function == "setattr" else "member" if is_instance else "name"
        self.add(node, f"{holder[0]}.{node.args[1].value}", kind, its)

    def add_options(self, node: ast.Call, function: str, guard: Guard) -> None:
        """Options that a call names: ``torch.compile(options={…})``, ``config.patch("x", 1)``, ``config.patch(x=1)``."""
        place = "torch._inductor.config"
        values = [keyword.value for keyword in node.keywords if function == "torch.compile" and keyword.arg == "options"]
        if function.endswith("onfig.patch"):
            place = function.removesuffix(".patch")
            values = [*node.args[:1]]
            for keyword in node.keywords:
                if keyword.arg is not None:
                    self.add(keyword, f"{place}.{keyword.arg}", "name", guard)
        for value in values:
            for key in value.keys if isinstance(value, ast.Dict) else [value]:
                if isinstance(key, ast.Constant) and isinstance(key.value, str):
                    self.add(key, f"{place}.{key.value}", "name", guard)

    def add_keywords(self, node: ast.Call, function: str, bound_under: str, guard: Guard) -> None:
        its = _bound(guard, bound_under)
        for keyword in node.keywords:
            if keyword.arg is not None:
                self.add(keyword, function, "keyword", its, keyword=keyword.arg, argument=self.kind_of(keyword.value))

    def kind_of(self, node: ast.expr) -> str:
        """What kind of argument an expression is, where its syntax shows it: ``list``, ``str``, ``Tag``; None is no kind."""
        if isinstance(node, ast.Constant):
            return "" if node.value is None else type(node.value).__name__
        if isinstance(node, (ast.List, ast.Tuple, ast.Dict, ast.Set)):
            return type(node).__name__.lower()
        path = self.spelled(node) if isinstance(node, ast.Attribute) else None
        return "Tag" if path is not None and path[0].startswith("torch.Tag.") else ""

    def add(
        self,
        node: ast.AST,
        name: str,
        kind: Kind,
        guard: Guard,
        *,
        keyword: str = "",
        is_import: bool = False,
        argument: str = "",
    ) -> None:
        if kind == "store":
            self.sets.add(name)
        reason = guard.for_kind("import" if kind == "module" or is_import else kind)
        self.uses.append(Use(node.lineno, name, kind, keyword, reason, argument))  # type: ignore[attr-defined]


def _bound(guard: Guard, bound_under: str) -> Guard:
    return guard.narrowed(ALL, bound_under) if bound_under else guard
