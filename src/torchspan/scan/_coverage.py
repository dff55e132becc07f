"""What the backports provide, read from their files: importing one imports torch, which takes longer than a scan."""

from __future__ import annotations

import ast
import importlib.util
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from torchspan.backports._base import REGISTRY, Backport
from torchspan.environment.patch import MissingModule, MissingName, Redefinition, Replacement

OLDEST = "2.8"  # torch that torchspan runs on
_OPERATOR = re.compile(r"\w+::\w+")
_BESIDE = re.compile(r"torchspan\.backports\.(_\w+_operators)")
_OWNED = ("MissingModule", "MissingName", "Replacement", "Redefinition")  # their first argument is their owner
_PATCHES = ("Change", *_OWNED)


@dataclass(frozen=True)
class Provided:
    """What one backport provides: dotted `names`, whole `modules`, and `changed` functions and classes.

    Of those that are changed it also provides whatever argument or member its code names: `words` are the words of its file.
    Of its own names it provides such an argument only where torch lacks the name. With `impossible`, the reason, it provides
    none of them: they can be imported, and their use is an error; so it is with single names that are `refused`. Where
    `is_read` is False, its file says it in a way that is not understood here: it has to be imported to know more of what is in
    `target`, or anywhere if that is empty.
    """

    backport: str
    names: frozenset[str]
    modules: frozenset[str]
    changed: frozenset[str]
    words: frozenset[str]
    impossible: str = ""
    is_read: bool = True
    target: str = ""
    refused: Mapping[str, str] = field(default_factory=dict)

    def refuses(self, name: str) -> str:
        """Why the use of `name` is an error; nothing where it works."""
        return self.impossible or self.refused.get(name, "")

    def may_cover(self, name: str) -> bool:
        """Whether it has to be imported to tell if it covers `name`."""
        return not self.is_read and f"{name}.".startswith(f"{self.target}." if self.target else "")

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
    """What every backport provides; those that have to be imported for it come last."""
    entries = []
    for name in REGISTRY.names():
        spec = importlib.util.find_spec(REGISTRY.target(name).partition(":")[0])
        if spec is not None and spec.origin is not None:
            entries.append(read_backport(name, Path(spec.origin).read_text(), Path(spec.origin).parent))
    return sorted(entries, key=lambda entry: not entry.is_read)


def read_backport(name: str, text: str, folder: Path = Path()) -> Provided:
    """What the backport in the file `text` provides; modules of its own beside it are looked up in `folder`."""
    tree = ast.parse(text)
    reader = _Reader(tree, folder)
    reader.read()
    words = itertools.chain.from_iterable(map(_texts, (tree, *_operators_beside(tree, folder))))
    names = reader.names | {f"torch.ops.{word.replace('::', '.')}" for word in words if _OPERATOR.fullmatch(word)}
    places = (frozenset(names), frozenset(reader.modules), frozenset(reader.changed))
    return Provided(
        name, *places, _words(tree), _impossible(reader.options), reader.is_read, reader.unread_target, reader.refused
    )


def imported(entry: Provided) -> Provided:
    """What a backport provides, asked of the backport itself."""
    backport: Backport = REGISTRY.get(entry.backport).BACKPORT
    names, modules, changed = set(entry.names), set(entry.modules), set(entry.changed)
    for patch in backport.patches():
        if isinstance(patch, MissingModule):
            modules.add(patch.target)
        elif isinstance(patch, (MissingName, Replacement, Redefinition)):
            (names if isinstance(patch, MissingName) else changed).add(f"{patch.target}.{patch.attribute}")
    names |= {f"{backport.target}.{attribute}" for attribute in backport.names}
    return replace(entry, names=frozenset(names), modules=frozenset(modules), changed=frozenset(changed), is_read=True)


class _Reader:
    """Reads a backport's declaration, and the patches that its file makes by calls with constant text."""

    def __init__(self, tree: ast.Module, folder: Path) -> None:
        self.tree = tree
        self.names: set[str] = set()
        self.modules: set[str] = set()
        self.changed: set[str] = set()
        self.is_read = True
        self.unread_target = ""
        self.refused: dict[str, str] = {}
        self.constants = _constants(tree)
        self.tables = _tables(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "torchspan.backports":
                for beside in (alias.name for alias in node.names if (folder / f"{alias.name}.py").is_file()):
                    constants = _constants(ast.parse((folder / f"{beside}.py").read_text()))
                    self.constants |= {f"{beside}.{name}": text for name, text in constants.items()}
        self.makers = dict(filter(None, (_maker(node) for node in tree.body)))
        self.options = _declared(tree)

    def read(self) -> None:
        inside = {id(inner) for _, call in self.makers.values() for inner in ast.walk(call)}
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and id(node) not in inside:
                if node.func.id in _PATCHES:
                    self.add(node, self.constants)
                elif node.func.id in self.makers:
                    parameters, call = self.makers[node.func.id]
                    values = (_text(argument, self.constants) for argument in node.args)
                    self.add(call, {**self.constants, **dict(zip(parameters, values))})
        target = _text(self.options.get("target"), self.constants)
        self.is_read = self.is_read and bool(target)
        if isinstance(self.options.get("is_module"), ast.Constant):
            self.modules.add(target)
        is_read_so_far = self.is_read
        for module, names in self.find_names(target):
            self.names |= {f"{module}.{key}" for key in self.keys(names)}
            self.refused |= {f"{module}.{key}": reason for key, reason in self.find_refused(names)}
        self.changed |= {
            f"{target}.{key}" for option in ("replaces", "redefines") for key in self.keys(self.options.get(option))
        }
        self.unread_target = target if is_read_so_far else ""
        also = self.options.get("also")
        parts = also.elts if isinstance(also, (ast.Tuple, ast.List)) else [] if also is None else [also]
        known = {*_PATCHES, *self.makers}
        if not all(isinstance(part, ast.Call) and getattr(part.func, "id", "") in known for part in parts):
            self.is_read, self.unread_target = False, ""

    def add(self, call: ast.Call, constants: Mapping[str, str]) -> None:
        """Add what a call of one of the patches' classes says."""
        kind = call.func.id  # type: ignore[attr-defined]
        by_name = {keyword.arg: keyword.value for keyword in call.keywords}
        arguments = [*call.args[1 if kind in _OWNED else 0 :], None, None]
        target = _text(arguments[0] or by_name.get("target"), constants)
        attribute = _text(arguments[1] or by_name.get("attribute"), constants)
        if kind == "MissingModule":
            self.modules.add(target)
        else:
            is_new = kind == "MissingName" or getattr(by_name.get("create"), "value", False)
            (self.names if is_new else self.changed).add(f"{target}.{attribute}")
        self.is_read = self.is_read and bool(target and (attribute or kind == "MissingModule"))

    def find_names(self, target: str) -> Iterator[tuple[str, ast.expr | None]]:
        """The modules that get names, with the names: the one that the backport is for, and those elsewhere."""
        yield target, self.options.get("names")
        elsewhere = self.options.get("elsewhere")
        modules = [*self.keys(elsewhere)]
        self.modules.update(modules)
        yield from zip(modules, (value for _, value in self.entries(elsewhere)))

    def entries(self, node: ast.expr | None) -> Iterator[tuple[ast.expr | None, ast.expr]]:
        """The keys and values of a dict, or of one that the file has at its top by name, those that it unpacks included."""
        table = self.tables.get(node.id) if isinstance(node, ast.Name) else node
        for key, value in zip(table.keys, table.values) if isinstance(table, ast.Dict) else ():
            is_known = isinstance(value, ast.Name) and value.id in self.tables
            if key is None and is_known:
                yield from self.entries(value)
            else:
                yield key, value

    def find_refused(self, names: ast.expr | None) -> Iterator[tuple[str, str]]:
        """Those of the names that are built by ``unavailable(…)``, and why they cannot work."""
        for key, value in self.entries(names):
            call = value.body if isinstance(value, ast.Lambda) else None
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "unavailable":
                cause = [*call.args[1:2], *(keyword.value for keyword in call.keywords if keyword.arg == "cause")]
                yield _text(key, self.constants), (_text(cause[0], self.constants) if cause else "") or "it cannot work here"

    def keys(self, node: ast.expr | None) -> Iterator[str]:
        """The keys of a dict in the declaration."""
        keys: Iterable[ast.expr | None] = ()
        if isinstance(node, ast.Dict) or (isinstance(node, ast.Name) and node.id in self.tables):
            keys = [key for key, _ in self.entries(node)]
        elif isinstance(node, ast.DictComp) and isinstance(node.generators[0].iter, (ast.Tuple, ast.List)):
            keys = node.generators[0].iter.elts
        elif node is not None:
            self.is_read = False
        for key in keys:
            text = _text(key, self.constants)
            self.is_read = self.is_read and bool(text)
            yield text


def _constants(tree: ast.Module) -> dict[str, str]:
    """The names that are assigned constant text anywhere in a file."""
    constants: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            constants[node.targets[0].id] = _text(node.value, constants)
    return constants


def _tables(tree: ast.Module) -> dict[str, ast.Dict]:
    """The dicts at the top of a file, by name."""
    assigned = (node for node in tree.body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict))
    return {target.id: node.value for node in assigned for target in node.targets if isinstance(target, ast.Name)}  # type: ignore[misc]


def _maker(node: ast.stmt) -> tuple[str, tuple[list[str], ast.Call]] | None:
    """A function that only makes a patch from its arguments: its name, its parameters, and the call."""
    if not isinstance(node, ast.FunctionDef) or len(node.body) != 1 or not isinstance(node.body[0], ast.Return):
        return None
    call = node.body[0].value
    if not isinstance(call, ast.Call) or getattr(call.func, "id", "") not in _PATCHES:
        return None
    return node.name, ([argument.arg for argument in node.args.args], call)


def _declared(tree: ast.Module) -> dict[str | None, ast.expr]:
    """What the file gives to its ``BACKPORT = Backport(…)``."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and getattr(node.targets[0], "id", "") == "BACKPORT"
            and isinstance(node.value, ast.Call)
        ):
            return {keyword.arg: keyword.value for keyword in node.value.keywords}
    return {}


def _impossible(keywords: Mapping[str | None, ast.expr]) -> str:
    """Why a backport cannot work; where it asks the machine, that it may not."""
    node = keywords.get("impossible")
    if node is None:
        return ""
    reason = _text(node.body, {}) if isinstance(node, ast.Lambda) else ""
    return reason or "it depends on the machine whether it can work"


def _text(node: ast.expr | None, constants: Mapping[str, str]) -> str:
    """The text of an expression made of constants; empty where it is something else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, (ast.Name, ast.Attribute)):
        return constants.get(ast.unparse(node), "")
    if isinstance(node, ast.JoinedStr):
        parts = [_text(part.value if isinstance(part, ast.FormattedValue) else part, constants) for part in node.values]
        return "".join(parts) if all(parts) else ""
    if isinstance(node, ast.Subscript) and ast.unparse(node).endswith(".rpartition('.')[0]"):  # the package that a module is in
        return _text(node.value.func.value, constants).rpartition(".")[0]  # type: ignore[attr-defined]
    return ""


def _words(tree: ast.Module) -> frozenset[str]:
    """Every argument, attribute, function and text in a file that can be a name."""
    words: set[str] = set()
    for node in ast.walk(tree):
        for attribute in ("arg", "attr", "name", "value"):
            word = getattr(node, attribute, None)
            if isinstance(word, str) and word.isidentifier():
                words.add(word)
    return frozenset(words)


def _operators_beside(tree: ast.Module, folder: Path) -> Iterator[ast.Module]:
    """The files beside a backport's in which it defines its operators: ``_…_operators.py``, from which it imports."""
    for node in tree.body:
        name = _BESIDE.fullmatch(node.module or "") if isinstance(node, ast.ImportFrom) else None
        if name is not None and (folder / f"{name[1]}.py").is_file():
            yield ast.parse((folder / f"{name[1]}.py").read_text())


def _texts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value.partition("(")[0]
