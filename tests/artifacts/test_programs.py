"""Programs of kinds that people write: each is an artifact that a fresh process runs, forward and backward, as eager does."""

from __future__ import annotations

import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from torchspan.artifacts import load, precompile
from torchspan.core.errors import UnsupportedError

PROGRAMS = '''
import collections
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

log = logging.getLogger("programs")


def doubled(module, inputs, output):
    return output * 2


class Pair(NamedTuple):
    a: torch.Tensor
    b: torch.Tensor


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        return self.attention(x, x, x, attn_mask=torch.ones(6, 6).triu(1).bool())


class Hooks(nn.Module):
    """Hooks have numbers that count those of the process."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.fc.register_forward_hook(doubled)

    def forward(self, x):
        return self.fc(x)


class Mapped(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.choices = {(1, "a"): F.gelu}

    def forward(self, x):
        batch = collections.OrderedDict(x=x)
        return Pair(torch.vmap(lambda row: self.fc(row).tanh())(batch["x"]), self.choices[1, "a"](x))


class Stores(nn.Module):
    """Buffers that get another tensor, and an attribute that keeps one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("calls", torch.tensor(0))
        self.last = None

    def forward(self, x):
        y = self.fc(x)
        self.calls += 1
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean((0, 1))
        self.last = y.detach() * self.calls
        return y - self.mean


class Recurrent(nn.Module):
    """Layers with dropout between them, one of them computed again in the backward."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(8, 8, 2, dropout=0.4)
        self.gru = nn.GRU(8, 4, 2, dropout=0.4, bidirectional=True)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.4))

    def forward(self, x):
        log.warning("no part of what is captured")
        x = self.gru(self.lstm(x)[0])[0]
        return checkpoint(self.head, x, use_reentrant=False)


class Draws(nn.Module):
    """Random numbers are drawn in the order of memory, which is not that of the indices here."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        x = self.fc(x).permute(2, 0, 1)
        drawn = torch.empty_like(x).bernoulli_(0.5), torch.bernoulli(x.detach(), 0.5), torch.rand_like(x)
        return F.alpha_dropout(x, 0.3, True) + sum(drawn) + F.dropout(x, 0.5)


@torch.library.custom_op("programs::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


triple.register_fake(torch.empty_like)
triple.register_autograd(lambda ctx, gradient: gradient * 3)


class Permuted(nn.Module):
    """A batch norm gives other strides than fake tensors have, and a view of that."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2).reshape(18, 8) * self.norm.weight


class Cache:
    """An object that a forward makes and returns."""

    def __init__(self, keys):
        self.keys, self.layers = keys, []


class Makes(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        cache = Cache(triple(self.fc(x)))
        cache.layers.append(cache.keys + 1)
        return {"cache": cache, "sum": cache.keys.sum()}


NAMES = ("Attention", "Hooks", "Mapped", "Stores", "Recurrent", "Draws", "Permuted", "Makes")


def build(name):
    torch.manual_seed(0)
    return globals()[name]().train()


def step(call, model, seed):
    from torch.utils._pytree import tree_leaves

    x = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(seed))
    torch.manual_seed(seed)
    result = call(x)
    if isinstance(result, dict):
        assert type(result["cache"]) is Cache
        result = {**result, **vars(result["cache"]), "cache": None}
    model.zero_grad()
    sum(leaf.square().sum() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    leaves = [leaf.detach() for leaf in tree_leaves(result) if leaf is not None]
    return type(result), leaves, gradients, model.state_dict(), vars(model).get("last")
'''

FRESH = """
import sys

import artifact_programs as programs
import torch
from torchspan.artifacts import load

torch.nn.Linear(1, 1).register_forward_hook(programs.doubled)
for argument in sys.argv[1:]:
    name, path = argument.split("=")
    model, eager = programs.build(name), programs.build(name)
    fast = load(path, model)
    for seed in (1, 2, 3):
        found, expected = programs.step(fast, model, seed), programs.step(eager, eager, seed)
        assert found[0] is expected[0], (name, found[0], expected[0])
        torch.testing.assert_close(found[1:], expected[1:], rtol=1e-6, atol=1e-6, msg=lambda said: f"{name}: {said}")
print("FINE", len(sys.argv) - 1)
"""


@pytest.fixture(scope="module")
def programs(new_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[types.ModuleType]:
    with new_module("artifact_programs", PROGRAMS, tmp_path_factory.mktemp("programs")) as module:
        yield module


def test_programs_of_many_kinds_run_in_a_fresh_process(
    programs: types.ModuleType, run_python: Callable[..., object], tmp_path: Path
) -> None:
    x, arguments = torch.randn(3, 6, 8), []
    for name in programs.NAMES:
        model = programs.build(name)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        path = precompile(model, (x,), compiler="eager").save(tmp_path / f"{name}.tspan")
        torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)  # nothing was stored when it was made
        arguments.append(f"{name}={path}")
    paths = [str(Path(str(programs.__file__)).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = run_python(FRESH, *arguments, env={"PYTHONPATH": os.pathsep.join(paths)})
    assert f"FINE {len(programs.NAMES)}" in process.stdout


@pytest.mark.once
def test_what_a_program_stores_that_a_next_call_would_read_is_refused() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = {"calls": 0}

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen["calls"] += 1
            return x * 2

    model = Counts()
    with pytest.raises(UnsupportedError, match=r"its forward changes 'calls' of L\['target'\]\.seen; return the new value"):
        precompile(model, (torch.ones(2),), compiler="eager")
    assert model.seen == {"calls": 0}


@pytest.mark.once
def test_a_size_that_depends_on_data_is_refused_with_its_line() -> None:
    def positive(x: torch.Tensor) -> torch.Tensor:
        return x[x > 0].sum()

    with pytest.raises(UnsupportedError, match=r"depends on data .*it is made at \S+test_programs\.py:\d+: keep a fixed size"):
        precompile(positive, (torch.ones(2),), compiler="eager")


@pytest.mark.once
def test_a_tensor_that_is_stored_in_an_input_is_there_after_the_call(tmp_path: Path) -> None:
    def fill(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        batch["double"] = batch["x"] * 2
        return batch["double"] + 1

    fast = load(precompile(fill, ({"x": torch.ones(2)},), compiler="eager").save(tmp_path / "fill.tspan"), fill)
    batch = {"x": torch.full((2,), 3.0)}
    assert fast(batch).tolist() == [7.0, 7.0] and batch["double"].tolist() == [6.0, 6.0]
