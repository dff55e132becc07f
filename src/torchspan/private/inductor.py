"""What torchspan uses of inductor, torch's compiler of graphs: `torch._inductor`."""

from __future__ import annotations

import functools
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from torchspan.private.names import PrivateName, find, names_in

if TYPE_CHECKING:
    from torch.fx import GraphModule

NAMES = (
    *names_in("torch", "_TorchCompileInductorWrapper"),
    *names_in("torch._inductor", "aot_compile", "standalone_compile"),
    PrivateName("torch._inductor.codecache"),
    *names_in("torch._inductor.codecache", "_precompile_header"),
    PrivateName("torch._inductor.compile_fx"),
    *names_in("torch._inductor.compile_fx", "compile_fx", "fx_codegen_and_compile"),
    PrivateName("torch._inductor.config"),
    *names_in(
        "torch._inductor.config", "compile_threads", "cpp.cxx", "fallback_random", "fx_graph_cache", "unbacked_symint_fallback"
    ),
    *names_in("torch._inductor.cpp_builder", "CppBuilder.build"),
    *names_in("torch._inductor.cpu_vec_isa", "VecISA.check_build"),
    *names_in("torch._inductor.decomposition", "select_decomp_table"),
    PrivateName("torch._inductor.inductor_prims"),
    *names_in("torch._inductor.runtime.cache_dir_utils", "cache_dir"),
)


def __getattr__(name: str) -> Any:
    """A listed name, imported when it is asked for."""
    return find(NAMES, name)


def backend(mode: str | None, options: Mapping[str, Any] | None, dynamic: bool | None) -> Callable[..., Any]:
    """What ``torch.compile(backend="inductor")`` would call, with `mode` and then `options` applied."""
    return torch._TorchCompileInductorWrapper(mode, dict(options or {}), dynamic)


def import_compiler() -> None:
    """Import dynamo and inductor: seconds of CPU, so not in a step. Their pool of worker processes is not started."""
    before = os.environ.get("TORCH_WARM_POOL")
    os.environ["TORCH_WARM_POOL"] = "0"
    try:
        import torch._dynamo
        import torch._functorch._aot_autograd.autograd_cache
        import torch._inductor.compile_fx
        import torch._inductor.cpp_builder
        import torch._inductor.cpu_vec_isa  # noqa: F401
    finally:  # this one variable only: the program may change others meanwhile, in another thread
        if before is None:
            os.environ.pop("TORCH_WARM_POOL", None)
        else:
            os.environ["TORCH_WARM_POOL"] = before


def compile_static(graph: GraphModule, inputs: list[Any], options: Mapping[str, Any]) -> Callable[..., Any]:
    """Inductor's code for `graph` with static shapes, without dynamo."""
    import torch._inductor

    settings = {"config_patches": dict(options)} if options else {}
    return torch._inductor.standalone_compile(graph, inputs, dynamic_shapes="from_example_inputs", options=settings)


def define_prims() -> None:
    """Have torch know inductor's own operators, ``torch.ops.prims.fma`` among them."""
    import torch._inductor.inductor_prims  # noqa: F401


def cache_folder() -> Path:
    """The folder of inductor's caches, and of AOTAutograd's; inductor is not imported for it, which would take seconds."""
    name = "torch._inductor.runtime.cache_dir_utils"
    module = sys.modules.get(name) or _alone(name)
    return Path(module.cache_dir())


@functools.cache
def _alone(name: str) -> Any:
    """A module of torch's that needs none of the packages around it, run without them."""
    path = Path(torch.__file__).parent.joinpath(*name.split(".")[1:]).with_suffix(".py")
    spec = importlib.util.spec_from_file_location(f"torchspan_alone.{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cxx_names() -> list[str]:
    """The C++ compilers that inductor looks for, in its order."""
    from torch._inductor import config

    compilers = config.cpp.cxx
    return [name for name in (compilers if isinstance(compilers, (tuple, list)) else (compilers,)) if name]


def compile_traced(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compile a graph that has its backward already, for inputs like these fake ones; shapes are static."""
    from torch._guards import TracingContext, detect_fake_mode, tracing
    from torch._inductor import standalone_compile

    fake_mode = detect_fake_mode(inputs)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if fake_mode is None:
            return standalone_compile(module, list(inputs), dynamic_shapes="from_example_inputs")
        stack.enter_context(tracing(TracingContext(fake_mode)))
        return standalone_compile(module, list(inputs), dynamic_shapes="from_tracing_context")


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators that inductor takes apart, and how; those that draw random numbers as eager draws them are not in it."""
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(fallback_random=True):
        return dict(select_decomp_table())
