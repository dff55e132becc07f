"""What torchspan uses of AOTAutograd, which traces backwards, and of functorch: `torch._functorch`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import torch

from torchspan.private.names import PrivateName, find, names_in

if TYPE_CHECKING:
    from torch.fx import GraphModule

NAMES = (
    *names_in("torch._dynamo.utils", "_disable_saved_tensors_hooks_during_tracing", "preserve_rng_state"),
    PrivateName("torch._functorch._aot_autograd.autograd_cache"),
    *names_in(
        "torch._functorch._aot_autograd.autograd_cache", "AOTAutogradCache._lookup", "BypassAOTAutogradCache", "check_node_safe"
    ),
    *names_in("torch._functorch._aot_autograd.logging_utils", "setup_stacktrace_preservation_hooks", "track_graph_compiling"),
    *names_in("torch._functorch._aot_autograd.runtime_wrappers", "coerce_to_expected_memory_format"),
    *names_in("torch._functorch._aot_autograd.schemas", "AOTConfig"),
    *names_in("torch._functorch._aot_autograd.subclass_utils", "unwrap_tensor_subclasses_with_indices_to_original"),
    *names_in("torch._functorch._aot_autograd.utils", "create_tree_flattened_fn"),
    PrivateName("torch._functorch.aot_autograd"),
    *names_in("torch._functorch.aot_autograd", "AOT_COUNTER", "PhiloxStateTracker", "aot_module_simplified"),
    *names_in(
        "torch._functorch.aot_autograd", "aot_compile_joint_with_descriptors", "aot_export_joint_with_descriptors", since="2.9"
    ),
    # what the backport of those two is made of
    *names_in("torch._functorch.aot_autograd", "construct_fake_mode", "default_partition", "process_inputs"),
    *names_in(
        "torch._functorch.aot_autograd",
        "aot_dispatch_autograd",
        "aot_dispatch_base",
        "create_aot_dispatcher_function",
        until="2.8",
    ),
    PrivateName("torch._functorch._aot_autograd.jit_compile_runtime_wrappers", until="2.8"),
    *names_in(
        "torch._functorch._aot_autograd.jit_compile_runtime_wrappers",
        "AOTDispatchAutograd.post_compile",
        "_create_wrappers_for_dispatch",
        "aot_dispatch_autograd_graph",
        "aot_dispatch_base_graph",
        "pre_compile",
        until="2.8",
    ),
    PrivateName("torch._functorch.config"),
    *names_in("torch._functorch.config", "donated_buffer", "enable_autograd_cache"),
    *names_in("torch._functorch.config", "force_non_lazy_backward_lowering", since="2.10"),
    *names_in("torch._functorch.fx_minifier", "minifier"),
    PrivateName("torch._functorch.partitioners"),
    *names_in("torch._functorch.partitioners", "min_cut_rematerialization_partition"),
    *names_in("torch._functorch.pyfunctorch", "retrieve_current_functorch_interpreter", "temporarily_clear_interpreter_stack"),
)


def __getattr__(name: str) -> Any:
    """A listed name, imported when it is asked for."""
    return find(NAMES, name)


def config_for(
    flat_args: Sequence[Any], num_state: int, decompositions: Any, keep_inference_input_mutations: bool, ignore_shape_env: bool
) -> Any:
    """AOTAutograd's settings for a graph of these arguments, parameters and buffers first, without compilers."""
    from torch._functorch._aot_autograd.schemas import AOTConfig
    from torch._functorch.aot_autograd import AOT_COUNTER
    from torch._subclasses.fake_tensor import FakeTensor

    no_compiler: Any = None
    fake = next((value for value in flat_args if isinstance(value, FakeTensor)), None)
    return AOTConfig(
        fw_compiler=no_compiler,
        bw_compiler=no_compiler,
        inference_compiler=no_compiler,
        partition_fn=no_compiler,
        decompositions=decompositions,
        num_params_buffers=num_state,
        aot_id=next(AOT_COUNTER),
        keep_inference_input_mutations=keep_inference_input_mutations,
        dynamic_shapes=fake is not None and fake.fake_mode.shape_env is not None,
        static_input_indices=[*range(num_state)],
        ignore_shape_env=ignore_shape_env,
    )


def contexts(fake_mode: Any, shape_env: Any) -> Iterator[AbstractContextManager[Any]]:
    """The contexts in which AOTAutograd traces and compiles."""
    from torch._dispatch.python import enable_python_dispatcher
    from torch._dynamo.utils import _disable_saved_tensors_hooks_during_tracing, preserve_rng_state
    from torch._functorch.aot_autograd import PhiloxStateTracker  # type: ignore[attr-defined]

    yield torch.autograd.set_multithreading_enabled(False)
    yield preserve_rng_state()
    yield fake_mode
    if shape_env is not None:
        yield enable_python_dispatcher()
    yield PhiloxStateTracker()
    yield _disable_saved_tensors_hooks_during_tracing()
    yield compiled_autograd_off()


def compiled_autograd_off() -> AbstractContextManager[None]:
    """Inside, autograd runs as it is."""
    from torch._dynamo import compiled_autograd

    return compiled_autograd._disable()


def note_state(state: list[torch.Tensor]) -> None:
    """Note the parameters and buffers where compilers look for them."""
    from torch._functorch._aot_autograd.subclass_utils import unwrap_tensor_subclasses_with_indices_to_original
    from torch._guards import TracingContext

    context: Any = TracingContext.try_get()
    if context is not None:
        context.params_flat = state
        unwrapped = unwrap_tensor_subclasses_with_indices_to_original(state)
        context.params_flat_unwrap_subclasses, context.params_unwrapped_to_flat_index = unwrapped


def keep_forward_traces(outputs: Sequence[Any]) -> None:
    """Make the backward of these tensors note for its nodes which nodes of the forward they belong to."""
    from torch._functorch._aot_autograd.logging_utils import setup_stacktrace_preservation_hooks

    roots: list[Any] = [tensor.grad_fn for tensor in outputs if isinstance(tensor, torch.Tensor)]
    setup_stacktrace_preservation_hooks(roots)


@contextmanager
def compiling_backward(config: Any) -> Iterator[None]:
    """The contexts in which AOTAutograd compiles a backward."""
    from torch._functorch._aot_autograd.logging_utils import track_graph_compiling

    with track_graph_compiling(config, "backward"), torch._C._DisableAutocast(), torch.no_grad():
        yield


def joint_export() -> Any:
    """``aot_export_joint_with_descriptors``, or None where torch itself lacks it (a backport may stand there).

    2.9 has the function, but its counterpart takes no ``partition_fn`` and its nodes no annotations: counted as lacking.
    """
    from torch._functorch import aot_autograd

    compile_joint = vars(aot_autograd).get("aot_compile_joint_with_descriptors")
    if compile_joint is not None and compile_joint.__globals__ is not vars(aot_autograd):
        return None
    if compile_joint is None or "partition_fn" not in inspect.signature(compile_joint).parameters:
        return None
    return aot_autograd.aot_export_joint_with_descriptors


def joint_gradient_placements(joint: Any) -> list[Any] | None:
    """The placements of each gradient of a joint graph in the order of its inputs, None for plain tensors; None if unknown."""
    meta = getattr(getattr(joint, "_aot_graph_capture", None), "maybe_subclass_meta", None)
    gradients = getattr(meta, "grad_input_metas", None)
    return None if gradients is None else [_placements(gradient) for gradient in gradients]


def _placements(creation: Any) -> Any:
    """The placements in torch's recipe for a DTensor: a spec up to 2.12, the placements themselves since."""
    context = getattr(creation, "meta", None)
    first = context[0] if isinstance(context, tuple) and context else None
    return getattr(first, "placements", first)


@contextmanager
def outside_vmap() -> Iterator[None]:
    """Run what is inside as if no vmap were around it, neither functorch's nor that of ``is_grads_batched``."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    depth = torch._C._vmapmode_increment_nesting()
    for _ in range(depth):
        torch._C._vmapmode_decrement_nesting()
    try:
        with temporarily_clear_interpreter_stack():
            yield
    finally:
        for _ in range(depth - 1):
            torch._C._vmapmode_increment_nesting()


def minify(
    graph: GraphModule,
    inputs: list[torch.Tensor],
    goes_wrong: Callable[[GraphModule, Sequence[Any]], bool],
    keep: Callable[[GraphModule, Sequence[Any]], None],
) -> None:
    """Make `graph` smaller with torch's minifier as long as it `goes_wrong`; `keep` is told of each smaller one."""
    from torch._functorch.fx_minifier import minifier

    with torch.no_grad():
        minifier(graph, inputs, goes_wrong, keep, skip_offload=True, skip_sanity=True)
