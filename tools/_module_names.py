"""The names that one Python file gives its module, read from its syntax tree: nothing is imported, nothing is run.

An entry says what a name is, as text::

    ""            something: a value, or a thing from another package
    "#"           a setting: a plain constant of a module, or a property that can be set
    "(a,b,*,c"    a function and its parameters; "*" ends the positional ones, "**" takes any keyword; "(~" before them: there
                  may be more (a stub, an unknown decorator); "(+": and those of the next base's __init__ (a dataclass)
    "(?"          a function of unknown parameters
    "(a:T|U"      … whose parameter is annotated as one of these kinds; kept where releases differ
    "(a>b.c"      … that gives an instance of the class b.c
    "=a.b"        the same object as a.b
    "@a.b"        an instance of the class a.b (or what the function a.b returns)
    ":a.b,c.d"    a class and its bases; "!X" is one from elsewhere; "?": it may have more names than are listed here, "*": its
                  instances may
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

ROOTS = ("torch", "functorch")
_HIDDEN = re.compile(
    r"^\s+global |setattr\(sys|globals\(\)\[|custom_op|triton_op|\bdefine\(", re.MULTILINE
)  # what only a look at all of a file finds
UNKNOWN = object()  # a value that the syntax does not tell

# decorators that keep the parameters of what they decorate; others may add some
_KEEPING = frozenset(
    [
        "abstractmethod",
        "allow_in_graph",
        "asynccontextmanager",
        "cache",
        "cached",
        "classmethod",
        "compatibility",
        "contextmanager",
        "deprecated",
        "_deprecated",
        "disable",
        "_disable_dynamo",
        "disable_dynamo",
        "enable_grad",
        "exposed_in",
        "final",
        "inference_mode",
        "lru_cache",
        "no_grad",
        "overload",
        "override",
        "property",
        "staticmethod",
        "set_module",
        "wraps",
        "_dcp_method_logger",
        "_time_logger",
        "_exception_logger",
        "deprecate",
        "unused",
        "ignore",
        "runtime_checkable",
        "total_ordering",
        "final",
    ]
)
_DATACLASSES = frozenset({"dataclass", "dataclass_transform", "_dataclass", "dataclass_with_init"})
_PLAIN_BASES = frozenset({"object", "Generic", "Protocol", "ABC", "Enum", "IntEnum", "StrEnum", "Flag", "IntFlag"})


@dataclass
class ClassNames:
    """A class: its bases (as in an entry) and its members' entries."""

    bases: str
    members: dict[str, str] = field(default_factory=dict)


@dataclass
class ModuleNames:
    """What one file gives its module; `stars` are modules whose public names it takes, `exported` is its ``__all__``."""

    names: dict[str, str] = field(default_factory=dict)
    classes: dict[str, ClassNames] = field(default_factory=dict)
    stars: list[str] = field(default_factory=list)
    exported: list[str] | None = None
    exported_from: list[str] = field(default_factory=list)
    is_open: bool = False
    replaced_by: str = ""
    operators: set[str] = field(default_factory=set)
    redirected: dict[str, str] = field(default_factory=dict)  # modules that this file makes the same as others


def read_module(name: str, text: str, *, is_package: bool, is_stub: bool) -> ModuleNames:
    """The names of the module `name`, whose source is `text`."""
    reader = _Reader(name, is_package, is_stub)
    try:
        tree = ast.parse(text)
    except SyntaxError:  # for a Python newer than this one
        return ModuleNames(is_open=True)
    reader.block(tree.body, {})
    reader.add_results()
    if _HIDDEN.search(text):
        reader.find_globals(tree, text)
    if reader.getattr_function is not None and not _bounded_names(
        reader.getattr_function, reader.constants, reader.found.names
    ):
        reader.found.is_open = True
    return reader.found


def is_ours(dotted: str) -> bool:
    """Whether a dotted name is one of torch's."""
    return dotted.partition(".")[0] in ROOTS


class _Reader:
    """Goes through a module's statements in order; both branches of an ``if`` count."""

    def __init__(self, name: str, is_package: bool, is_stub: bool) -> None:
        self.name, self.is_stub = name, is_stub
        self.package = name if is_package else name.rpartition(".")[0]
        self.found = ModuleNames()
        self.constants: dict[str, object] = {"__name__": name}
        self.foreign: set[str] = set()  # names imported from other packages
        self.this_module = {"sys.modules[__name__]"}  # expressions that mean it
        self.getattr_function: ast.FunctionDef | None = None
        self.results: list[tuple[dict[str, str], str, ast.expr | None]] = []  # table, name in it, annotation

    def block(self, statements: Iterable[ast.stmt], loop: Mapping[str, object]) -> None:
        for statement in statements:
            handler = getattr(self, f"on_{type(statement).__name__}", None)
            if handler is not None:
                handler(statement, loop)

    # statements that hold others

    def on_If(self, node: ast.If, loop: Mapping[str, object]) -> None:
        self.block(node.body, loop)
        self.block(node.orelse, loop)

    def on_Try(self, node: ast.Try, loop: Mapping[str, object]) -> None:
        for handler in node.handlers:  # first: what the try itself binds says more
            self.block(handler.body, loop)
        for part in (node.body, node.orelse, node.finalbody):
            self.block(part, loop)

    def on_With(self, node: ast.With, loop: Mapping[str, object]) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self.bind(item.optional_vars, "")
        self.block(node.body, loop)

    def on_While(self, node: ast.While, loop: Mapping[str, object]) -> None:
        self.block(node.body, loop)

    def on_For(self, node: ast.For, loop: Mapping[str, object]) -> None:
        self.bind(node.target, "")
        values = self.value_of(node.iter, loop)
        if isinstance(values, (list, tuple)) and len(values) <= 1000:
            for value in values:
                self.block(node.body, {**loop, **_unpacked(node.target, value)})
        else:
            self.block(node.body, {**loop, **_unpacked(node.target, UNKNOWN)})

    # statements that bind

    def on_Import(self, node: ast.Import, loop: Mapping[str, object]) -> None:
        for alias in node.names:
            target = alias.name if alias.asname else alias.name.partition(".")[0]
            self.found.names[alias.asname or target] = f"={target}" if is_ours(target) else ""
            if not is_ours(target):
                self.foreign.add(alias.asname or target)

    def on_ImportFrom(self, node: ast.ImportFrom, loop: Mapping[str, object]) -> None:
        module = self.absolute(node)
        for alias in node.names:
            if alias.name == "*":
                if is_ours(module):
                    self.found.stars.append(module)
                else:
                    self.add_foreign_star(module)
            elif is_ours(module):
                self.found.names[alias.asname or alias.name] = f"={module}.{alias.name}"
            else:
                self.found.names[alias.asname or alias.name] = ""
                self.foreign.add(alias.asname or alias.name)

    def add_foreign_star(self, module: str) -> None:
        """What ``from typing import *`` brings; of other packages than Python's own it is not known."""
        if module.partition(".")[0] not in sys.stdlib_module_names:
            self.found.is_open = True
            return
        names = importlib.import_module(module)
        for name in getattr(names, "__all__", [name for name in vars(names) if not name.startswith("_")]):
            self.found.names.setdefault(name, "")
            self.foreign.add(name)

    def absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = self.package.split(".")
        parts = parts[: len(parts) - (node.level - 1)]
        return ".".join([*parts, *([node.module] if node.module else [])])

    def on_FunctionDef(self, node: ast.FunctionDef | ast.AsyncFunctionDef, loop: Mapping[str, object]) -> None:
        if node.name == "__getattr__" and isinstance(node, ast.FunctionDef):
            self.getattr_function = node
            return
        entry = function_entry(node, self.is_stub, is_method=False)
        self.found.names[node.name] = _merged(self.found.names.get(node.name, ""), entry, self.is_stub)
        self.results.append((self.found.names, node.name, node.returns))

    on_AsyncFunctionDef = on_FunctionDef

    def on_ClassDef(self, node: ast.ClassDef, loop: Mapping[str, object]) -> None:
        class_names = self.found.classes[node.name] = read_class(node, self.dotted, self.is_stub, self.constants)
        self.found.names[node.name] = ":" + class_names.bases
        for part in _inner_statements(node.body):
            if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self.results.append((class_names.members, part.name, part.returns))
            elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
                self.results.append((class_names.members, part.target.id, part.annotation))

    def add_results(self) -> None:
        """Add the classes of what functions give, and of values, where annotations say so: all names are known by now."""
        by_place: dict[tuple[int, str], list[ast.expr | None]] = {}
        for table, name, annotation in self.results:
            by_place.setdefault((id(table), name), []).append(annotation)
        for table, name, _ in self.results:
            classes = {self.class_of(annotation) for annotation in by_place.pop((id(table), name), ())}
            entry = table.get(name, "")
            result = classes.pop() if len(classes) == 1 else ""
            if result and entry.startswith("("):
                table[name] = f"{entry}>{result}"
            elif result and entry == "":
                table[name] = f"@{result}"

    def class_of(self, annotation: ast.expr | None) -> str:
        """The class of torch that an annotation means, None aside; nothing where it means another or several."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            try:
                annotation = ast.parse(annotation.value, mode="eval").body
            except SyntaxError:
                return ""
        if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value).rpartition(".")[2] == "Optional":
            return self.class_of(annotation.slice)
        if isinstance(annotation, ast.BinOp):
            sides = [side for side in (annotation.left, annotation.right) if ast.unparse(side) != "None"]
            return self.class_of(sides[0]) if len(sides) == 1 else ""
        class_name = self.dotted(annotation) if isinstance(annotation, (ast.Name, ast.Attribute)) else None
        return class_name if class_name is not None and is_ours(class_name) else ""

    def on_Assign(self, node: ast.Assign, loop: Mapping[str, object]) -> None:
        for target in node.targets:
            self.assign(target, node.value, loop)

    def on_AnnAssign(self, node: ast.AnnAssign, loop: Mapping[str, object]) -> None:
        if node.value is not None:
            self.assign(node.target, node.value, loop)
        elif self.is_stub:
            self.bind(node.target, "")

    def on_AugAssign(self, node: ast.AugAssign, loop: Mapping[str, object]) -> None:
        if isinstance(node.target, ast.Name) and node.target.id == "__all__":
            self.export(node.value, loop)

    def on_Expr(self, node: ast.Expr, loop: Mapping[str, object]) -> None:
        call = node.value
        if not isinstance(call, ast.Call):
            return
        text = ast.unparse(call.func)
        if text in ("__all__.extend", "__all__.append") and call.args:
            self.export(call.args[0], loop)
        elif text in ("globals().update", "vars().update", "exec"):
            values = self.value_of(call.args[0], loop) if call.args else UNKNOWN
            self.set_names(list(values) if isinstance(values, dict) and text != "exec" else UNKNOWN)
        elif text == "setattr" and len(call.args) == 3 and self.is_this_module(call.args[0]):
            self.set_names(self.value_of(call.args[1], loop))
        elif text.endswith("install_config_module"):
            self.found.replaced_by = "torch.utils._config_module.ConfigModule"
            self.set_names(["_config", "_compile_ignored_keys", "_is_dirty", "_hash_digest"])

    def on_TypeAlias(self, node: ast.stmt, loop: Mapping[str, object]) -> None:
        self.bind(node.name, "")  # type: ignore[attr-defined]

    def assign(self, target: ast.expr, value: ast.expr, loop: Mapping[str, object]) -> None:
        if isinstance(target, ast.Name):
            if target.id == "__all__":
                self.found.exported = None
                self.export(value, loop)
                self.constants["__all__"] = self.found.exported or UNKNOWN
                return
            if self.is_this_module(value):
                self.this_module.add(target.id)
            constant = self.value_of(value, loop)
            if constant is not UNKNOWN:
                self.constants[target.id] = constant
            entry = self.entry_of(value) or ("#" if _is_plain(value) else "")
            if entry != f"={self.name}.{target.id}":
                self.found.names[target.id] = entry
        elif isinstance(target, ast.Subscript):
            self.assign_item(target, value, loop)
        elif isinstance(target, ast.Attribute) and target.attr == "__class__" and self.is_this_module(target.value):
            self.found.replaced_by = self.dotted(value) or "?"
        else:
            self.bind(target, "")

    def assign_item(self, target: ast.Subscript, value: ast.expr, loop: Mapping[str, object]) -> None:
        if self.is_this_module(target):
            self.found.replaced_by = (self.dotted(value.func) if isinstance(value, ast.Call) else None) or "?"
        elif ast.unparse(target.value) in ("globals()", "vars()", "locals()"):
            self.set_names(self.value_of(target.slice, loop))
        elif ast.unparse(target.value) == "sys.modules":
            key, module = self.value_of(target.slice, loop), self.dotted(value)
            if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("import_module"):
                module = self.value_of(value.args[0], loop)  # type: ignore[assignment]
            if isinstance(key, str) and isinstance(module, str):
                self.found.redirected[key] = module

    def set_names(self, names: object) -> None:
        for name in [names] if isinstance(names, str) else names if isinstance(names, list) else [UNKNOWN]:
            if isinstance(name, str):
                self.found.names.setdefault(name, "")
            else:
                self.found.is_open = True

    def bind(self, target: ast.expr, entry: str) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.found.names[node.id] = entry

    def export(self, value: ast.expr, loop: Mapping[str, object]) -> None:
        if isinstance(value, ast.BinOp) and isinstance(value.op, ast.Add):
            self.export(value.left, loop)
            self.export(value.right, loop)
            return
        if isinstance(value, ast.Attribute) and value.attr == "__all__":
            self.found.exported_from.append(self.dotted(value.value) or "?")
            return
        names = self.value_of(value, loop)
        if isinstance(names, str):
            names = [names]
        if isinstance(names, (list, tuple)):
            self.found.exported = [*(self.found.exported or []), *(name for name in names if isinstance(name, str))]

    def is_this_module(self, node: ast.expr) -> bool:
        return ast.unparse(node) in self.this_module

    # values

    def entry_of(self, value: ast.expr) -> str:
        if isinstance(value, ast.Lambda):
            return "(" + _parameters(value.args, skip_first=False)
        if isinstance(value, ast.Call):
            callee = self.dotted(value.func)
            last = ast.unparse(value.func).rpartition(".")[2]
            if last in ("_add_docstr", "add_docstr") and value.args:
                target = self.dotted(value.args[0])
                return f"={target}" if target else ""
            return "#" if last == "ContextProp" else f"@{callee}" if callee else ""
        target = self.dotted(value)
        return f"={target}" if target else ""

    def dotted(self, node: ast.expr) -> str | None:
        """The absolute dotted name that an expression spells, where it is one of torch's."""
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.found.names or node.id in self.foreign:
            return None
        entry = self.found.names[node.id]
        root = entry[1:] if entry.startswith("=") else f"{self.name}.{node.id}"
        return ".".join([root, *reversed(parts)])

    def value_of(self, node: ast.expr, loop: Mapping[str, object]) -> object:
        """The value of an expression made of text, lists of it, and loop variables; else UNKNOWN."""
        return _value_of(node, {**self.constants, **loop})

    def find_globals(self, tree: ast.Module, text: str) -> None:
        """Names that functions set: ``global x``, and operators that are registered anywhere in the file."""
        sets_globals = "globals()[" in text or "setattr(sys.modules" in text
        for node in ast.walk(tree):
            if isinstance(node, ast.Global):
                for name in node.names:
                    self.found.names.setdefault(name, "")
            elif isinstance(node, ast.Call):
                self.find_operator(node)
            elif isinstance(node, ast.FunctionDef) and sets_globals:
                self.find_set_globals(node)

    def find_set_globals(self, function: ast.FunctionDef) -> None:
        for node in ast.walk(function):
            target = node.targets[0] if isinstance(node, ast.Assign) else None
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr" and self.is_this_module(node.args[0]):
                self.set_names(self.value_of(node.args[1], {}))
            if isinstance(target, ast.Subscript) and ast.unparse(target.value) == "globals()":
                self.set_names(self.value_of(target.slice, {}))

    def find_operator(self, call: ast.Call) -> None:
        last = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        first = self.value_of(call.args[0], {}) if call.args else UNKNOWN
        if last in ("custom_op", "triton_op", "define") and isinstance(first, str) and first.count("::") == 1:
            self.found.operators.add(first.partition("(")[0].strip())


def read_class(node: ast.ClassDef, dotted: object, is_stub: bool, constants: Mapping[str, object]) -> ClassNames:
    """A class's bases and members; `dotted` tells the dotted name of an expression."""
    bases = [_base(base, dotted) for base in node.bases]
    if not is_stub and any(keyword.arg == "metaclass" for keyword in node.keywords):
        metaclass = ast.unparse(next(k.value for k in node.keywords if k.arg == "metaclass"))
        bases += [] if metaclass.rpartition(".")[2] in ("ABCMeta", "EnumMeta", "EnumType") else ["?"]
    names = ClassNames(",".join(dict.fromkeys(base for base in bases if base)))
    _read_class_body(node.body, names, is_stub, dotted)
    decorators = [ast.unparse(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2] for d in node.decorator_list]
    is_named_tuple = any(ast.unparse(base).rpartition(".")[2] == "NamedTuple" for base in node.bases)
    if "__init__" not in names.members and (is_named_tuple or _DATACLASSES & set(decorators)):
        names.members["__init__"] = ("(" if is_named_tuple else "(+") + ",".join(_fields(node))
    if any(name not in _KEEPING and name not in _DATACLASSES for name in decorators):
        initializer = names.members.get("__init__")
        names.members["__init__"] = "(?" if initializer is None or initializer.startswith("(+") else _with_more(initializer)
    function = next((part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__getattr__"), None)
    if function is not None and not _bounded_names(function, constants, names.members):
        names.bases = ",".join(dict.fromkeys([*filter(None, names.bases.split(",")), "*"]))
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            _add_instance_names(part, names.members)
    return names


def _base(node: ast.expr, dotted: object) -> str:
    while isinstance(node, ast.Subscript):
        node = node.value
    target = dotted(node)  # type: ignore[operator]
    if target is not None and is_ours(target):
        return target
    last = ast.unparse(node).rpartition(".")[2]
    return "" if last in _PLAIN_BASES else f"!{last}" if last.isidentifier() else "?"


def _read_class_body(body: Iterable[ast.stmt], names: ClassNames, is_stub: bool, dotted: object) -> None:
    for part in body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            entry = function_entry(part, is_stub, is_method=True)
            names.members[part.name] = _merged(names.members.get(part.name, ""), entry, is_stub)
            if any(ast.unparse(decorator).endswith(".setter") for decorator in part.decorator_list):
                names.members[part.name] = "#"
        elif isinstance(part, ast.ClassDef):
            names.members[part.name] = ""
        elif isinstance(part, (ast.Assign, ast.AnnAssign)):
            for target in part.targets if isinstance(part, ast.Assign) else [part.target]:
                for node in ast.walk(target):
                    if isinstance(node, ast.Name):
                        names.members.setdefault(node.id, _made_by_call(part.value, dotted))
            if isinstance(part, ast.Assign) and ast.unparse(part.targets[0]) == "__slots__":
                slots = _value_of(part.value, {})
                names.members |= dict.fromkeys(
                    [slots] if isinstance(slots, str) else slots if isinstance(slots, list) else [], ""
                )
        elif isinstance(part, (ast.If, ast.Try, ast.With, ast.For)):
            for inner in (part.body, getattr(part, "orelse", [])):
                _read_class_body(inner, names, is_stub, dotted)
        elif isinstance(part, (ast.Import, ast.ImportFrom)):
            for alias in part.names:
                names.members[alias.asname or alias.name.partition(".")[0]] = ""


def _made_by_call(value: ast.expr | None, dotted: object) -> str:
    """The entry of a class's attribute: an instance of what is called, or a setting."""
    if not isinstance(value, ast.Call):
        return ""
    callee = dotted(value.func)  # type: ignore[operator]
    if ast.unparse(value.func).rpartition(".")[2] == "ContextProp":
        return "#"
    return f"@{callee}" if callee else ""


def _inner_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a class's body, those under an ``if`` or a ``try`` among them."""
    for part in body:
        yield part
        if isinstance(part, (ast.If, ast.Try, ast.With, ast.For)):
            yield from _inner_statements([*part.body, *getattr(part, "orelse", [])])


def _is_plain(value: ast.expr) -> bool:
    """Whether an expression is a switch, a number, a text or None."""
    if isinstance(value, ast.UnaryOp):
        value = value.operand
    return isinstance(value, ast.Constant) and (value.value is None or isinstance(value.value, (bool, int, float, str)))


def _fields(node: ast.ClassDef) -> list[str]:
    names = []
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            annotation, value = ast.unparse(part.annotation), "" if part.value is None else ast.unparse(part.value)
            if "ClassVar" not in annotation and "init=False" not in value.replace(" ", ""):
                names.append(part.target.id)
    return names


def _add_instance_names(function: ast.FunctionDef | ast.AsyncFunctionDef, members: dict[str, str]) -> None:
    """Names that a method sets on ``self`` (or ``cls``), and those it lists by ``setattr``."""
    first = function.args.args[0].arg if function.args.args else ""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", None) == first:
            members.setdefault(node.attr, "")


def function_entry(node: ast.FunctionDef | ast.AsyncFunctionDef, is_stub: bool, *, is_method: bool) -> str:
    """The entry of a function; a property is a value."""
    decorators = [ast.unparse(d.func if isinstance(d, ast.Call) else d).rpartition(".")[2] for d in node.decorator_list]
    if {"property", "cached_property", "setter", "deleter", "classproperty"} & set(decorators):
        return ""
    entry = "(" + _parameters(node.args, skip_first=is_method and "staticmethod" not in decorators, has_kinds=not is_stub)
    if node.args.kwarg is not None:
        entry = ",".join([entry, *_taken_from(node.args.kwarg.arg, node)])
    return _with_more(entry) if is_stub or not set(decorators) <= _KEEPING else entry


def _parameters(arguments: ast.arguments, *, skip_first: bool, has_kinds: bool = False) -> str:
    positional_only, positional = list(arguments.posonlyargs), list(arguments.args)
    if skip_first:
        (positional_only or positional)[:1] = []
    named = (argument.arg + (_kinds(argument.annotation) if has_kinds else "") for argument in (*positional_only, *positional))
    parts = list(named)
    if positional_only:
        parts.insert(len(positional_only), "/")
    if arguments.vararg is not None or arguments.kwonlyargs:
        parts.append("*")
    parts += [argument.arg + (_kinds(argument.annotation) if has_kinds else "") for argument in arguments.kwonlyargs]
    return ",".join([*parts, "**"] if arguments.kwarg is not None else parts)


def _kinds(annotation: ast.expr | None) -> str:
    """``:A|B`` for an annotation that is a union of plain classes; nothing where it may be anything else."""
    kinds = _members_of_union(annotation)
    return ":" + "|".join(sorted(kinds)) if kinds and all(kind in _SIMPLE_KINDS for kind in kinds) else ""


_CONTAINERS = ("list", "List", "tuple", "Tuple", "dict", "Dict", "set", "Sequence", "Iterable", "Mapping", "Collection")
_SIMPLE_KINDS = frozenset({"bool", "int", "float", "str", "None", "Tag", "dtype", "device", "Tensor", *_CONTAINERS})


def _members_of_union(node: ast.expr | None) -> set[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return _members_of_union(ast.parse(node.value, mode="eval").body)
        except SyntaxError:
            return {"?"}
    if isinstance(node, ast.BinOp):
        return _members_of_union(node.left) | _members_of_union(node.right)
    if isinstance(node, ast.Subscript):
        last = ast.unparse(node.value).rpartition(".")[2]
        if last in ("Optional", "Union"):
            parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
            inner = set().union(*(_members_of_union(part) for part in parts))
            return inner | {"None"} if last == "Optional" else inner
        return {last}
    return set() if node is None else {ast.unparse(node).rpartition(".")[2]}


def _taken_from(keywords: str, function: ast.AST) -> list[str]:
    """The names that a function takes out of its ``**keywords``: ``.pop("x")``, ``.get("x")``, ``["x"]``."""
    names: dict[str, None] = {}
    for node in ast.walk(function):
        key: ast.expr | None = None
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr in ("pop", "get")
            and node.args
        ):
            key = node.args[0] if getattr(node.func.value, "id", "") == keywords else None
        elif isinstance(node, ast.Subscript) and getattr(node.value, "id", "") == keywords:
            key = node.slice
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            names[key.value] = None
    return list(names)


def _with_more(entry: str) -> str:
    return entry if entry[1:2] in ("~", "?") else "(~" + entry[1:]


def _merged(before: str, entry: str, is_stub: bool) -> str:
    """A function's entry, with those of earlier overloads in a stub."""
    if not (is_stub and before.startswith("(") and entry.startswith("(")):
        return entry
    parts = [part for text in (before, entry) for part in text.lstrip("(~").split(",")]
    names = dict.fromkeys(part for part in parts if part not in ("", "/", "*"))
    return "(~" + ",".join(names)


# values


def _value_of(node: ast.expr, known: Mapping[str, object]) -> object:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return known.get(node.id, UNKNOWN)
    if isinstance(node, (ast.List, ast.Tuple, ast.Set)):
        return _values_of(node.elts, known)
    if isinstance(node, ast.Dict):
        keys = _values_of([key for key in node.keys if key is not None], known)
        return dict.fromkeys(key for key in keys if isinstance(key, str)) if None not in node.keys else UNKNOWN
    if isinstance(node, ast.JoinedStr):
        parts = [_value_of(p.value if isinstance(p, ast.FormattedValue) else p, known) for p in node.values]
        return "".join(map(str, parts)) if all(isinstance(part, (str, int)) for part in parts) else UNKNOWN
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = _value_of(node.left, known), _value_of(node.right, known)
        if isinstance(left, (str, list)) and isinstance(right, type(left)):
            return left + right
    if isinstance(node, ast.Call):
        return _value_of_call(node, known)
    return UNKNOWN


def _values_of(nodes: Iterable[ast.expr], known: Mapping[str, object]) -> list[object]:
    values: list[object] = []
    for node in nodes:
        value = _value_of(node.value if isinstance(node, ast.Starred) else node, known)
        if isinstance(node, ast.Starred):
            values += value if isinstance(value, list) else [UNKNOWN]
        else:
            values.append(value)
    return values


def _value_of_call(node: ast.Call, known: Mapping[str, object]) -> object:
    """``range(3)``, ``text.lower()``, ``sorted([…])``, ``{…}.keys()``; else UNKNOWN."""
    arguments = [_value_of(argument, known) for argument in node.args]
    if isinstance(node.func, ast.Name):
        if node.func.id == "range" and arguments and all(isinstance(argument, int) for argument in arguments):
            return list(range(*arguments))  # type: ignore[arg-type]
        if (
            node.func.id in ("list", "tuple", "set", "frozenset", "sorted")
            and arguments
            and isinstance(arguments[0], (list, dict))
        ):
            return list(arguments[0])
    elif isinstance(node.func, ast.Attribute):
        holder = _value_of(node.func.value, known)
        if isinstance(holder, str) and node.func.attr in ("lower", "upper", "title", "capitalize") and not arguments:
            return getattr(holder, node.func.attr)()
        if isinstance(holder, str) and node.func.attr == "split" and not arguments:
            return list(holder.split())
        if isinstance(holder, dict) and node.func.attr in ("keys", "items"):
            return [[key, UNKNOWN] for key in holder] if node.func.attr == "items" else list(holder)
    return UNKNOWN


def _unpacked(target: ast.expr, value: object) -> Iterator[tuple[str, object]] | dict[str, object]:
    if isinstance(target, ast.Name):
        return {target.id: value}
    if isinstance(target, (ast.Tuple, ast.List)):
        values = value if isinstance(value, list) and len(value) == len(target.elts) else [UNKNOWN] * len(target.elts)
        return {
            name: inner for part, content in zip(target.elts, values) for name, inner in dict(_unpacked(part, content)).items()
        }
    return {}


def _ends_in_raise(body: list[ast.stmt]) -> bool:
    last = body[-1] if body else None
    return isinstance(last, ast.Raise) or (isinstance(last, ast.If) and _ends_in_raise(last.orelse))


def _bounded_names(function: ast.FunctionDef, constants: Mapping[str, object], names: dict[str, str]) -> bool:
    """Add the names that a ``__getattr__`` answers to; False where its text does not tell them."""
    if not _ends_in_raise(function.body):
        return False
    parameter = function.args.args[-1].arg
    answers: list[object] = []
    for node in ast.walk(function):
        if isinstance(node, ast.Compare) and getattr(node.left, "id", None) == parameter:
            value = _value_of(node.comparators[0], {"__all__": list(names), **constants})
            answers += list(value) if isinstance(value, (list, dict)) else [value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".get") and node.args:
            if getattr(node.args[0], "id", None) == parameter:
                value = _value_of(node.func.value, constants)  # type: ignore[attr-defined]
                answers += list(value) if isinstance(value, (list, dict)) else [value]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in (
            "getattr",
            "super().__getattr__",
            "object.__getattribute__",
        ):
            if any(getattr(argument, "id", None) == parameter for argument in node.args):
                return False
    names.update((name, "") for name in answers if isinstance(name, str) and name not in names)
    return all(isinstance(name, str) for name in answers)
