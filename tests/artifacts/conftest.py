"""Artifacts that several tests share: each is made once a session, in the process that the tests run in."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch

MODELS = '''
import torch
from torch import nn

SCALE = 2.0


class MLP(nn.Module):
    """Two outputs, nested, one of them a view of the other, one an input."""

    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(10, 20)
        self.fc2 = nn.Linear(20, 5)
        self.bias = True
        self.settings = {"power": 2}

    def forward(self, x, mask=None):
        hidden = torch.relu(self.fc1(x)) * SCALE
        out = self.fc2(hidden)
        if self.bias:
            out = out + 1
        if mask is not None:
            out = out * mask
        return {"out": out, "parts": (out.view(-1), [out.sum() ** self.settings["power"], 7])}, x


class CNN(nn.Module):
    """Buffers that change in training, and dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.dropout(x))


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens, positions):
        return self.head(self.embed(tokens) + positions)


class Modes(nn.Module):
    """Does something else without gradients."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc(x) if torch.is_grad_enabled() else self.fc(x) * 2


class Counting(nn.Module):
    """Changes an attribute of its own."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x + self.calls


class Annotated(nn.Module):
    """A part to be compiled between two that are not."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, x):
        from torch.fx import traceback

        x = self.first(x).tanh() + torch.arange(8)
        with traceback.annotate({"compile_with_inductor": "gate"}):
            x = x * torch.sigmoid(x) + 1
        return self.last(x)


def annotated():
    torch.manual_seed(0)
    return Annotated()


def dot(tensors):
    return (tensors[0] * tensors[1]).sum()


def parts(x):
    y = x + 1
    return y, torch.view_as_real(y)


def mlp():
    torch.manual_seed(0)
    return MLP()


def cnn():
    torch.manual_seed(0)
    return CNN()


def tied():
    torch.manual_seed(0)
    return Tied()


def modes():
    torch.manual_seed(0)
    return Modes()


def inputs(name):
    generator = torch.Generator().manual_seed(1)
    normal = lambda *shape: torch.randn(*shape, generator=generator)
    if name == "mlp":
        return (normal(4, 10),), {"mask": normal(5)}
    if name == "cnn":
        return (normal(2, 3, 8, 8),), {}
    if name == "tied":
        return (torch.randint(0, 11, (2, 3), generator=generator), normal(3, 6)), {}
    return (normal(2, 3),), {}


def loss_of(result):
    """A number that every tensor of a result has a part in."""
    from torch.utils._pytree import tree_leaves

    return sum(leaf.float().square().sum() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))


def step(function, model, name):
    """One training step: the result, the gradients and the buffers after it."""
    from torch.utils._pytree import tree_leaves

    args, kwargs = inputs(name)
    torch.manual_seed(3)
    result = function(*args, **kwargs)
    loss_of(result).backward()
    leaves = [leaf.detach() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
    gradients = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    model.zero_grad()
    return leaves, gradients, buffers
'''


@contextmanager
def module_of(name: str, source: str, folder: Path) -> Iterator[types.ModuleType]:
    """A module of that source, which every process that has `folder` on its path can import."""
    (folder / f"{name}.py").write_text(source)
    sys.path.insert(0, str(folder))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(folder))
        sys.modules.pop(name, None)


@pytest.fixture(scope="session")
def new_module() -> Callable[..., AbstractContextManager[types.ModuleType]]:
    """Makes a module from its name, source and folder."""
    return module_of


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    """The module of the models, importable by its name here and in every process that has its folder on its path."""
    with module_of("artifact_models", MODELS, tmp_path_factory.mktemp("models")) as module:
        yield module


@pytest.fixture(scope="session")
def make(models: types.ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The file of the artifact of a model of that name, for a compiler; made when it is first asked for."""
    from torchspan.artifacts import precompile

    paths: dict[tuple[str, str], Path] = {}
    folder = tmp_path_factory.mktemp("artifacts")

    def make_artifact(name: str, compiler: str = "eager") -> Path:
        if (name, compiler) not in paths:
            args, kwargs = models.inputs(name)
            artifact = precompile(getattr(models, name)(), args, kwargs, compiler=compiler)
            paths[name, compiler] = artifact.save(folder / f"{name}-{compiler}.tspan")
        return paths[name, compiler]

    return make_artifact


@pytest.fixture
def run_with_models(run_python: Callable[..., object], models: types.ModuleType) -> Callable[..., object]:
    """Run code in a fresh process that can import the models."""

    def run(code: str, *argv: str, env: dict[str, str] | None = None, **options: object) -> object:
        path = {"PYTHONPATH": str(Path(str(models.__file__)).parent)}
        return run_python(code, *argv, env=path | (env or {}), **options)

    return run


@pytest.fixture(autouse=True)
def _same_numbers_again() -> Iterator[None]:
    state = torch.get_rng_state()
    yield
    torch.set_rng_state(state)
