"""What an error says that a program missed of torch, and the line that tells it: since which release, and what to do.

What was missed becomes a use as the scan reads it, and the scan's own judge judges it: so the two cannot disagree.
"""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import linecache
import re
import sys
from collections.abc import Iterator
from functools import cache
from types import FrameType, ModuleType, TracebackType

from torchspan.scan._judge import Judge, Judged, says
from torchspan.scan._names import Names
from torchspan.scan._paths import is_torch
from torchspan.scan._uses import Use, read_uses

_MODULE_LACKS = re.compile(r"module '(torch[\w.]*)' has no attribute '(\w+)'")
_OPTION_LACKS = re.compile(r"^(torch[\w.]+) does not exist$")
_IMPORT_LACKS = re.compile(r"cannot import name '(\w+)' from (?:partially initialized module )?'(torch[\w.]*)'")
_KEYWORD = re.compile(r"([\w.<>]+)\(\) got an unexpected keyword argument '(\w+)'")
_OPTION_OF_COMPILE = re.compile(r"^Unexpected optimization option ([\w.]+),")
_OWN = ("torch.", "torchspan.")


def advice(error: BaseException) -> str | None:
    """One line about what `error`, or what it was raised from, missed of torch; None where this torch misses nothing.

    >>> import torch
    >>> try:
    ...     torch.no_such_name
    ... except AttributeError as error:
    ...     print(advice(error))
    torchspan: torch.no_such_name is in no torch release that torchspan knows, 2.6 to 2.15
    """
    release = _release()
    if release is None:
        return None
    judge = _judge()
    here = 1 << judge.names.minors.index(release)
    for cause in _causes(error):
        for use in missed(cause):
            judged = judge.judge(use)
            if judged is not None and not judged.has & here:
                return f"torchspan: {tell(judge, judged, use, here)}"
    return None


def tell(judge: Judge, judged: Judged, use: Use, here: int) -> str:
    """What is known of a name that the torch of the mask `here` lacks: since when there is one, and what to do."""
    names = judge.names
    if not judged.has and not judged.provided:
        return f"{judged.name} is in no torch release that torchspan knows, {names.minors[0]} to {names.minors[-1]}"
    text = f"{judged.name} {says(names, judged, here)}; this is torch {names.text(here)}"
    if judged.provided & here and judged.backport is not None:
        name = judged.backport.backport
        return f"{text}: it is switched off, or what was asked of it is beyond it; 'torchspan doctor {name}' says what it does"
    if "write " in text:
        return text
    parts = [_what_to_write(judge, judged, use)]
    parts.append("torchspan.register_backport() takes one of your own; to ask for one, file an issue with this line")
    return f"{text}: {'; '.join(parts)}"


def _what_to_write(judge: Judge, judged: Judged, use: Use) -> str:
    newest = judge.names.minors[-1]
    since = next(minor for index, minor in enumerate(judge.names.minors) if judged.has >> index & 1) if judged.has else newest
    is_gone = judged.has and not judged.has >> (len(judge.names.minors) - 1) & 1
    require = f"require torch<={judge.names.minors[judged.has.bit_length() - 1]}" if is_gone else f"require torch>={since}"
    if use.keyword:
        return f"{require}, or leave {use.keyword}= out on older ones"
    owner, _, last = judged.name.rpartition(".")
    return f"{require}, or ask first: hasattr({owner}, {last!r})"


# what was missed


def missed(error: BaseException) -> Iterator[Use]:
    """What `error` may say that a program missed of torch, the surest first."""
    text = str(error)
    if isinstance(error, ModuleNotFoundError):
        if error.name and is_torch(error.name):
            yield Use(0, error.name, "module")
    elif isinstance(error, ImportError):
        for name, module in _IMPORT_LACKS.findall(text):
            yield Use(0, f"{module}.{name}", "name")
    elif isinstance(error, AttributeError):
        yield from _missed_attribute(error, text)
        if _may_be_torchs(error.obj, text):
            yield from (use for use in _uses_at(error) if use.name.rpartition(".")[2] in re.findall(r"\w+", text))
    elif isinstance(error, TypeError):
        match = _KEYWORD.search(text)
        if match is not None:
            yield from _missed_keyword(error, *match.groups())
        yield from (use for use in _uses_at(error) if use.keyword and (match is None or use.keyword == match.group(2)))
    for option in _OPTION_OF_COMPILE.findall(text):
        yield Use(0, f"torch._inductor.config.{option}", "name")


def _missed_attribute(error: AttributeError, text: str) -> Iterator[Use]:
    holder, name = error.obj, error.name
    if isinstance(name, str) and isinstance(holder, ModuleType) and is_torch(holder.__name__):
        yield Use(0, f"{holder.__name__}.{name}", "name")
    elif isinstance(name, str) and isinstance(holder, type) and is_torch(holder.__module__):
        yield Use(0, f"{holder.__module__}.{holder.__qualname__}.{name}", "name")
    elif isinstance(name, str) and type(holder).__name__ == "_OpNamespace":
        yield Use(0, f"torch.ops.{getattr(holder, 'name', '')}.{name}", "name")
    elif isinstance(name, str) and holder is not None:
        kind = next((kind for kind in type(holder).__mro__ if is_torch(kind.__module__)), None)
        if kind is not None:
            yield Use(0, f"{kind.__module__}.{kind.__qualname__}().{name}", "member")
    for module, attribute in _MODULE_LACKS.findall(text):
        yield Use(0, f"{module}.{attribute}", "name")
    for option in _OPTION_LACKS.findall(text):
        yield Use(0, option, "name")


def _may_be_torchs(holder: object, text: str) -> bool:
    """Whether what lacks an attribute is torch's, or a stand-in of torchspan's, or not known."""
    if holder is None:
        return "'NoneType'" not in text
    place = holder.__name__ if isinstance(holder, ModuleType) else getattr(holder, "__module__", type(holder).__module__)
    return is_torch(place or "") or (place or "").startswith("torchspan.")


def _missed_keyword(error: TypeError, called: str, keyword: str) -> Iterator[Use]:
    """The function of torch that was called where the error was raised: what the expressions there are, in that frame."""
    for frame, line in _frames(error):
        for call in (node for node in ast.walk(_statement(frame.f_code.co_filename, line)) if isinstance(node, ast.Call)):
            for function in _functions(_value(call.func, frame)):
                place, name = getattr(function, "__module__", None) or "", getattr(function, "__qualname__", "")
                if name == called and is_torch(place):
                    yield Use(0, f"{place}.{name.removesuffix('.__init__')}", "keyword", keyword)


def _functions(value: object) -> Iterator[object]:
    """The functions that a call of `value` may run."""
    value = inspect.unwrap(value) if callable(value) else value
    yield getattr(value, "__func__", value)
    for kind in value.__mro__ if isinstance(value, type) else ():
        yield from (vars(kind)[name] for name in ("__init__", "__new__") if name in vars(kind))


def _value(node: ast.expr, frame: FrameType) -> object:
    """What a name, or an attribute of one, stands for in a frame; None for anything else."""
    if isinstance(node, ast.Name):
        return {**frame.f_builtins, **frame.f_globals, **frame.f_locals}.get(node.id)
    if isinstance(node, ast.Attribute):
        return inspect.getattr_static(_value(node.value, frame), node.attr, None)
    if isinstance(node, ast.Call) and ast.unparse(node) == "super()":
        kind = frame.f_locals.get("__class__")
        return kind.__mro__[1] if isinstance(kind, type) else None
    return None


def _uses_at(error: BaseException) -> Iterator[Use]:
    """What the scan finds in the statements of the program that the error went through, the innermost first."""
    for frame, line in _frames(error):
        module = frame.f_globals.get("__name__") or ""
        if module == "torch" or module.startswith(_OWN):
            continue
        statement = _statement(frame.f_code.co_filename, line)
        first, last = getattr(statement, "lineno", line), _last_line(statement, line)
        yield from (use for use in _uses_in(frame.f_code.co_filename) if first <= use.line <= last)


def _frames(error: BaseException) -> list[tuple[FrameType, int]]:
    trace: TracebackType | None = error.__traceback__
    frames = []
    while trace is not None:
        frames.append((trace.tb_frame, trace.tb_lineno))
        trace = trace.tb_next
    return frames[::-1]


@cache
def _tree(file: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except (SyntaxError, ValueError):  # no Python source: of a template, a notebook's cell
        return ast.Module([], [])


@cache
def _uses_in(file: str) -> tuple[Use, ...]:
    _tree(file)
    try:
        return read_uses("".join(linecache.getlines(file)), _judge().names.members_of_tensors_alone).uses
    except (SyntaxError, ValueError):
        return ()


def _statement(file: str, line: int) -> ast.AST:
    """The innermost statement of `file` that `line` belongs to."""
    statements = [
        node for node in ast.walk(_tree(file)) if isinstance(node, ast.stmt) and node.lineno <= line <= (node.end_lineno or 0)
    ]
    return min(statements, key=lambda node: (node.end_lineno or 0) - node.lineno, default=ast.Module([], []))


def _last_line(statement: ast.AST, line: int) -> int:
    """The last line of a statement, without the block in it."""
    body = getattr(statement, "body", None)
    return body[0].lineno - 1 if isinstance(body, list) and body else getattr(statement, "end_lineno", line)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what its traceback shows above it."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)


@cache
def _judge() -> Judge:
    return Judge(Names.load())


def _release() -> str | None:
    """The release of the torch that is here, if the database knows it."""
    torch = sys.modules.get("torch")
    version = getattr(torch, "__version__", None) or importlib.metadata.version("torch")
    minor = ".".join(str(version).split(".")[:2])
    return minor if minor in _judge().names.minors else None
