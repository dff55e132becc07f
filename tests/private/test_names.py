"""torch's private names that torchspan uses are there in the releases that are said, and all that are used are listed."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from torchspan.private.names import PrivateName, names_in

SOURCE = Path(__file__).resolve().parents[2] / "src" / "torchspan"
PLACES = sorted(path.stem for path in (SOURCE / "private").glob("*.py") if path.stem not in ("__init__", "names"))
PRIVATE = re.compile(r"torch\.(?!__|ops\.)(?:\w+\.)*?_(?!_)|torch\.fx\.experimental\.")
# where a file is about one private name of torch, which it says itself and which has a test of its own
NOT_LISTED = ("backports", "devices", "models", "scan")


def names_of(place: str) -> tuple[PrivateName, ...]:
    """The names that a file of ``private/`` lists."""
    names: tuple[PrivateName, ...] = importlib.import_module(f"torchspan.private.{place}").NAMES
    return names


def mistakes(names: tuple[PrivateName, ...], release: str) -> list[str]:
    """What the installed torch, of that release, has and should not have, or the other way round."""
    results = []
    for name in names:
        try:
            name.find()
            is_there = True
        except (ImportError, AttributeError):
            is_there = False
        if is_there != name.is_in(release):
            listed = f"listed since {name.since or 'ever'}, until {name.until or 'now'}"
            results.append(f"torch {release} has {'' if is_there else 'no '}{name.place}, {listed}")
    return results


@pytest.mark.parametrize("place", PLACES)
def test_torch_has_each_name_in_the_releases_that_are_said(place: str) -> None:
    assert mistakes(names_of(place), torch.__version__) == []


def test_a_name_that_torch_lacks_is_told() -> None:
    names = names_in("torch._guards", "tracing", "no_such_thing") + names_in("torch._guards", "tracing", until="2.0")
    release = torch.__version__
    assert mistakes(names, release) == [
        f"torch {release} has no torch._guards:no_such_thing, listed since ever, until now",
        f"torch {release} has torch._guards:tracing, listed since ever, until 2.0",
    ]


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES)
def test_one_key_is_one_thing(place: str) -> None:
    places: dict[str, set[str]] = {}
    for name in names_of(place):
        if name.key:
            places.setdefault(name.key, set()).add(name.place.partition(f"{name.key}.")[0].partition(":")[0])
    assert {key: result for key, result in places.items() if len(result) > 1} == {}
    assert set(places) & set(vars(importlib.import_module(f"torchspan.private.{place}"))) == set()


def private_uses(tree: ast.AST) -> Iterator[str]:
    """The private names of torch that a file imports or writes out, dotted."""
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            results = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            results = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            results = [ast.unparse(node)]
        else:
            continue
        yield from (name for name in results if PRIVATE.match(name))


def is_listed(use: str, places: set[str]) -> bool:
    """Whether a dotted use is a listed name, a part of one, or something of one."""
    return any(place == use or place.startswith(f"{use}.") or use.startswith(f"{place}.") for place in places)


@pytest.mark.once
def test_every_private_name_in_use_is_listed() -> None:
    places = {name.place.replace(":", ".") for place in PLACES for name in names_of(place)}
    paths = [path for path in SOURCE.rglob("*.py") if path.relative_to(SOURCE).parts[0] not in NOT_LISTED]
    uses = {(str(path.relative_to(SOURCE)), use) for path in paths for use in private_uses(ast.parse(path.read_text()))}
    unlisted = sorted(f"{file}: {use}" for file, use in uses if not is_listed(use, places))
    assert not unlisted, "add each to NAMES in the file of src/torchspan/private for its part of torch"


@pytest.mark.once
@pytest.mark.parametrize("place", PLACES)
def test_every_listed_name_is_used(place: str) -> None:
    texts = {path: path.read_text() for path in SOURCE.rglob("*.py")}
    own = SOURCE / "private" / f"{place}.py"
    texts[own] = texts[own].replace(texts[own].partition("\nNAMES = (")[2].partition("\n)\n")[0], "")
    words = set(re.findall(r"\w+", " ".join(texts.values())))
    assert [name.place for name in names_of(place) if re.split(r"[.:]", name.place)[-1] not in words] == []


@pytest.mark.once
def test_an_attribute_of_a_file_is_a_function_of_it_or_a_listed_name() -> None:
    """``dynamo.no_such_name`` would be an error only once that line runs."""
    known = {
        place: {name.key for name in names_of(place)} | set(vars(importlib.import_module(f"torchspan.private.{place}")))
        for place in PLACES
    }
    used = []
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        imported = {
            alias.asname or alias.name
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module == "torchspan.private"
            for alias in node.names
        }
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in imported:
                used.append((path.name, node.value.id, node.attr))
    assert [use for use in used if use[2] not in known[use[1]]] == []
