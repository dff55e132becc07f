"""The values that names get in a file: from assignments, parameters, loops and imports, by scope. Nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torchspan.report._source import Source

_SCOPES = (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)
_RANKS = frozenset(("rank", "local_rank", "gpu", "gpu_id", "gpu_idx", "gpu_index", "device_id", "device_idx", "device_index"))
"""What programs call the number of a device, where nothing else says what it is."""
_CURRENT = "torch.cuda.current_device"
_COUNTING = frozenset(("int", "len", _CURRENT, "torch.cuda.device_count", "torch.accelerator.device_count"))


@dataclass(frozen=True)
class Binding:
    """One place that gives a name its value. `value` is what a loop goes through for its variable; None where there is none."""

    name: str
    line: int
    value: ast.expr | None
    how: Literal["assigned", "parameter", "loop", "defined"]
    annotation: ast.expr | None = None


class Bindings:
    """The names of one file, and what each is given where it is seen.

    >>> source = Source("", "rank = 0\\ndef f(device):\\n    return device")
    >>> bindings = Bindings(source)
    >>> name = source.tree.body[1].body[0].value
    >>> [(binding.line, binding.how) for binding in bindings.of("device", name)], bindings.of("other", name)
    ([(2, 'parameter')], [])
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        tree = source.tree or ast.Module([], [])
        self.parents: dict[ast.AST, ast.AST] = {c: node for node in ast.walk(tree) for c in ast.iter_child_nodes(node)}
        self._names: dict[ast.AST, dict[str, list[Binding]]] = {}
        self._attributes: dict[str, list[Binding]] = {}
        for node in ast.walk(tree):
            self._collect(node)

    def of(self, name: str, node: ast.AST) -> list[Binding]:
        """What `name` is given in the innermost scope around `node` that gives it anything."""
        scope = self._scope_of(name, node)
        return self._names[scope][name] if scope is not None else []

    def of_expression(self, node: ast.expr) -> list[Binding]:
        """What a name or an attribute (``self.device``) is given in this file."""
        if isinstance(node, ast.Name):
            return self.of(node.id, node)
        return self._attributes.get(self._source.code(node), []) if isinstance(node, ast.Attribute) else []

    def is_usable(self, name: str, node: ast.AST) -> bool | None:
        """Whether `name` holds a device where `node` is; None where nothing has given it a value yet, so that it is free."""
        scope = self._scope_of(name, node)
        if scope is None:
            return None
        bindings = self._names[scope][name]
        is_here = scope in self._scopes(node)[:1]
        if is_here and not any(b.how == "parameter" or b.line < self.statement(node).lineno for b in bindings):
            return None if isinstance(scope, ast.Module) else False
        return not any(b.how in ("loop", "defined") or self._is_number_given(b) for b in bindings) and not _is_cpu_alone(
            bindings
        )

    def is_number(self, node: ast.expr, depth: int = 0) -> bool:
        """Whether an expression is the number of a device, as far as the file says."""
        if isinstance(node, ast.Constant):
            return type(node.value) is int
        if isinstance(node, ast.Call):
            last = self._source.code(node.func).rpartition(".")[2]
            return (self._source.dotted(node.func) or last) in _COUNTING or last in ("get_rank", "get_local_rank")
        if isinstance(node, ast.BinOp):
            is_text = isinstance(node.left, ast.JoinedStr) or isinstance(getattr(node.left, "value", None), str)
            return not is_text and (self.is_number(node.left, depth) or self.is_number(node.right, depth))
        if not isinstance(node, (ast.Name, ast.Attribute)):
            return False
        bindings = self.of_expression(node)
        if depth < 4 and any(self._is_number_given(b, depth + 1) for b in bindings):
            return True
        is_unknown = all(b.value is None or (isinstance(b.value, ast.Constant) and b.value.value is None) for b in bindings)
        return is_unknown and (node.id if isinstance(node, ast.Name) else node.attr) in _RANKS

    def statement(self, node: ast.AST) -> ast.stmt:
        """The statement that `node` is in."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def ancestors(self, node: ast.AST) -> Iterator[tuple[ast.AST, ast.AST]]:
        """Each node around `node`, from the inside, with the part of it that `node` is in."""
        while node in self.parents:
            yield self.parents[node], node
            node = self.parents[node]

    # how it is found

    def _scopes(self, node: ast.AST) -> list[ast.AST]:
        """The scopes around a node that its names are looked up in, the innermost first."""
        scopes = [around for around, part in self.ancestors(node) if isinstance(around, _SCOPES) and _is_inside(part, around)]
        return [scope for place, scope in enumerate(scopes) if place == 0 or not isinstance(scope, ast.ClassDef)]

    def _scope_of(self, name: str, node: ast.AST) -> ast.AST | None:
        return next((scope for scope in self._scopes(node) if name in self._names.get(scope, ())), None)

    def _collect(self, node: ast.AST) -> None:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            self._bind(node.id, node, self._assigned(node))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            self._attributes.setdefault(self._source.code(node), []).append(self._assigned(node))
        elif isinstance(node, ast.arguments):
            self._collect_parameters(node)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            self._bind(node.name, node, Binding(node.name, node.lineno, None, "defined"))
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for alias in node.names:
                name = alias.asname or alias.name.partition(".")[0]
                self._bind(name, node, Binding(name, node.lineno, None, "defined"))

    def _bind(self, name: str, node: ast.AST, binding: Binding) -> None:
        scope = self._scopes(node)[0]
        body = scope.body if isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef)) else []
        if any(isinstance(inner, ast.Global) and name in inner.names for inner in body):
            scope = self._scopes(node)[-1]
        self._names.setdefault(scope, {}).setdefault(name, []).append(binding)

    def _assigned(self, node: ast.expr) -> Binding:
        parent: Any = self.parents[node]
        name, line = self._source.code(node), node.lineno
        if isinstance(parent, (ast.For, ast.AsyncFor, ast.comprehension)) and parent.target is node:
            return Binding(name, line, parent.iter, "loop")
        if isinstance(parent, (ast.Assign, ast.AnnAssign, ast.NamedExpr)):
            return Binding(name, line, parent.value, "assigned", getattr(parent, "annotation", None))
        around = self.parents.get(parent)
        if isinstance(parent, ast.Tuple) and isinstance(around, ast.Assign) and isinstance(around.value, ast.Tuple):
            pairs = dict(zip(parent.elts, around.value.elts))
            return Binding(name, line, pairs.get(node), "assigned")
        return Binding(name, line, None, "assigned")

    def _collect_parameters(self, node: ast.arguments) -> None:
        positional = [*node.posonlyargs, *node.args]
        defaults: list[ast.expr | None] = [None] * (len(positional) - len(node.defaults)) + list(node.defaults)
        for argument, default in [*zip(positional, defaults), *zip(node.kwonlyargs, node.kw_defaults)]:
            binding = Binding(argument.arg, argument.lineno, default, "parameter", argument.annotation)
            self._names.setdefault(self.parents[node], {}).setdefault(argument.arg, []).append(binding)

    def _is_number_given(self, binding: Binding, depth: int = 0) -> bool:
        value = binding.value
        if isinstance(binding.annotation, ast.Name) and binding.annotation.id == "int":
            return True
        if binding.name == "device" and isinstance(value, ast.Call) and self._source.dotted(value.func) == _CURRENT:
            return False  # its portable form gives a device
        if binding.how == "loop":
            return isinstance(value, ast.Call) and self._source.code(value.func) == "range"
        return value is not None and self.is_number(value, depth)


def _is_inside(part: ast.AST, scope: Any) -> bool:
    """Whether a part of a function is in its body: its defaults and decorators are seen where it is defined."""
    return part in scope.body if isinstance(scope.body, list) else part is scope.body


def _is_cpu_alone(bindings: list[Binding]) -> bool:
    """Whether all that a name is given is the CPU, or nothing (a parameter that is None unless it is given)."""
    values = [getattr(b.value, "args", [b.value])[:1] for b in bindings]
    texts = [value[0].value for value in values if value and isinstance(value[0], ast.Constant)]
    return bool(bindings) and len(texts) == len(bindings) and all(text in ("cpu", None) for text in texts)
