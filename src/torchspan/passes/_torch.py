"""The private names of torch that passes need, imported when they are called for; a new torch breaks here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from torch.fx import GraphModule


def compile_with_inductor(module: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
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


def dense_flex_attention(is_backward: bool) -> Callable[..., Any]:
    """What torch calls for FlexAttention, or for its backward, where it has no kernel of its own: dense operators."""
    from torch._higher_order_ops.flex_attention import sdpa_dense, sdpa_dense_backward

    return sdpa_dense_backward if is_backward else sdpa_dense


def inductor_decompositions() -> dict[Any, Callable[..., Any]]:
    """The operators that inductor takes apart, and how; those that draw random numbers as eager draws them are not in it."""
    from torch._inductor import config
    from torch._inductor.decomposition import select_decomp_table

    with config.patch(fallback_random=True):
        return dict(select_decomp_table())


def trace_fake(
    function: Callable[..., Any], values: Sequence[Any], result: Any, table: Mapping[Any, Callable[..., Any]]
) -> GraphModule | None:
    """`function` of these fake values, which gives what is like `result`, as a graph, its operators taken apart by `table`.

    None where what the table has for one of them decides by a value that depends on data.
    """
    from torch._dispatch.python import enable_python_dispatcher
    from torch._guards import detect_fake_mode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    # the dispatcher in Python: what is not it takes no symbols for sizes
    with torch.no_grad(), detect_fake_mode([*values, result]) or nullcontext(), enable_python_dispatcher():
        try:
            return make_fx(function, decomposition_table=dict(table))(*values)
        except GuardOnDataDependentSymNode:
            return None


def unknown_values() -> tuple[type[Exception], ...]:
    """What an operator raises on fake tensors when only real ones can tell what it gives."""
    from torch._subclasses.fake_tensor import (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
    )
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    return (
        DataDependentOutputException,
        DynamicOutputShapeException,
        UnsupportedOperatorException,
        GuardOnDataDependentSymNode,
        NotImplementedError,
    )


def fake_mode() -> Any:
    """A mode for example values of a graph that was written by hand, whose sizes may be symbols."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    return FakeTensorMode(shape_env=ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True))


def find_group(name: str) -> Any:
    """The process group that functional collectives know by `name`, or None."""
    from torch._C import _distributed_c10d

    resolve: Any = _distributed_c10d._resolve_process_group
    try:
        return resolve(name)
    except (RuntimeError, ValueError, LookupError):
        return None


def start_fake_groups(rank: int, groups: Mapping[str, Sequence[int]]) -> None:
    """Make this process `rank` of a job that sends nothing, with process groups of these names and ranks."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world_size = 1 + max(rank, *(member for members in groups.values() for member in members))
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    add_groups(groups)


def add_groups(groups: Mapping[str, Sequence[int]]) -> None:
    """Make process groups of these names and ranks."""
    import torch.distributed as dist

    made = {name: dist.new_group(list(members)) for name, members in groups.items()}
    for group in made.values():  # torch chose their names
        _forget_group(group.group_name)
    for name, group in made.items():
        name_group(group, name)
    world: Any = dist.distributed_c10d._world  # it names the next group by counting, and takes no name twice
    world.group_count = max(world.group_count, *(int(name) + 1 for name in groups if name.isdigit()), 0)


def fake_mode_of(values: Sequence[Any]) -> Any:
    """The mode that fake tensors among `values` belong to, or None."""
    from torch._guards import detect_fake_mode

    return detect_fake_mode([value for value in values if isinstance(value, torch.Tensor)])


def forget_new_sizes(fake_mode: Any, size: Any) -> dict[Any, Any]:
    """Where the data-dependent sizes that were made for `size` are found in it; torch then no longer looks for them."""
    from torch.fx.experimental.symbolic_shapes import compute_unbacked_bindings

    if fake_mode is None or fake_mode.shape_env is None:
        return {}
    return compute_unbacked_bindings(fake_mode.shape_env, size) or {}


def fused_products(groups: Sequence[str]) -> tuple[Any, Any]:
    """torch's all-gather fused with products, and product fused with a reduce-scatter, over symmetric memory of `groups`."""
    import torch.distributed._symmetric_memory as symmetric_memory

    enable: Any = symmetric_memory.enable_symm_mem_for_group
    if not hasattr(enable, "__wrapped__"):  # a later torch does it itself, and warns
        for group in groups:
            enable(group)
    operators = torch.ops.symm_mem
    return operators.fused_all_gather_matmul.default, operators.fused_matmul_reduce_scatter.default


def group_size(name: str) -> int:
    """How many ranks the process group has that operators know by `name`."""
    size: int = find_group(name).size()
    return size


def group_ranks(name: str) -> list[int]:
    """The ranks of the process group that operators know by `name`."""
    from torch.distributed import get_process_group_ranks

    return get_process_group_ranks(find_group(name))


def name_group(group: Any, name: str) -> None:
    """Let operators know a process group by `name` as well, in place of what had that name, until groups are destroyed."""
    from torch._C import _distributed_c10d

    if find_group(name) is not None:
        _forget_group(name)
    register: Any = _distributed_c10d._register_process_group
    register(name, group)


def _forget_group(name: str) -> None:
    from torch._C import _distributed_c10d

    unregister: Any = _distributed_c10d._unregister_process_group
    unregister(name)
