"""What is read from the backports' files is what they provide."""

from __future__ import annotations

import pytest

from torchspan.backports._base import REGISTRY, Backport
from torchspan.environment.patch import MissingModule
from torchspan.scan._coverage import Provided, imported, provided, read_backport

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def read() -> dict[str, Provided]:
    return {entry.backport: entry for entry in provided()}


@pytest.mark.parametrize("name", REGISTRY.names())
def test_a_backport_is_read_as_it_declares_itself(read: dict[str, Provided], name: str) -> None:
    entry = read[name] if read[name].is_read else imported(read[name])
    backport: Backport = REGISTRY.get(name).BACKPORT
    assert {f"{backport.target}.{attribute}" for attribute in backport.names} <= entry.names
    for patch in backport.patches():
        if isinstance(patch, MissingModule):
            assert patch.target in entry.modules
        else:
            assert f"{patch.target}.{patch.attribute}" in entry.names | entry.changed


def test_most_backports_are_read_without_an_import(read: dict[str, Provided]) -> None:
    assert sum(entry.is_read for entry in read.values()) > 0.8 * len(read)


@pytest.mark.parametrize(
    "text",
    [
        'BACKPORT = Backport(name="x", target=elsewhere.PLACE, names={"y": f})',
        'BACKPORT = Backport(name="x", target="torch.x", names={name: f for name in elsewhere.NAMES})',
        'BACKPORT = Backport(name="x", target="torch.x", names={"y": f}, also=elsewhere.changes())',
        'BACKPORT = Backport(name="x", target="torch.x", names={"y": f}, also=(Change(elsewhere.PLACE, "z", f),))',
    ],
)
def test_what_is_not_understood_is_imported(text: str) -> None:
    assert not read_backport("x", text).is_read


def test_a_backport_that_is_not_possible_says_why() -> None:
    text = 'BACKPORT = Backport(name="x", target="torch.x", names={"y": f}, impossible=REASON)\n'
    assert read_backport("x", text.replace("REASON", "lambda: 'no operator'")).impossible == "no operator"
    assert read_backport("x", text.replace("REASON", "asks")).impossible.startswith("it depends")
    assert read_backport("x", text.replace(", impossible=REASON", "")).impossible == ""


def test_a_single_name_may_be_refused() -> None:
    names = '{"y": f, "z": lambda: unavailable("torch.x.z", "no pass", "2.10")}'
    entry = read_backport("x", f'BACKPORT = Backport(name="x", target="torch.x", names={names})\n')
    assert (entry.refuses("torch.x.y"), entry.refuses("torch.x.z")) == ("", "no pass")


def test_arguments_and_members_of_what_is_changed_are_covered_where_the_code_names_them() -> None:
    entry = read_backport(
        "x",
        '_PLACE = "torch.x"\n'
        "def _with(old):\n"
        "  def f(a, *, new): ...\n"
        'BACKPORT = Backport(name="x", target=_PLACE, replaces={"f": _with, "C.__init__": _with})\n',
    )
    assert entry.covers_keyword("torch.x.f", "new") and entry.covers_keyword("torch.x.C", "new")
    assert not entry.covers_keyword("torch.x.f", "other") and not entry.covers_keyword("torch.x.g", "new")
