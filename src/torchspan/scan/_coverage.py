"""What the backports provide, read from their files: importing one imports torch, which takes longer than a scan."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torchspan.backports._base import REGISTRY

_OPERATOR = re.compile(r"\w+::\w+")
OLDEST = "2.8"  # torch that torchspan runs on


@dataclass(frozen=True)
class Provided:
    """What one backport provides: dotted `names`, whole `modules`, and `changed` functions and classes.

    Of those that are changed it also provides whatever argument or member its code names: `words` are the words of its file.
    Of its own names it provides such an argument only where torch lacks the name.
    """

    backport: str
    names: frozenset[str]
    modules: frozenset[str]
    changed: frozenset[str]
    words: frozenset[str]
    impossible: str = ""

    def covers_name(self, name: str) -> bool:
        """Whether a program may use `name`."""
        owner, _, member = name.rpartition(".")
        is_member = (
            owner in self.changed or f"{owner}._config" in self.changed
        )  # the table that a config module's options are in
        return name in self.names or name in self.modules or (is_member and member in self.words)

    def covers_keyword(self, name: str, keyword: str) -> bool:
        """Whether a program may pass `keyword` to `name`, which torch has."""
        return keyword in self.words and not self.changed.isdisjoint((name, f"{name}.__init__"))


def provided() -> list[Provided]:
    """What every backport provides."""
    found = []
    for name in REGISTRY.names():
        spec = importlib.util.find_spec(REGISTRY.target(name).partition(":")[0])
        if spec is not None and spec.origin is not None:
            found.append(read_backport(name, Path(spec.origin).read_text()))
    return found


def read_backport(name: str, text: str) -> Provided:
    """What the backport in the file `text` provides."""
    tree = ast.parse(text)
    constants = _constants(tree)
    names: set[str] = set()
    modules: set[str] = set()
    changed: set[str] = set()
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        kind = getattr(call.func, "id", "")
        if kind in ("Change", "Replacement", "MissingName", "MissingModule", "Redefinition"):
            target, attribute = (_text(argument, constants) for argument in _two(call, kind))
            if target:
                holder = (
                    names if kind == "MissingName" or _is_created(call) else modules if kind == "MissingModule" else changed
                )
                holder.add(f"{target}.{attribute}" if attribute and kind != "MissingModule" else target)
    declared = _declaration(tree)
    given = {keyword.arg: keyword.value for keyword in declared.keywords} if declared is not None else {}
    target = _text(given.get("target"), constants)
    if isinstance(given.get("is_module"), ast.Constant):
        modules.add(target)
    names |= {f"{target}.{key}" for key in _keys(given.get("names"), constants)}
    changed |= {f"{target}.{key}" for key in _keys(given.get("replaces"), constants)}
    names |= {f"torch.ops.{word.replace('::', '.')}" for word in _texts(tree) if _OPERATOR.fullmatch(word)}
    impossible = ast.unparse(given["impossible"]) if "impossible" in given else ""
    return Provided(name, frozenset(names), frozenset(modules), frozenset(changed), _words(tree), impossible)


def _constants(tree: ast.Module) -> dict[str, str]:
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = _text(node.value, found)
            if value:
                found[node.targets[0].id] = value
    return found


def _text(node: ast.expr | None, constants: Mapping[str, str]) -> str:
    """The text of an expression made of constants; empty where it is something else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.Name):
        return constants.get(node.id, "")
    if isinstance(node, ast.JoinedStr):
        parts = [_text(part.value if isinstance(part, ast.FormattedValue) else part, constants) for part in node.values]
        return "".join(parts) if all(parts) else ""
    if isinstance(node, ast.Subscript) and ast.unparse(node).endswith(".rpartition('.')[0]"):  # the package that a module is in
        return _text(node.value.func.value, constants).rpartition(".")[0]  # type: ignore[attr-defined]
    return ""


def _two(call: ast.Call, kind: str) -> Iterator[ast.expr | None]:
    """The target and attribute that a call is given, by position or by name."""
    first = 0 if kind == "Change" else 1  # the others' first argument is their owner
    by_name = {keyword.arg: keyword.value for keyword in call.keywords}
    for index, name in enumerate(("target", "attribute"), start=first):
        yield call.args[index] if index < len(call.args) else by_name.get(name)


def _is_created(call: ast.Call) -> bool:
    return any(keyword.arg == "create" and getattr(keyword.value, "value", False) for keyword in call.keywords)


def _declaration(tree: ast.Module) -> ast.Call | None:
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "") == "BACKPORT"
            and isinstance(node.value, ast.Call)
        ):
            return node.value
    return None


def _keys(node: ast.expr | None, constants: Mapping[str, str]) -> Iterator[str]:
    if isinstance(node, ast.Dict):
        yield from filter(None, (_text(key, constants) for key in node.keys))
    elif isinstance(node, ast.DictComp) and isinstance(node.generators[0].iter, (ast.Tuple, ast.List)):
        yield from filter(None, (_text(key, constants) for key in node.generators[0].iter.elts))


def _words(tree: ast.Module) -> frozenset[str]:
    """Every argument, attribute, function and text in a file that can be a name."""
    found: set[str] = set()
    for node in ast.walk(tree):
        for attribute in ("arg", "attr", "name", "value"):
            word = getattr(node, attribute, None)
            if isinstance(word, str) and word.isidentifier():
                found.add(word)
    return frozenset(found)


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition("(")[0]
