"""Imports go to a lower level only, and torch's private names are imported where they may be."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "torchspan"
LEVELS = [
    {"core"},
    {"environment", "private"},
    {"backports", "devices", "capture", "passes", "models", "parallel"},
    {"artifacts", "scan", "report", "jobs", "caches"},
    {"regions"},
    {"strategies", "diagnosis"},
    {"api"},
    {"train", "auto"},
    {"cli"},
    {"__main__", "__init__"},
]
# Of torch's private modules, those that every release has and that programs use as well; the rest is for one folder.
OPEN = ("torch._tensor", "torch.utils._device", "torch.utils._pytree", "torch.utils._python_dispatch")
PRIVATE = re.compile(r"torch\.(?!__)(\w+\.)*_|torch\.fx\.experimental\b")
# A backport and a device rule name what they patch; of torch's compilers they too learn from private/ only.
PATCHING = ("backports", "devices")
COMPILERS = (
    "torch._dynamo",
    "torch._functorch",
    "torch._guards",
    "torch._higher_order_ops",
    "torch._inductor",
    "torch._subclasses",
)


def level_of(module: str) -> int:
    """The level of torchspan's folder (or top file) that a dotted module belongs to."""
    part = module.split(".")[1]
    result = next((level for level, folders in enumerate(LEVELS) if part in folders), None)
    assert result is not None, f"{module} is no folder of torchspan: inside it, import from the file that has the name"
    return result


def imports_of(tree: ast.AST, for_types: bool = False) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; those for type checkers alone only with `for_types`."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING" and not for_types
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
        elif isinstance(node, ast.Constant) and (named := re.fullmatch(r"(torchspan\.\w+\.\w+):\w+", str(node.value))):
            yield named[1]  # a function that is called by its name, as the job of another process is


def violations(path: Path, text: str) -> list[str]:
    """What the file imports that it may not."""
    here = ".".join(("torchspan", *path.relative_to(SOURCE).with_suffix("").parts))
    folder = here.split(".")[1]
    results = []
    for name in sorted(set(imports_of(ast.parse(text)))):
        is_private = name.startswith(COMPILERS) if folder in PATCHING else PRIVATE.match(name) and not name.startswith(OPEN)
        if is_private and folder != "private":
            results.append(f"{here} imports {name}: only torchspan/private/ may")
        if not name.startswith("torchspan.") or name == "torchspan.__version__":
            continue
        same_folder = name.split(".")[1] == folder
        if not same_folder and level_of(name) >= level_of(here) and here != "torchspan.__init__":
            results.append(f"{here} imports {name}, which is not below it")
        other = name.split(".")[2] if name.count(".") >= 2 else "_"
        is_plugin = not path.name.startswith("_") and folder in ("backports", "devices", "strategies")
        if same_folder and is_plugin and not other.startswith("_") and (SOURCE / folder / f"{other}.py").exists():
            results.append(f"{here} imports {name}: a plug-in imports no other plug-in")
    return results


@pytest.mark.once
@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_go_to_a_lower_level(path: Path) -> None:
    assert violations(path, path.read_text()) == []


def circles(imported: Mapping[str, set[str]]) -> list[tuple[str, ...]]:
    """Groups of modules that import each other, in one step or in several."""
    reached = {name: set(names) for name, names in imported.items()}
    for through in reached:
        for names in reached.values():
            if through in names:
                names |= reached[through]
    in_circle = {name for name, names in reached.items() if name in names}
    return sorted({tuple(sorted({name} | {o for o in in_circle & reached[name] if name in reached[o]})) for name in in_circle})


@pytest.mark.once
def test_no_modules_import_each_other() -> None:
    """Those of one folder, for type checkers and inside functions too; between folders their levels forbid it."""
    paths = {".".join(("torchspan", *path.relative_to(SOURCE).with_suffix("").parts)): path for path in SOURCE.rglob("*.py")}
    imported = {
        name: {other for other in imports_of(ast.parse(path.read_text()), for_types=True) if other in paths} - {name}
        for name, path in paths.items()
    }
    assert circles(imported) == []


@pytest.mark.once
def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set()}) == [("a", "b", "c")]


@pytest.mark.once
@pytest.mark.parametrize(
    ("place", "text"),
    [
        ("core/x.py", "from torchspan.environment.facts import Facts"),
        ("devices/x.py", "import torchspan.backports._base"),
        ("backports/x.py", "def f():\n    from torchspan.backports.annotate import BACKPORT"),
        ("artifacts/x.py", "import torch._dynamo"),
        ("capture/x.py", "from torch.fx.experimental.proxy_tensor import make_fx"),
        ("train/x.py", "from torch.distributed.tensor._dtensor_spec import DTensorSpec"),
        ("backports/x.py", "from torch._functorch import aot_autograd"),
        ("private/x.py", "import torchspan.environment.facts"),
    ],
)
def test_a_forbidden_import_is_found(place: str, text: str) -> None:
    assert len(violations(SOURCE / place, text)) >= 1
