"""The database is made from a wheel's text: what each way of making a name becomes."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from torchspan.scan._names import Names

pytestmark = pytest.mark.once
TOOLS = Path(__file__).resolve().parents[2] / "tools"

MakeDatabase = Callable[..., Names]


@pytest.fixture(scope="module")
def link() -> ModuleType:
    sys.path.insert(0, str(TOOLS))
    try:
        return importlib.import_module("_link_names")
    finally:
        sys.path.remove(str(TOOLS))


@pytest.fixture
def database_of(link: ModuleType) -> MakeDatabase:
    """The database of releases that are given as the text of their files by path."""

    def make(*releases: dict[str, str], operators: str = "", mentioned: tuple[bytes, ...] = ()) -> Names:
        texts = [*mentioned, *[b""] * len(releases)]
        wheels = [
            link.Wheel(f"2.{index}.0", {"torch/__init__.py": "", **sources}, operators, texts[index])
            for index, sources in enumerate(releases)
        ]
        read = [link.read_release(wheel) for wheel in wheels]
        link.settle_c_names(read)
        for release in read:
            link.link(release)
        link.settle_operators(read)
        link.settle_kinds(read)
        return Names(link.encode(read))

    return make


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("import os\nfrom typing import Any as A", ["os", "A"]),
        ("try:\n  import numpy\nexcept ImportError:\n  numpy = None", ["numpy"]),
        ("if x:\n  a = 1\nelse:\n  b: int = 2", ["a", "b"]),
        ("a, (b, *c) = f()\nwith f() as d: pass\nfor e in f(): g = 1", ["a", "b", "c", "d", "e", "g"]),
        ("for name in ('x', 'y'):\n  globals()[f'sym_{name}'] = 1", ["sym_x", "sym_y"]),
        ("import sys\nthis = sys.modules[__name__]\nfor name in ['x']: setattr(this, name.upper(), 1)", ["X"]),
        ("globals().update({'a': 1, 'b': 2})", ["a", "b"]),
        ("def f():\n  global made\n  made = 1", ["f", "made"]),
        ("_old = {'a': 1}\ndef __getattr__(name):\n  if name in _old: return 1\n  raise AttributeError", ["a"]),
        ("def __getattr__(name):\n  if name == 'a': return 1\n  raise AttributeError", ["a"]),
        ("from torch.other import *", ["public", "also"]),
    ],
)
def test_a_module_has_the_names_that_its_text_makes(database_of: MakeDatabase, text: str, names: list[str]) -> None:
    database = database_of(
        {"torch/m.py": text, "torch/other.py": "__all__ = ['public']\n__all__ += ['also']\npublic = also = hidden = 1"}
    )
    assert all(database.look_up(f"torch.m.{name}").mask for name in names)
    for absent in ("hidden", "absent"):
        result = database.look_up(f"torch.m.{absent}")
        assert result.mask == 0 and result.is_known


@pytest.mark.parametrize(
    "text",
    [
        "exec(code)",
        "globals()[f()] = 1",
        "from numpy import *",
        "def __getattr__(name):\n  return getattr(other, name)",
        "def __getattr__(name):\n  if name in table(): return 1\n  raise AttributeError",
        "def f(",
    ],
)
def test_a_module_whose_names_cannot_be_told_is_open(database_of: MakeDatabase, text: str) -> None:
    database = database_of({"torch/m.py": text}, {"torch/m.py": "late = 1"})
    assert not database.look_up("torch.m.absent").is_known
    assert database.look_up("torch.m.late").mask == 0b11


def test_functions_keep_their_parameters_and_changes_of_them(database_of: MakeDatabase) -> None:
    database = database_of(
        {"torch/m.py": "def f(a, /, b, *, c): ...\n@unheard_of\ndef g(a): ..."},
        {"torch/m.py": "def f(a, /, b, *, c, d): ...\n@unheard_of\ndef g(a, **k): ..."},
    )
    masks = [database.accepting("torch.m.f", keyword).mask for keyword in "abcd"]
    assert masks == [0, 0b11, 0b11, 0b10]
    assert database.accepting("torch.m.g", "z").mask == 0b10


def test_what_a_function_takes_out_of_its_keywords_is_named(database_of: MakeDatabase) -> None:
    database = database_of({"torch/m.py": "def f(**k):\n  k.pop('a', 1), k.get('b'), k['c'], k[d], other.pop('e')\n"})
    assert [name for name in "abcde" if database.accepting("torch.m.f", name, by_name=True).mask] == ["a", "b", "c"]


def test_classes_keep_members_bases_and_what_makes_them(database_of: MakeDatabase) -> None:
    database = database_of(
        {
            "torch/m.py": "from dataclasses import dataclass, field\nimport torch\n"
            "class Base:\n  def __init__(self, a): self.inside = a\n"
            "class C(Base):\n  kind = 1\n  def f(self, x): ...\n"
            "@dataclass\nclass D:\n  x: int\n  y: int = field(init=False)\n"
            "@dataclass\nclass E(D):\n  z: int = 0\n"
            "class N:\n  def __new__(cls, n): ...\n"
            "torch.other.attribute = 1\nclass Last(torch.m.Base): ...\n"
        }
    )
    assert all(database.look_up(f"torch.m.{name}").mask for name in ("C.f", "C.kind", "C.inside", "E.x", "Last.inside"))
    assert not database.look_up("torch.m.C.absent").mask
    accepted = [("C", "a"), ("D", "x"), ("E", "x"), ("E", "z"), ("N", "n"), ("Last", "a"), ("C.f", "x")]
    assert all(database.accepting(f"torch.m.{name}", keyword).mask for name, keyword in accepted)
    assert not any(
        database.accepting(f"torch.m.{name}", keyword).mask for name, keyword in [("C", "x"), ("D", "y"), ("N", "a")]
    )


def test_a_module_that_is_replaced_by_an_instance_has_the_names_of_its_class(database_of: MakeDatabase) -> None:
    database = database_of(
        {"torch/m.py": "import sys, types\nclass M(types.ModuleType):\n  flag = 1\nsys.modules[__name__] = M()\na = 1"}
    )
    assert database.look_up("torch.m.flag").mask and database.look_up("torch.m.a").mask
    assert not database.look_up("torch.m.b").mask


def test_a_redirected_module_is_the_other_one(database_of: MakeDatabase) -> None:
    database = database_of(
        {
            "torch/old/__init__.py": "import sys\nfrom importlib import import_module\n"
            "for name in ['x']:\n  sys.modules[f'torch.old.{name}'] = import_module(f'torch.new.{name}')\n",
            "torch/new/x.py": "a = 1",
        }
    )
    assert database.look_up("torch.old.x.a").mask and database.look_up("torch.old.x", is_module=True).mask


def test_a_name_that_a_stub_forgets_counts_where_the_code_mentions_it(database_of: MakeDatabase) -> None:
    stub = "torch/_C/__init__.pyi"
    late = {stub: "def early(): ...\ndef late(): ...\ndef unseen(): ..."}
    database = database_of({stub: ""}, {stub: ""}, late, mentioned=(b"other\0", b"late\0", b"late\0early\0"))
    assert database.look_up("torch._C.late").mask == 0b110
    assert database.look_up("torch._C.unseen").mask == 0b111  # no code that is here mentions it: nobody knows since when


def test_a_stub_may_be_younger_than_its_module_and_its_classes(database_of: MakeDatabase) -> None:
    stub = {"torch/_C/_sub.pyi": "class C:\n  def early(self): ...\n  def late(self): ...\n", "torch/_C/__init__.pyi": ""}
    database = database_of({"torch/_C/__init__.pyi": ""}, stub, mentioned=(b"_sub\0C\0early\0", b"_sub\0C\0early\0late\0"))
    assert database.look_up("torch._C._sub", is_module=True).mask == 0b11
    assert database.look_up("torch._C._sub.C.early").mask == 0b11


def test_operators_come_from_the_list_and_from_registrations(database_of: MakeDatabase) -> None:
    database = database_of(
        {"torch/m.py": "import torch\n@torch.library.custom_op('space::mine', mutates_args=())\ndef f(): ..."},
        {},
        operators="- func: mm.out(Tensor a) -> Tensor\n",
    )
    assert database.look_up("torch.ops.aten.mm.out").mask == 0b11
    assert database.look_up("torch.ops.space.mine").mask == 0b01
    assert not database.look_up("torch.ops.space.other").is_known


CLASSES = (
    "class Tensor:\n  def sum(self) -> 'Tensor': ...\n  @property\n  def mesh(self) -> 'Mesh | None': ...\n"
    "class Mesh:\n  size: int\n  def f(self) -> Optional[Tensor]: ...\n"
    "def init(a: Sequence[Tag] = ()) -> Mesh: ...\ndef either(a) -> Mesh | Tensor: ...\nthing = init()\n"
)


def test_what_calls_and_attributes_give_is_followed_to_its_members(database_of: MakeDatabase) -> None:
    late = CLASSES.replace("size: int\n", "size: int\n  def late(self): ...\n")
    database = database_of({"torch/m.py": CLASSES}, {"torch/m.py": late})
    for path in (
        "m.init().late",
        "m.Tensor().mesh.late",
        "m.Tensor().sum().mesh.late",
        "m.Mesh().f().mesh.late",
        "m.thing.late",
    ):
        name = database.resolve(f"torch.{path}")
        assert database.look_up_member(name).mask == 0b10, path
    assert database.resolve("torch.m.either().late") == database.resolve("torch.m.absent().late") == ""
    assert database.look_up_member("torch.m.Mesh.size").mask == 0b11


def test_a_kind_that_a_parameter_takes_later_is_kept(database_of: MakeDatabase) -> None:
    database = database_of({"torch/m.py": CLASSES}, {"torch/m.py": CLASSES.replace("Sequence[Tag]", "Tag | Sequence[Tag]")})
    masks = {kind: database.taking("torch.m.init", "a", kind) for kind in ("Tag", "list", "str")}
    assert masks == {"Tag": 0b10, "list": 0b11, "str": 0}
    assert database.accepting("torch.m.init", "a").mask == 0b11 and database.taking("torch.m.either", "a", "str") == 0b11


def test_settings_are_told_from_other_values(database_of: MakeDatabase) -> None:
    module = (
        "import sys, types\nclass ContextProp: ...\nclass One:\n  def __getattr__(self, name):\n"
        "    if name == 'mode':\n      return 1\n    else:\n      raise AttributeError(name)\n"
        "class M(types.ModuleType):\n  enabled = ContextProp(1, 2)\n  one = One()\n"
        "sys.modules[__name__] = M()\nflag = True\nother = f()\n"
    )
    database = database_of({"torch/m.py": module})
    assert [name for name in ("enabled", "flag", "other", "one") if database.is_setting(f"torch.m.{name}")] == [
        "enabled",
        "flag",
    ]
    assert database.look_up("torch.m.one.mode").mask and not database.look_up("torch.m.one.absent").mask


def test_an_enum_whose_stub_is_complete_lacks_what_its_stub_lacks(database_of: MakeDatabase) -> None:
    stub = "torch/_C/__init__.pyi"
    early, late = "class Tag(Enum):\n  core = 0\n", "class Tag(Enum):\n  core = 0\n  reduction = 1\n"
    database = database_of({stub: early}, {stub: late}, mentioned=(b"reduction\0", b"reduction\0"))
    assert database.look_up("torch._C.Tag.reduction").mask == 0b10


def test_a_member_that_no_stub_has_is_in_the_releases_whose_code_mentions_it(database_of: MakeDatabase) -> None:
    stub = {"torch/_C/__init__.pyi": "class TensorBase:\n  def is_there(self): ...\n"}
    database = database_of(stub, stub, mentioned=(b"\0is_there\0", b"\0is_there\0const_data_ptr\0"))
    assert database.look_up_member("torch._C.TensorBase.const_data_ptr").mask == 0b10
    assert database.look_up_member("torch._C.TensorBase.is_there").mask == 0b11
