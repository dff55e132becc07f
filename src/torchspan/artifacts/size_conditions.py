"""Sizes that differ from call to call: expressions over them and conditions on them, as text that is checked and then computed.

An artifact with dynamic dimensions names its symbols, such as ``s33``, and says of which tensor's size each is. Shapes, strides
and steps of its graphs are then expressions over symbols. No name but those below has a meaning in an expression.
"""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, SimpleNamespace
from typing import Any

import torch
from torch.fx import Graph, Node

from torchspan.artifacts.paths import Path, decode_path, encode_path, follow, parse_path, show_path
from torchspan.core.errors import IntegrityError, UnsupportedError
from torchspan.private import fx

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {"max": max, "min": min, "abs": abs, "int": int, "float": float, "round": round}
_MATH = ("floor", "ceil", "trunc", "sqrt", "log", "log2", "exp", "pow")
_NODES = (
    *(ast.Expression, ast.Name, ast.Load, ast.Constant, ast.Call, ast.Attribute, ast.IfExp),
    *(ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod, ast.Pow),
    *(ast.UnaryOp, ast.USub, ast.UAdd, ast.Not, ast.BoolOp, ast.And, ast.Or),
    *(ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE),
)
_MAX_POWER = 16
_MAX_LENGTH = 65536
_MAX_NUMBER = 2**64


class Expression:
    """One expression over symbols, as checked code.

    >>> Expression.of("4*s0 + max(s1, 2)").value({"s0": 3, "s1": 1})
    14
    >>> Expression.of("__import__('os')")
    Traceback (most recent call last):
    torchspan.core.errors.IntegrityError: an artifact holds the expression "__import__('os')", which is not one over sizes
    """

    __slots__ = ("code", "names", "text")

    def __init__(self, text: str, code: CodeType, names: frozenset[str]) -> None:
        self.text, self.code, self.names = text, code, names

    @classmethod
    def of(cls, text: str) -> Expression:
        """Read `text`, which may come from a file of anybody's."""
        try:
            tree = ast.parse(text, mode="eval")
            is_right = len(text) <= _MAX_LENGTH and all(map(_is_allowed, ast.walk(tree)))
        except (SyntaxError, ValueError, RecursionError, MemoryError, TypeError):
            is_right = False
        if not is_right:
            raise IntegrityError(f'an artifact holds the expression "{text!s:.80}", which is not one over sizes')
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        return cls(text, compile(tree, "<sizes>", "eval"), frozenset(names - {*_FUNCTIONS, "math"}))

    def value(self, symbols: Mapping[str, int]) -> Any:
        """Its value, for these values of the symbols."""
        return eval(self.code, _SCOPE, symbols)  # of what has passed `_is_allowed`

    def node(self, graph: Graph, numbers: Mapping[str, Node]) -> Any:
        """Its value as nodes of a graph, made of the nodes that stand for its symbols."""
        return _node(ast.parse(self.text, mode="eval").body, graph, numbers)


def _node(part: ast.expr, graph: Graph, numbers: Mapping[str, Node]) -> Any:
    def build(inner: ast.expr) -> Any:
        return _node(inner, graph, numbers)

    if isinstance(part, ast.Constant):
        return part.value
    if isinstance(part, ast.Name):
        return numbers[part.id]
    if isinstance(part, ast.UnaryOp) and isinstance(part.op, ast.USub):
        return graph.call_function(operator.neg, (build(part.operand),))
    if isinstance(part, ast.BinOp):
        return graph.call_function(_OPERATORS[type(part.op)], (build(part.left), build(part.right)))
    if isinstance(part, ast.Call) and ast.unparse(part.func) in _SYMBOLIC:
        return graph.call_function(_SYMBOLIC[ast.unparse(part.func)], tuple(map(build, part.args)))
    raise UnsupportedError(f"an artifact's library cannot compute {ast.unparse(part)} of sizes; leave those static")


_OPERATORS: Mapping[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_SYMBOLIC: Mapping[str, Callable[..., Any]] = {
    "max": torch.sym_max,
    "min": torch.sym_min,
    "float": torch.sym_float,
    "int": torch.sym_int,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "math.sqrt": torch.sym_sqrt,
}
_SCOPE: dict[str, Any] = {
    "__builtins__": {},
    **_FUNCTIONS,
    "math": SimpleNamespace(**{name: getattr(math, name) for name in _MATH}, pi=math.pi, inf=math.inf),
}


def _is_small(node: ast.AST) -> bool:
    """Whether a power, or a literal, is as small as sizes need: a large one takes hours to compute, or all memory."""
    return isinstance(node, (ast.Constant, ast.UnaryOp)) and abs(ast.literal_eval(node)) <= _MAX_POWER


def _is_allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float)) and abs(node.value) <= _MAX_NUMBER
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "math" and node.attr in (*_MATH, "pi", "inf")
    if isinstance(node, ast.Call):
        is_known = isinstance(node.func, ast.Attribute) or (isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS)
        return is_known and not node.keywords and (ast.unparse(node.func) != "round" or all(map(_is_small, node.args[1:])))
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        return _is_small(node.right) and not any(isinstance(inner, ast.Pow) for inner in ast.walk(node.left))
    return isinstance(node, _NODES)


# one dimension, or any number in a plan: an int, or an object with the key "size"


def is_size(value: Any) -> bool:
    """Whether a value of a graph is a number that was computed of dynamic sizes."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def example_of(value: Any) -> Any:
    """The value of a number for the example inputs; ``int`` of one that was computed of dynamic sizes would fix them."""
    return value.node.hint if is_size(value) else value


def encode_size(value: Any) -> Any:
    """A number that may be symbolic, as JSON.

    Raises:
        UnsupportedError: it depends on data, not on sizes of inputs.
    """
    if not is_size(value):
        return value
    unbacked = [str(symbol) for symbol in value.node.expr.free_symbols if str(symbol).startswith(("u", "zuf"))]
    if unbacked:
        raise UnsupportedError(f"an artifact cannot hold a size that depends on data ({', '.join(unbacked)})")
    return {"size": _checked(fx.PythonPrinter().doprint(value.node.expr))}


def _checked(text: str) -> str:
    """torch's expression in the terms of `Expression`.

    >>> _checked("torch.sym_float(s0) * torch._sym_sqrt(2)")
    'float(s0) * math.sqrt(2)'

    Raises:
        UnsupportedError: it has others.
    """
    text = re.sub(r"torch\.sym_(float|int|max|min)\b", r"\1", text)
    text = re.sub(r"torch\._?sym_(sqrt|exp|log2|log)\b", r"math.\1", text)
    try:
        Expression.of(text)
    except IntegrityError as cause:
        raise UnsupportedError(f"an artifact cannot hold {text}, an expression over sizes; leave those static") from cause
    return text


def read_sizes(values: Sequence[Any]) -> Callable[[Mapping[str, int]], tuple[Any, ...]]:
    """What gives the numbers that `encode_size` wrote, from the symbols of a call."""
    read = [Expression.of(value["size"]) if isinstance(value, dict) else int(value) for value in values]
    if not any(isinstance(item, Expression) for item in read):
        fixed = tuple(read)
        return lambda symbols: fixed
    return lambda symbols: tuple(item.value(symbols) if isinstance(item, Expression) else item for item in read)


# conditions, from how torch writes them


def write_conditions(texts: Sequence[str], symbols: Mapping[str, str], scope: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions on shapes as JSON: what each variable is (a path to a size or stride), and expressions over them.

    Args:
        texts: torch's conditions, over ``L['x'].size()[0]`` and the like.
        symbols: of each symbol, such an expression for where it is found.
        scope: where global names of the capture are looked up.

    Raises:
        UnsupportedError: a condition that is not one over sizes and strides.

    >>> written = write_conditions(["L['x'].size()[0] <= 8"], {"s0": "L['x'].size()[0]"}, {})
    >>> written["conditions"], written["variables"]
    (['s0 <= 8'], {'s0': [['local', 'x'], ['size', 0]]})
    """
    writer = _Writer(scope)
    for name, source in symbols.items():
        writer.variables[parse_path(source, scope)] = name
    conditions = []
    for text in dict.fromkeys(texts):
        conditions.append(_checked(ast.unparse(writer.visit(ast.parse(text, mode="eval")))))
    return {"variables": {name: encode_path(path) for path, name in writer.variables.items()}, "conditions": conditions}


class _Writer(ast.NodeTransformer):
    """Puts a variable where an expression stands for one size or stride of a tensor."""

    def __init__(self, scope: Mapping[str, Any]) -> None:
        self.variables: dict[Path, str] = {}
        self._scope = scope

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        path = parse_path(ast.unparse(node), self._scope)
        return ast.Name(self.variables.setdefault(path, f"v{len(self.variables)}"), ast.Load())


class Sizes:
    """The variables of one entry of an artifact and the conditions on them; without any if all its shapes are static."""

    def __init__(self, written: Mapping[str, Any]) -> None:
        self.names = tuple(written.get("variables", {}))
        self.paths = [decode_path(steps) for steps in written.get("variables", {}).values()]
        self._conditions = [Expression.of(text) for text in written.get("conditions", ())]
        unknown = frozenset[str]().union(*(condition.names for condition in self._conditions)) - set(self.names)
        if unknown:
            raise IntegrityError(f"an artifact's conditions name {', '.join(sorted(unknown))}, which it does not have")

    def failed(self, symbols: Mapping[str, int]) -> str | None:
        """The first condition that does not hold, with the sizes that it is about; None if all hold."""
        for condition in self._conditions:
            if not condition.value(symbols):
                places = {name: show_path(path) for name, path in zip(self.names, self.paths)}
                sizes = [f"{name} = {places[name]} = {symbols[name]}" for name in sorted(condition.names)]
                return f"expected {condition.text}, found {', '.join(sizes)}"
        return None

    def failed_for(self, values: Mapping[str, Any]) -> str | None:
        """The same, of a call's ``target``, ``args`` and ``kwargs``."""
        return self.failed({name: follow(path, values) for name, path in zip(self.names, self.paths)})
