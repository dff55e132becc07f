"""A whole program made portable: each statement that has a portable form replaced by it, the others named."""

from __future__ import annotations

import ast
import difflib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torchspan.core.errors import InputError
from torchspan.core.report import Report
from torchspan.report._page import File, Run, Statement, absolute, make_page
from torchspan.report._source import Source


@dataclass(frozen=True)
class Ported:
    """One file of a program with every statement replaced that has a portable form. `left` is what is to be done by hand."""

    path: Path
    name: str
    before: str
    text: str
    num_replaced: int
    left: Sequence[Statement]

    @property
    def is_changed(self) -> bool:
        """Whether any line is another."""
        return self.text != self.before

    @cached_property
    def diff(self) -> str:
        """What was changed, as a unified diff that ``git apply`` takes."""
        before, after = self.before.splitlines(keepends=True), self.text.splitlines(keepends=True)
        lines = difflib.unified_diff(before, after, f"a/{self.name}", f"b/{self.name}")
        return "".join(line if line.endswith("\n") else f"{line}\n\\ No newline at end of file\n" for line in lines)


def port_program(script: Path) -> list[Ported]:
    """The script, and the modules beside it that it imports, made portable; nothing of them is run.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     script = Path(folder, "train.py")
    ...     _ = script.write_text('import torch\\nx = torch.ones(1, device="cuda")\\n')
    ...     print(port_program(script)[0].text)
    import torch
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    x = torch.ones(1, device=device)
    <BLANKLINE>
    """
    folder = str(script.absolute().parent)
    page = make_page(Report(), Run(folder=folder), [str(path) for path in own_files(script)])
    return _ported(script, page.files)


def port_program_as_run(script: Path, report: Path) -> list[Ported]:
    """The same with what the migration report (JSON) of a run knows besides: what was asked for by number, what was loaded."""
    values = json.loads(report.read_text("utf-8"))
    names = ("first", "last", "source", "portable", "notes", "is_partial", "work")
    files = [
        File(
            file["path"],
            file["name"],
            [Statement(**{name: statement[name] for name in names}) for statement in file["statements"]],
            file["header"],
            file["is_installed"],
        )
        for file in values["files"]
    ]
    return _ported(script, files)


def _ported(script: Path, files: Sequence[File]) -> list[Ported]:
    """The files under the script's folder, the script first; it is there although there may be nothing to port in it."""
    path = Path(absolute(str(script), os.getcwd()))
    own = {Path(f.path): f for f in files if not f.is_installed and Path(f.path).is_relative_to(path.parent)}
    own = {path: own.pop(path, File(str(path), script.name, ()))} | own
    return [_ported_file(file, each.relative_to(path.parent)) for each, file in own.items()]


def _ported_file(file: File, name: Path) -> Ported:
    source = Source(file.path)
    if source.tree is None:
        raise InputError(f"{file.path!r} is no Python that this Python reads; expected a program to port")
    lines = list(source.lines)
    replaced = [statement for statement in file.statements if statement.work == "replace"]
    texts = [(statement.first, statement.last, statement.portable or "") for statement in replaced]
    if replaced and file.header:
        place = _place_of_header(source.tree)
        texts.append((place + 1, place, file.header))
    for first, last, text in sorted(texts, reverse=True):
        lines[first - 1 : last] = text.split("\n")
    left = [statement for statement in file.statements if statement.work == "by hand"]
    return Ported(Path(file.path), name.as_posix(), source.text, "\n".join(lines), len(replaced), left)


def _place_of_header(tree: ast.Module) -> int:
    """The line after which ``device = …`` is put: the first imports that have torch, or all that stand at the top."""
    body = tree.body
    first = next((place for place, node in enumerate(body) if _imports_torch(node)), None)
    if first is None:
        is_top = [isinstance(node, (ast.Import, ast.ImportFrom)) or _is_text(node) for node in body]
        first = next((place for place, is_import in enumerate(is_top) if not is_import), len(body)) - 1
    while first + 1 < len(body) and isinstance(body[first + 1], (ast.Import, ast.ImportFrom)):
        first += 1
    return (body[first].end_lineno or 0) if first >= 0 else 0


def _imports_torch(node: ast.stmt) -> bool:
    inner = ast.walk(node) if isinstance(node, (ast.Import, ast.Try, ast.If)) else ()
    aliases = [alias for each in inner if isinstance(each, ast.Import) for alias in each.names]
    return any((alias.asname or alias.name.partition(".")[0]) == "torch" for alias in aliases)


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def own_files(script: Path) -> list[Path]:
    """The script and every module under its folder that it imports, or one of those does; nothing is run."""
    root = script.absolute().parent
    files, waiting = [], [script.absolute()]
    while waiting:
        path = waiting.pop(0)
        if path in files:
            continue
        files.append(path)
        tree = Source(str(path)).tree
        for node in ast.walk(tree) if tree is not None else ():
            waiting += _files_of(node, path, root)
    return files


def _files_of(node: ast.AST, path: Path, root: Path) -> Iterator[Path]:
    """The files that an import may mean, of those that are there."""
    if isinstance(node, ast.Import):
        places = [root / Path(*alias.name.split(".")) for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        base = path.parents[node.level - 1] if node.level else root
        module = base / Path(*(node.module or "").split("."))
        places = [module, *(module / alias.name for alias in node.names)]
    else:
        return
    for place in places:
        inside = [parent / "__init__.py" for parent in place.parents if parent.is_relative_to(root) and parent != root]
        for file in (place.with_suffix(".py"), place / "__init__.py", *inside):
            if file.is_file():
                yield file


def write_ported(ported: Sequence[Ported], output: Path) -> list[Path]:
    """Write the ported script to the file `output`, or every file that was changed under the folder `output`.

    Raises:
        InputError: there is no such folder, or a file of the program itself would be written over.
    """
    is_file = output.suffix == ".py"
    places = {output: ported[0]} if is_file else {output / each.name: each for each in ported if each.is_changed}
    if is_file and not output.absolute().parent.is_dir():
        raise InputError(f"there is no folder {str(output.parent)!r} to write {output.name!r} to")
    for place, each in places.items():
        if place.absolute() == each.path or (place.exists() and place.samefile(each.path)):
            raise InputError(f"{str(place)!r} is the program itself; expected another file or folder for the ported one")
    for place, each in places.items():
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(each.text, encoding="utf-8", errors="surrogateescape")
    return list(places)
