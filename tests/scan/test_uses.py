"""What a file is read to use of torch, and what counts as asking first."""

from __future__ import annotations

import textwrap

import pytest

from torchspan.scan._uses import read_uses


def needs(program: str) -> list[tuple[int, str]]:
    """Line and name of each unguarded use."""
    return [(use.line, use.name + use.keyword) for use in read_uses(textwrap.dedent(program)).uses if not use.guard]


def guards(program: str) -> dict[str, str]:
    """Each guarded name, and by what it is guarded."""
    return {use.name + use.keyword: use.guard for use in read_uses(textwrap.dedent(program)).uses if use.guard}


@pytest.mark.parametrize(
    ("program", "names"),
    [
        ("import torch.nn.functional as F\nF.relu(x)", ["torch.nn.functional", "torch.nn.functional.relu"]),
        ("from torch import nn as n\nn.Linear", ["torch.nn", "torch.nn.Linear"]),
        (
            "import torch\nt = torch.nn\nu = t.functional\nu.relu",
            ["torch", "torch.nn", "torch.nn.functional", "torch.nn.functional.relu"],
        ),
        ("import torch\nclass A(torch.nn.Module): pass", ["torch", "torch.nn.Module"]),
        ("import torch\n[torch.a for x in torch.b if torch.c]", ["torch", "torch.b", "torch.c", "torch.a"]),
        ("import torch\nf'{torch.a.b}'", ["torch", "torch.a.b"]),
        ("from torch.a import *", ["torch.a"]),
        ("import importlib\nimportlib.import_module('torch.a')", ["torch.a"]),
        ("import torch\ngetattr(torch.a, 'b')", ["torch", "torch.a.b", "torch.a"]),
        ("import torch\ntorch.f(x, k=1)", ["torch", "torch.f", "torch.fk"]),
        ("import torch, functools\nfunctools.partial(torch.f, k=1)", ["torch", "torch.fk", "torch.f"]),
        (
            "import torch\ntorch.compile(f, options={'o.p': 1})",
            ["torch", "torch.compile", "torch.compileoptions", "torch._inductor.config.o.p"],
        ),
        ("import torch\nx: torch.a = torch.b", ["torch", "torch.a", "torch.b"]),
    ],
)  # fmt: skip
def test_names_are_followed_through_imports_and_aliases(program: str, names: list[str]) -> None:
    assert [name for _, name in needs(program)] == names


@pytest.mark.parametrize(
    "program",
    [
        "from . import torch\ntorch.a",
        "from .torch import a",
        "import torchvision\ntorchvision.a",
        "def f(torch):\n  return torch.a",
        "lambda torch: torch.a",
        "for torch in x: torch.a",
        "[torch.a for torch in x]",
        "with open() as torch: torch.a",
        "def torch(): pass\ntorch.a",
        "if (torch := f()): torch.a",
        "x = torch.a",
        "import json\njson.torch.a",
        "match x:\n  case {'a': torch}: torch.a",
    ],
)
def test_names_of_others_are_no_use_of_torch(program: str) -> None:
    assert needs(program) == []


def test_a_name_that_may_be_something_else_is_not_followed() -> None:
    assert needs("import torch\nm = torch.nn\nif x:\n  m = y\nm.a") == [(1, "torch"), (2, "torch.nn")]
    assert needs("import torch\nclass A:\n  torch = None\n  def f(self):\n    torch.a") == [(1, "torch"), (5, "torch.a")]


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("try:\n  from torch.a import b\nexcept ImportError:\n  b = None", "torch.a.b"),
        ("try:\n  import torch.a\nexcept (ValueError, ModuleNotFoundError):\n  pass", "torch.a"),
        ("import torch\ntry:\n  torch.a\nexcept AttributeError:\n  pass", "torch.a"),
        ("import torch\ntry:\n  torch.f(k=1)\nexcept TypeError:\n  torch.f()", "torch.fk"),
        ("import torch\nif hasattr(torch, 'a'):\n  torch.a", "torch.a"),
        ("import torch\nx = torch.a if hasattr(torch, 'a') else None", "torch.a"),
        ("import torch\nx = hasattr(torch, 'a') and torch.a()", "torch.a"),
        ("import torch\nx = getattr(torch, 'a', None)", "torch.a"),
        ("import torch\ndef f():\n  if not hasattr(torch, 'a'):\n    return\n  torch.a", "torch.a"),
        ("import torch\nif torch.__version__ >= '2.9':\n  torch.a\nelse:\n  pass", "torch.a"),
        (
            "import torch\nfrom packaging.version import parse\nif parse(torch.__version__) < parse('2.9'):\n"
            "  pass\nelse:\n  torch.a",
            "torch.a",
        ),
        (
            "import torch\ndef f():\n  with g():\n    from torch.l import L\n    ok = any(x == 'a' for x in fields(L))\n"
            "    if ok:\n      torch.a",
            "torch.a",
        ),
        ("import torch\ndef f():\n  assert hasattr(torch, 'a')\n  torch.a", "torch.a"),
        ("import torch\ndef f():\n  ok = hasattr(torch, 'a')\n  if ok:\n    torch.a", "torch.a"),
        (
            "import torch\nclass A:\n  def ok(self):\n    return torch.__version__ > '2.9'\n"
            "  def f(self):\n    if self.ok():\n      torch.a",
            "torch.a",
        ),
        ("import torch\nHAS = hasattr(torch, 'a')\nif HAS:\n  torch.a", "torch.a"),
        ("import torch\ntry:\n  import torch.a\n  ok = True\nexcept ImportError:\n  ok = False\nif ok:\n  torch.b", "torch.b"),
        (
            "import torch\ndef ok():\n  try:\n    import torch.a\n    return True\n  except ImportError:\n"
            "    return False\nif ok():\n  torch.b",
            "torch.b",
        ),
        (
            "from x import is_torch_greater_or_equal as g, is_torch_greater_or_equal\nimport torch\n"
            "if is_torch_greater_or_equal('2.9'):\n  torch.a",
            "torch.a",
        ),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  from torch.a import b", "torch.a.b"),
        ("try:\n  from torch import a\nexcept ImportError:\n  print()\na.b", "torch.a.b"),
        ("import torch, contextlib\nwith contextlib.suppress(AttributeError):\n  torch.a", "torch.a"),
        ("import torch, pytest\n@pytest.mark.skipif(torch.__version__ < '2.9', reason='')\ndef f():\n  torch.a", "torch.a"),
        ("import torch, inspect\nif 'k' in inspect.signature(torch.f).parameters:\n  torch.f(k=1)", "torch.fk"),
        ("from __future__ import annotations\nimport torch\ndef f(x: torch.a): pass", "torch.a"),
        ("import torch\ndef f():\n  x: torch.a = 1", "torch.a"),
    ],
)  # fmt: skip
def test_what_the_program_asks_for_first_is_guarded(program: str, name: str) -> None:
    assert guards(program).get(name)
    assert name not in [need for _, need in needs(program)]


@pytest.mark.parametrize(
    "program",
    [
        "import torch\ntry:\n  torch.a\nexcept ValueError:\n  pass",
        "import torch\ntry:\n  torch.a\nexcept AttributeError as error:\n  raise ImportError('newer torch') from error",
        "import torch\nif torch.cuda.is_available():\n  torch.a",
        "from x import is_torch_available\nif is_torch_available():\n  import torch\n  torch.a",
        "import torch\nif hasattr(x, 'a'):\n  torch.a",
        "import torch\nif not hasattr(torch, 'b'):\n  raise ImportError('newer torch')\ntorch.a",
        "import torch\ndef f():\n  if not hasattr(torch, 'b'):\n    return\ntorch.a",
        "import torch\ntry:\n  pass\nexcept ImportError:\n  pass\nfinally:\n  torch.a",
    ],
)
def test_what_is_not_asked_for_is_a_need(program: str) -> None:
    assert "torch.a" in [name for _, name in needs(program)]


def test_members_of_instances_are_followed_by_annotation_and_by_making() -> None:
    program = (
        "from torch import C\ndef f(x: C, y=None, *z: C):\n  a = C(1)\n  a.p(k=2)\n  x.q.beyond\n  y.r\n  z.s\n  a.set = 1\n"
    )
    results = [(use.line, use.name + use.keyword) for use in read_uses(program).uses if use.line > 3]
    assert results == [
        (4, "torch.C().p"),
        (4, "torch.C().pk"),
        (5, "torch.C().q.beyond"),
        (5, "torch.C().q"),
        (8, "torch.C().set"),
    ]
    assert [name for _, name in needs("from torch import C\na = C()\na = D()\na.p")] == ["torch.C"]
    assert guards("from torch import C\na = C()\nif hasattr(a, 'p'): a.p") == {"torch.C().p": "hasattr()"}


def test_what_a_program_sets_on_torch_is_known() -> None:
    assert read_uses("import torch\ntorch.a.b = 1\ntorch.c[0] = 2").sets == {"torch.a.b"}


def test_a_syntax_error_is_told() -> None:
    with pytest.raises(SyntaxError):
        read_uses("import torch\nprint 'torch'")
