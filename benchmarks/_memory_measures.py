"""The measurements of ``memory_of_passes.py``, each made in a process of its own.

    python benchmarks/_memory_measures.py '{"option": value}'

prints, as JSON, of the sides that are named: the most bytes that were held during a step, and the seconds of each step, taken
in turn with the others.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from _harness import seconds
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchspan.capture._state import BoundGraph
from torchspan.capture.train_step import capture_train_step
from torchspan.core.program import Program
from torchspan.core.report import Report
from torchspan.models._base import get_model
from torchspan.passes._base import PassContext
from torchspan.passes._pipeline import Pipeline
from torchspan.train._checkpointing import checkpoint_blocks
from torchspan.train.config import ActivationCheckpoint
from torchspan.train.data import ByteTokens
from torchspan.train.job import Loss

EAGER = {"eager": "none", "eager, checkpoint": "full", "eager, selective checkpoint": "selective"}
Step = Callable[[], object]


class LiveBytes(TorchDispatchMode):
    """The most bytes that were held, of all tensors that operators made since; what was there before does not count."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operator(*args, **(kwargs or {}))
        storages = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in storages:
                self._made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._made = {key: entry for key, entry in self._made.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(num_bytes for _, num_bytes in self._made.values()))
        return result


def measure(sizes: dict[str, Any], batch: int, seq_len: int, sides: list[str], repeats: int) -> dict[str, Any]:
    """Peak bytes, seconds of each step, and what the pass predicted, by side: a pipeline, or a key of `EAGER`."""
    torch.set_num_threads(1)
    spec = get_model("llama3")
    tokens, labels = ByteTokens.load(None).batch(0, 0, batch, seq_len)
    steps: dict[str, tuple[nn.Module, Step]] = {}
    results: dict[str, Any] = {}
    graph = None
    for side in sides:
        flavour = replace(spec.flavour("debugmodel"), **sizes)
        module = Loss(spec.build(flavour).init_weights(0), tokens.numel())  # type: ignore[operator]
        if side in EAGER:
            checkpoint_blocks(module.model, ActivationCheckpoint(EAGER[side]), Report())  # type: ignore[arg-type]
            steps[side] = (module, lambda m=module: m(tokens, labels).backward())  # type: ignore[misc]
            continue
        graph = graph or capture_train_step(Program(module, (tokens, labels)))
        report = Report()
        bound = BoundGraph(Pipeline.parse("" if side == "graph" else side).run(graph, PassContext(report)), module)
        steps[side] = (module, lambda b=bound: b(tokens, labels))  # type: ignore[misc]
        results[side] = dict(report.figures)
    peaks = {side: _peak(*tensor) for side, tensor in steps.items()}
    figures: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, (module, step) in steps.items():
            module.zero_grad(set_to_none=True)
            figures[side].append(seconds(step))
            module.zero_grad(set_to_none=True)
    return {"peak_bytes": peaks, "seconds": figures, "figures": results}


def _peak(module: nn.Module, step: Step) -> int:
    step()  # what is made once, such as the tables of a library, is made before
    module.zero_grad(set_to_none=True)
    gc.collect()
    with LiveBytes() as counted:
        step()
    module.zero_grad(set_to_none=True)
    return counted.peak


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
