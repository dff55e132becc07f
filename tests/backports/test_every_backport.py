"""What holds for every file in the folder, on the day that it is added."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import warnings
from functools import reduce
from typing import Any

import pytest
import torch

from torchspan.backports._base import INDEX, REGISTRY, Backport, index_entry, is_lacking, status
from torchspan.core.report import Report, reporting
from torchspan.environment.patch import MissingModule, MissingName, Replacement
from torchspan.environment.scope import Environment
from torchspan.scan._names import Names

NAMES = REGISTRY.names()
TAKEN_AWAY = {"opaque_object": {"OpaqueBase", "OpaqueBaseMeta", "__getattr__"}}
"""Names of older torch that the newest has no more: there they are provided, too, by the module's ``__getattr__``."""


WHOLE = ("2.8.", "2.13.", "2.15.")
"""Releases that have what they have in its last form; tests/backports/first_forms.txt is of the others."""
OPEN = ("torch._dynamo.decorators.override_optimization_hint",)
"""Names of modules that make names at run time: the database cannot tell which releases lack them."""


def backport_of(name: str) -> Backport:
    return REGISTRY.get(name).BACKPORT


def holders(backport: Backport) -> dict[str, Any]:
    """Every module and class that the backport may change, imported."""
    results: dict[str, Any] = {}
    for patch in backport.patches():
        if isinstance(patch, MissingModule) or not is_importable(patch.target):
            continue
        module = results[patch.target] = importlib.import_module(patch.target)
        if isinstance(patch, Replacement) and "." in patch.attribute:
            path = patch.attribute.split(".")[:-1]
            results[f"{patch.target}.{'.'.join(path)}"] = reduce(lambda holder, part: getattr(holder, part, None), path, module)
    return {name: holder for name, holder in results.items() if holder is not None}


def is_importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # nor the package that it would be in
        return False
    except ValueError:  # an object stands in its place in sys.modules, without a spec
        return True


def use(backport: Backport) -> None:
    """Look every name up, as a program that uses it does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer torch warns of what it is going to drop
        for attribute in backport.names:
            assert getattr(importlib.import_module(backport.target), attribute) is not None


@pytest.mark.parametrize("name", NAMES)
def test_a_backport_says_what_it_is(name: str) -> None:
    backport = backport_of(name)
    assert backport.name == name
    assert backport.upstream.startswith("https://")
    assert backport.summary and backport.differs
    assert backport.since or "no torch has" in backport.differs
    assert backport.names or backport.replaces or backport.redefines or backport.also


@pytest.mark.once
def test_a_name_says_which_releases_of_torch_have_it() -> None:
    """Held to the database of names, which is read off the releases themselves."""
    database, wrong = Names.load(), []
    for backport in map(backport_of, NAMES):
        for place, names in {backport.target: backport.names, **backport.elsewhere}.items():
            for name in names:
                mask = database.look_up(f"{place}.{name}").mask
                has = [minor for index, minor in enumerate(database.minors) if mask >> index & 1]
                first, _, last = backport.period_of(place, name).partition(" to ")
                expected = (first.rpartition(".")[0] if first.count(".") == 2 else first, last or database.minors[-1])
                if has and (has[0], has[-1]) != expected and f"{place}.{name}" not in OPEN:
                    wrong.append(f"{backport.name}: {place}.{name} is in torch {has[0]} to {has[-1]}")
    assert not wrong


@pytest.mark.once
def test_a_first_form_says_what_it_does_otherwise(skipped_first_forms: list[tuple[list[str], str, str]]) -> None:
    for releases, test, name in skipped_first_forms:
        assert all(backport_of(name).first_form(f"{release}.0") for release in releases), test


@pytest.mark.once
def test_of_a_first_form_it_says_what_this_torch_has_and_what_it_lacks() -> None:
    names = {"nn": object, "_b": object}
    backport = Backport("a", "a", "torch", "2.6.0", came={"99.0.0": ("_b",)}, is_module=True, names=names)
    assert status(backport) == (
        "backported",
        f"torch {torch.__version__} has a first form of it, since 2.6.0, without _b (since 99.0.0)",
    )
    reasons = {patch.attribute: patch.reason for patch in backport.patches() if isinstance(patch, MissingName)}
    assert reasons == {"nn": "torch has it since 2.6.0", "_b": "torch has it since 99.0.0"}
    whole = Backport("a", "a", "torch", "2.6.0", names={"nn": object})
    assert status(whole) == ("native", f"torch {torch.__version__} has it (since 2.6.0)")
    minor = ".".join(torch.__version__.split(".")[:2])
    first = Backport("a", "a", "torch", "2.6.0", first_forms={minor: "takes no x"}, names={"nn": object})
    assert status(first) == ("native", f"torch {torch.__version__} has a first form of it, since 2.6.0: takes no x")
    report = Report()
    with reporting(report):
        first.record_use("nn(x=1)")
    assert [decision.reason for decision in report.decisions] == [
        f"what torch {torch.__version__} has is a first form: takes no x"
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_index_lists_what_it_changes_and_provides(name: str) -> None:
    listed = json.loads(INDEX.read_text())
    assert listed.get(name) == index_entry(backport_of(name)), "run tools/make_backport_index.py"
    assert set(listed) <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_undo_after_use_restores_the_identity_of_all_that_was_there(name: str) -> None:
    backport = backport_of(name)
    targets = holders(backport)
    before = {place: dict(vars(holder)) for place, holder in targets.items()}
    was_importable = is_importable(backport.target)
    for _ in range(2):
        with Environment(backport.patches()):
            use(backport)
        for place, holder in targets.items():
            now = dict(vars(holder))
            assert now.keys() == before[place].keys(), place
            assert all(now[key] is value for key, value in before[place].items()), place
        assert is_importable(backport.target) == was_importable
        assert was_importable or backport.target not in sys.modules


@pytest.mark.parametrize("name", NAMES)
def test_where_torch_has_it_nothing_changes_and_nothing_is_reported(name: str) -> None:
    backport = backport_of(name)
    if is_lacking(backport):
        pytest.skip("this torch lacks it")
    older = TAKEN_AWAY.get(name, set())
    completed = set()
    if not torch.__version__.startswith(WHOLE):  # what such a release has in a first form is completed
        older = older | {"__getattr__", *backport.names, *(key for names in backport.elsewhere.values() for key in names)}
        completed = {change.attribute.rpartition(".")[2] for change in backport.also if change.always}
    targets = holders(backport)
    before = {place: dict(vars(holder)) for place, holder in targets.items()}
    with Environment(backport.patches()) as environment:
        use(backport)
        for place, holder in targets.items():
            unchanged = before[place].keys() - completed
            assert all(vars(holder)[key] is before[place][key] for key in unchanged), place
            assert vars(holder).keys() - before[place].keys() <= older, place
        subjects = {decision.subject.rpartition(".")[2] for decision in environment.report.decisions}
        assert subjects <= older


@pytest.mark.parametrize("name", NAMES)
def test_the_status_is_the_same_before_during_and_after(name: str) -> None:
    backport = backport_of(name)
    before = status(backport)
    assert before[0] in ("native", "backported", "not possible here") and before[1]
    with Environment(backport.patches()):
        assert status(backport) == before
        use(backport)
        assert status(backport) == before
    assert status(backport) == before


def test_activating_and_asking_for_the_status_imports_no_compiler(run_python) -> None:
    run_python(
        """
        import sys
        from torchspan.backports._base import all_backports, status
        from torchspan.environment.scope import Environment
        backports = all_backports()
        compilers = ("torch._dynamo.convert_frame", "torch._inductor.compile_fx", "torch._functorch.aot_autograd")
        with Environment([patch for backport in backports for patch in backport.patches()]):
            loaded = [name for name in compilers if name in sys.modules]
            assert not loaded, f"activating imported {loaded}"
        """
    )
