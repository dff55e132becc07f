"""System 1: how a Program becomes Regions, compiled inside a Budget."""

from torchspan.strategies._budget import DEFAULT_BUDGET, Budget
from torchspan.strategies._compile import compile_bounded, report_of
from torchspan.strategies._compile_profile import CompileProfile, profile_compile
from torchspan.strategies._explain import Explanation, explaining
from torchspan.strategies._graph import compile_graph
from torchspan.strategies._marks import region
from torchspan.strategies._named import partial_compile, safe_compile, smart_compile
from torchspan.strategies._region import end_compiles
from torchspan.strategies._replace import torch_compile_patch
from torchspan.strategies._repro import Repro, run_task, write_repro
from torchspan.strategies._supervisor import Ending, Job, end_servers, run_bounded, server_pids
from torchspan.strategies._watch import Finished, finish_compiles, watching

__all__ = [
    "DEFAULT_BUDGET",
    "Budget",
    "CompileProfile",
    "Ending",
    "Explanation",
    "Finished",
    "Job",
    "Repro",
    "compile_bounded",
    "compile_graph",
    "end_compiles",
    "end_servers",
    "explaining",
    "finish_compiles",
    "partial_compile",
    "profile_compile",
    "region",
    "report_of",
    "run_bounded",
    "run_task",
    "safe_compile",
    "server_pids",
    "smart_compile",
    "torch_compile_patch",
    "watching",
    "write_repro",
]
