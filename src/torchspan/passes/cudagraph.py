"""Run the step as one CUDA graph: its kernels are recorded once, and then launched together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from torchspan.core.errors import GuardError, PassError
from torchspan.core.graph import Graph
from torchspan.passes._base import Pass, PassContext, Stage
from torchspan.passes._one_call import one_call

_TARGET = "recorded_step"
_NCCL = "NCCL_GRAPH_REGISTER"


@dataclass(frozen=True)
class CudaGraph(Pass):
    """Records the step into a ``torch.cuda.CUDAGraph`` at its first call, and replays that at each call.

    Written after the rules of ``torch.cuda.graph``: `warmup` runs on a side stream, then the recording, in a memory pool of its
    own. Inputs have fixed memory: those of a batch are copied into it at each call; parameters, buffers and an optimizer's
    states are read where they are, and a step whose parameters were moved is refused. Results are copied out, so that a replay
    does not overwrite what an earlier one gave. torch's random stream goes on as without the recording.

    With collectives, NCCL wants ``NCCL_GRAPH_REGISTER=0`` in the environment that the job starts in: the report says so where
    it is not there. Without CUDA the graph stays as it is, and the report says so; with ``--compile.strict`` that is an error.
    Sizes that depend on data are refused: a recording has one size. Not run on a GPU by the project's own tests.
    """

    name: ClassVar[str] = "cudagraph"
    summary: ClassVar[str] = "records the step as a CUDA graph and replays it; without CUDA the step stays as it is"
    stage: ClassVar[Stage] = "compile"
    after: ClassVar[tuple[str, ...]] = ("regional_inductor", "full_inductor_compilation")

    warmup: int = 2

    def require(self, graph: Graph) -> None:
        """Raise PassError for a size that depends on data, where the step is one for CUDA."""
        if not _is_for_cuda(graph):
            return
        for node in graph.module.graph.nodes:
            if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool)):
                raise PassError(
                    f"{self.name} cannot record {node.name} ({node.target}): its value, which depends on data, becomes a size; "
                    "expected fixed sizes: leave cudagraph out for this model"
                )

    def run(self, graph: Graph, context: PassContext) -> Graph:
        if not _is_for_cuda(graph):
            obstacle = "no CUDA here" if not torch.cuda.is_available() else "the step computes on the CPU"
            if context.strict:
                raise PassError(
                    f"{self.name} records kernels of a GPU, and there is {obstacle}; leave it out, or --compile.strict"
                )
            context.report.decide("pass", self.name, "nothing changed", f"{obstacle}; it records kernels of a GPU")
            return graph.with_module(graph.module, str(self))
        fixed = [spec.kind not in ("input", "tangent") for spec in graph.inputs]
        module = one_call(graph, _TARGET, Recording(graph.module, fixed, self.warmup).record_or_replay)
        context.report.decide("pass", self.name, "the step is one CUDA graph", "recorded at the first call, then replayed")
        if os.environ.get(_NCCL) != "0" and graph.num_collectives():
            context.report.decide("pass", self.name, f"{_NCCL} is not 0", f"start the job with {_NCCL}=0, as NCCL wants")
        return graph.with_module(module, str(self))


def _is_for_cuda(graph: Graph) -> bool:
    values = [node.meta.get("val") for node in graph.placeholders()]
    return torch.cuda.is_available() and any(isinstance(value, Tensor) and value.device.type == "cuda" for value in values)


class Recording:
    """A step, recorded at the first call and replayed at each; `fixed` says which inputs are read where they are."""

    def __init__(self, step: Callable[..., Sequence[Any]], fixed: Sequence[bool], warmup: int) -> None:
        self._step = step
        self._fixed = list(fixed)
        self._warmup = warmup
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []
        self._results: list[Any] = []

    @torch.no_grad()
    def record_or_replay(self, *args: Tensor) -> list[Any]:
        """The step's results for `args`, in memory of their own."""
        if self._graph is None:
            self._graph = self._record(args)
        self._refill(args)
        self._graph.replay()
        return [result.clone() if isinstance(result, Tensor) else result for result in self._results]

    def _record(self, args: Sequence[Tensor]) -> torch.cuda.CUDAGraph:
        self._inputs = [
            argument if is_fixed else argument.clone() for argument, is_fixed in zip(args, self._fixed, strict=True)
        ]
        states = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(self._warmup):
                self._step(*self._inputs)
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.set_rng_state(states)  # what warm-up drew, the step draws
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._results = list(self._step(*self._inputs))
        return graph

    def _refill(self, args: Sequence[Tensor]) -> None:
        for index, (own_input, argument, is_fixed) in enumerate(zip(self._inputs, args, self._fixed, strict=True)):
            if not is_fixed:
                own_input.copy_(argument)
            elif own_input.data_ptr() != argument.data_ptr():
                raise GuardError(
                    f"input {index} was moved to other memory since the step was recorded as a CUDA graph; expected parameters "
                    "and states that are changed in place; capture the step again"
                )


PASS = CudaGraph
