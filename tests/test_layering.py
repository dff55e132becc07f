"""Imports go to a lower level only, and torch's private names are imported where they may be."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "torchspan"
LEVELS = [
    {"core"},
    {"environment"},
    {"backports", "devices", "capture", "passes", "models", "parallel"},
    {"artifacts", "scan", "report"},
    {"strategies"},
    {"api", "simulate"},
    {"train", "auto"},
    {"cli"},
    {"__main__", "__init__"},
]
PRIVATE_ALLOWED = {"backports", "capture", "passes", "strategies", "artifacts"}
PRIVATE = (
    "torch._dynamo",
    "torch._functorch",
    "torch._inductor",
    "torch._guards",
    "torch._subclasses",
    "torch._higher_order_ops",
)


def level_of(module: str) -> int:
    """The level of torchspan's folder (or top file) that a dotted module belongs to."""
    part = module.split(".")[1]
    return next(level for level, folders in enumerate(LEVELS) if part in folders)


def imports_of(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; what only type checkers see does not count."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(path: Path, text: str) -> list[str]:
    """What the file imports that it may not."""
    here = ".".join(("torchspan", *path.relative_to(SOURCE).with_suffix("").parts))
    folder = here.split(".")[1]
    found = []
    for name in sorted(set(imports_of(ast.parse(text)))):
        if name.startswith(PRIVATE) and not (folder in PRIVATE_ALLOWED and path.name == "_torch.py"):
            found.append(f"{here} imports {name}: only a folder's _torch.py may, in {sorted(PRIVATE_ALLOWED)}")
        if not name.startswith("torchspan.") or name == "torchspan.__version__":
            continue
        same_folder = name.split(".")[1] == folder
        if not same_folder and level_of(name) >= level_of(here) and here != "torchspan.__init__":
            found.append(f"{here} imports {name}, which is not below it")
        other = name.split(".")[2] if name.count(".") >= 2 else "_"
        is_plugin = not path.name.startswith("_") and folder in ("backports", "devices", "strategies")
        if same_folder and is_plugin and not other.startswith("_") and (SOURCE / folder / f"{other}.py").exists():
            found.append(f"{here} imports {name}: a plug-in imports no other plug-in")
    return found


@pytest.mark.once
@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_to_a_lower_level(path: Path) -> None:
    assert violations(path, path.read_text()) == []


@pytest.mark.once
@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("core/x.py", "from torchspan.environment.facts import Facts"),
        ("devices/x.py", "import torchspan.backports._base"),
        ("backports/x.py", "def f():\n    from torchspan.backports.annotate import BACKPORT"),
        ("artifacts/x.py", "import torch._dynamo"),
        ("train/_torch.py", "from torch._functorch import aot_autograd"),
    ],
)
def test_a_forbidden_import_is_found(place: str, text: str) -> None:
    assert len(violations(SOURCE / place, text)) >= 1
