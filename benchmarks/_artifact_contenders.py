"""One contender of `artifact_load` in a process of its own: ``_artifact_contenders.py TASK CONTENDER MODEL MODE FOLDER``.

TASK is ``make`` (what has to exist before), ``first`` (seconds until the first result) or ``steady`` (seconds of later steps,
the contender's and torch.compile's in turns). The last line of what it prints is JSON.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor], Any]


# the models; B: batch, L: length, D: width, H: heads


class Block(nn.Module):
    """Attention and a feed-forward part, each after a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """The block's output, of the input's shape."""
        batch, length, width = x_BLD.shape
        q, k, v = self.qkv(self.norm1(x_BLD)).view(batch, length, 3, 4, width // 4).permute(2, 0, 3, 1, 4).unbind(0)
        attended_BHLD = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.out(attended_BHLD.transpose(1, 2).reshape(batch, length, width))
        return x_BLD + self.down(F.gelu(self.up(self.norm2(x_BLD))))


class Transformer(nn.Module):
    """Two blocks between an embedding and a linear layer."""

    def __init__(self, num_blocks: int = 2, width: int = 64, vocabulary: int = 256) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(num_blocks))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits."""
        x_BLD = self.embed(tokens_BL)
        for block in self.blocks:
            x_BLD = block(x_BLD)
        return self.head(x_BLD)


class Logits(nn.Module):
    """Transformers' causal Llama, from tokens to logits, without a key-value cache."""

    def __init__(self, llama: nn.Module) -> None:
        super().__init__()
        self.llama = llama

    def forward(self, tokens_BL: Tensor) -> Tensor:
        """Logits."""
        return self.llama(tokens_BL, use_cache=False).logits


def transformer() -> tuple[nn.Module, Tensor]:
    """A transformer of 0.1 M parameters and 2 × 32 tokens."""
    return Transformer(), torch.randint(0, 256, (2, 32))


def nanogpt() -> tuple[nn.Module, Tensor]:
    """The same of the size that nanoGPT trains on Shakespeare: 6 blocks of width 384, 10 M parameters, and 4 × 128 tokens."""
    return Transformer(num_blocks=6, width=384), torch.randint(0, 256, (4, 128))


def llama() -> tuple[nn.Module, Tensor]:
    """Transformers' Llama, 2 layers of width 256, random weights, and 2 × 64 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    return Logits(LlamaForCausalLM(config)), torch.randint(0, 1024, (2, 64))


MODELS = {"transformer": transformer, "nanogpt": nanogpt, "llama": llama}


# the contenders: what has to exist before (make), and how a step is had in a fresh process (prepare)


def make_artifact(model: nn.Module, tokens: Tensor, folder: Path) -> None:
    """Write torchspan's artifact."""
    import torchspan

    torchspan.precompile(model, (tokens,)).save(folder / "model.tspan")


def prepare_artifact(model: nn.Module, folder: Path) -> Step:
    """torchspan's artifact, loaded."""
    import torchspan

    return torchspan.load(folder / "model.tspan", model)


def make_compile(model: nn.Module, tokens: Tensor, folder: Path) -> None:
    """Fill torch.compile's caches."""
    step(torch.compile(model, dynamic=False), tokens)


def prepare_compile(model: nn.Module, folder: Path) -> Step:
    """``torch.compile``; whether its caches are cold or warm is for TORCHINDUCTOR_CACHE_DIR to say."""
    return torch.compile(model, dynamic=False)


def make_aoti(model: nn.Module, tokens: Tensor, folder: Path) -> None:
    """Write AOTInductor's package: weights inside."""
    exported = torch.export.export(model, (tokens,))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(folder / "model.pt2"))


def prepare_aoti(model: nn.Module, folder: Path) -> Step:
    """AOTInductor's package by its public loader."""
    return torch._inductor.aoti_load_package(str(folder / "model.pt2"))


def prepare_aoti_raw(model: nn.Module, folder: Path) -> Step:
    """AOTInductor's package by the C++ loader below the public one: neither guards nor the structure of the result."""
    loader = torch._C._aoti.AOTIModelPackageLoader(str(folder / "model.pt2"), "model", False, 1, -1)
    return lambda tokens: loader.run([tokens])[0]


def make_peer(model: nn.Module, tokens: Tensor, folder: Path) -> None:
    """Write the source and the cache of ``torch.compiler.precompile``, which captures the backward with the forward."""

    def forward(model: nn.Module, tokens: Tensor) -> Tensor:
        return model(tokens)

    def train(model: nn.Module, tokens: Tensor) -> None:
        loss_of(model(tokens)).backward()

    whole = train if torch.is_grad_enabled() else forward
    paths = {"artifact_path": folder / "peer.py", "cache_path": folder / "peer.cache"}
    with torch.compiler.precompile.capture(whole, **paths) as capture:
        capture(model, tokens)


def prepare_peer(model: nn.Module, folder: Path) -> Step:
    """``torch.compiler.precompile``'s pair, loaded; in training its step is the backward, too."""
    loaded = torch.compiler.precompile.load(folder / "peer.py", folder / "peer.cache")
    return lambda tokens: loaded(model, tokens)


def make_nothing(model: nn.Module, tokens: Tensor, folder: Path) -> None:
    """Nothing has to exist."""


CONTENDERS: dict[str, tuple[Callable[[nn.Module, Tensor, Path], None], Callable[[nn.Module, Path], Step]]] = {
    "artifact": (make_artifact, prepare_artifact),
    "eager": (make_nothing, lambda model, folder: model),
    "cold": (make_nothing, prepare_compile),
    "warm": (make_compile, prepare_compile),
    "aoti": (make_aoti, prepare_aoti),
    "aoti_raw": (make_nothing, prepare_aoti_raw),
    "peer": (make_peer, prepare_peer),
}


# the tasks


def loss_of(logits: Tensor) -> Tensor:
    """What is trained on; its numbers do not matter."""
    return logits.float().mean()


def step(function: Step, tokens: Tensor) -> Any:
    """One call; in training the loss and the gradients too."""
    result = function(tokens)
    if torch.is_grad_enabled() and isinstance(result, Tensor):
        loss_of(result).backward()
    return result


def first(prepare: Callable[[nn.Module, Path], Step], model: nn.Module, tokens: Tensor, folder: Path) -> dict[str, float]:
    """Seconds of loading, and of the first step after it."""
    before, start = cpu_seconds(), time.perf_counter()
    function = prepare(model, folder)
    loaded = time.perf_counter()
    result = step(function, tokens)
    end, after = time.perf_counter(), cpu_seconds()
    check(model, tokens, result)
    return {"load": loaded - start, "step": end - loaded, "total": end - start, "cpu": after - before}


def cpu_seconds() -> float:
    """Processor seconds of this process and of those that it has waited for, such as compilers."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def check(model: nn.Module, tokens: Tensor, result: Any) -> None:
    """Raise unless a step gave what eager gives, and in training a gradient to every parameter."""
    missing = [name for name, parameter in model.named_parameters() if (parameter.grad is None) is torch.is_grad_enabled()]
    assert not missing, f"{missing} have no gradient in training, or one without"
    if isinstance(result, Tensor):
        torch.testing.assert_close(result, model(tokens), rtol=1e-3, atol=1e-4)


def steady(sides: list[Step], model: nn.Module, tokens: Tensor, num_pairs: int) -> dict[str, Any]:
    """Seconds of a step of each side, medians; they take turns of ten steps, and which is first changes every time."""
    seconds_of: list[list[float]] = [[] for _ in sides]
    for turn in range(2 + num_pairs // 10):
        for index in (0, 1) if turn % 2 else (1, 0):
            times = [timed_step(sides[index], model, tokens) for _ in range(10)]
            if turn >= 2:
                seconds_of[index] += times
    return {"seconds": [statistics.median(times) for times in seconds_of], "threads": torch.get_num_threads()}


def timed_step(side: Step, model: nn.Module, tokens: Tensor) -> float:
    """Seconds of one step, in training with gradients of its own."""
    model.zero_grad(set_to_none=True)
    start = time.perf_counter()
    step(side, tokens)
    return time.perf_counter() - start


def main() -> None:
    """Do the task."""
    task, contender, model_name, mode, folder, *rest = sys.argv[1:]
    torch.manual_seed(0)
    model, tokens = MODELS[model_name]()
    torch.set_grad_enabled(mode == "training")
    model.train(mode == "training")
    make, prepare = CONTENDERS[contender]
    answer: dict[str, Any] = {}
    if task == "make":
        make(model, tokens, Path(folder))
    elif task == "first":
        answer = first(prepare, model, tokens, Path(folder))
    else:
        sides = [prepare(model, Path(folder)), prepare_compile(model, Path(folder))]
        answer = steady(sides, model, tokens, int(rest[0]))
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
