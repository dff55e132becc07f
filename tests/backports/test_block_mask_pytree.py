"""A BlockMask taken apart and put together again is the mask it was, with the leaves that it is given."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

BACKPORT = REGISTRY.get("block_mask_pytree").BACKPORT
INDICES = tuple(torch.arange(4).view(shape) for shape in ((-1, 1, 1, 1), (1, -1, 1, 1), (1, 1, -1, 1), (1, 1, 1, -1)))


def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


def no_further_than(distance: Tensor) -> Any:
    def mask(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (q - k) <= distance

    return mask


def both(first: Any, second: Any) -> Any:
    return lambda b, h, q, k: first(b, h, q, k) & second(b, h, q, k)


def within(distance: Tensor, b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q - k) <= distance


def mask_of(mask_mod: Any) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(mask_mod, None, None, 256, 256, device="cpu", BLOCK_SIZE=64)


def rebuilt(mask: Any, leaves: Any = None) -> Any:
    result, context = mask._flatten()
    return type(mask)._unflatten(result if leaves is None else leaves, context)


def same_but_for_the_function(first: Any, second: Any) -> bool:
    parts = zip(first.as_tuple()[:-1], second.as_tuple()[:-1])
    return all(torch.equal(a, b) if isinstance(a, Tensor) else a == b for a, b in parts)


@pytest.mark.parametrize(
    "mask_mod", [causal, no_further_than(torch.tensor(70)), both(causal, no_further_than(torch.tensor(9)))]
)
def test_a_mask_survives_being_taken_apart(environment: Environment, mask_mod: Any) -> None:
    mask = mask_of(mask_mod)
    leaves, _ = mask._flatten()
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    again = rebuilt(mask)
    assert type(again) is type(mask) and same_but_for_the_function(again, mask)
    torch.testing.assert_close(again.mask_mod(*INDICES), mask_mod(*INDICES))
    if is_lacking(BACKPORT):
        assert {decision.choice for decision in environment.report.decisions} == {"torchspan's block_mask_pytree"}


@pytest.mark.usefixtures("environment")
def test_tensors_that_are_not_there_are_no_leaves() -> None:
    from torch.nn.attention.flex_attention import BlockMask

    counts, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.zeros(1, 1, 2, 2, dtype=torch.int32)
    mask = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=64)
    assert len(mask._flatten()[0]) == 4
    assert rebuilt(mask).full_kv_indices is None and same_but_for_the_function(rebuilt(mask), mask)


@pytest.mark.usefixtures("environment")
@pytest.mark.parametrize(
    "make", [no_further_than, lambda d: functools.partial(within, d), lambda d: both(causal, no_further_than(d))]
)
def test_what_a_mask_function_holds_are_leaves(make: Any) -> None:
    mask = mask_of(make(torch.tensor(1)))
    leaves, _ = mask._flatten()
    other = torch.tensor(3)
    changed = [other if leaf.dim() == 0 else leaf for leaf in leaves]
    assert sum(leaf is other for leaf in changed) == 1
    torch.testing.assert_close(rebuilt(mask, changed).mask_mod(*INDICES), make(other)(*INDICES))
    torch.testing.assert_close(mask.mask_mod(*INDICES), make(torch.tensor(1))(*INDICES))


@pytest.mark.usefixtures("environment")
def test_contexts_are_equal_where_the_functions_do_the_same() -> None:
    contexts = [mask_of(mask_mod)._flatten()[1] for mask_mod in (causal, no_further_than(torch.tensor(1)))]
    again = [mask_of(mask_mod)._flatten()[1] for mask_mod in (causal, no_further_than(torch.tensor(2)))]
    assert contexts == again and contexts[0] != contexts[1]
    assert [hash(context) for context in contexts] == [hash(context) for context in again]


@pytest.mark.usefixtures("environment")
def test_leaves_have_the_names_of_attributes() -> None:
    leaves, context = mask_of(no_further_than(torch.tensor(70)))._flatten_with_keys()
    names = [key.name for key, _ in leaves]
    assert names[:2] == ["kv_num_blocks", "kv_indices"] and names[-1] == "_closure_0" and len(names) == 9
    assert context == mask_of(no_further_than(torch.tensor(71)))._flatten()[1]


def test_a_program_registers_the_mask_and_maps_over_it(run_python: Any) -> None:
    run_python(
        """
        import torch, torchspan, warnings
        torchspan.activate(device="off")
        warnings.simplefilter("ignore")
        from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
        from torch.utils import _pytree as pytree

        pytree.register_pytree_node(
            BlockMask, BlockMask._flatten, BlockMask._unflatten, flatten_with_keys_fn=BlockMask._flatten_with_keys,
            serialized_type_name="torch.nn.attention.flex_attention.BlockMask",
        )
        def mask_of(distance):
            return create_block_mask(lambda b, h, q, k: q - k <= distance, None, None, 128, 128, device="cpu", BLOCK_SIZE=64)
        def program(x, mask):
            return flex_attention(x, x, x, block_mask=mask)
        x = torch.randn(1, 1, 128, 8)
        mask = mask_of(torch.tensor(5))
        leaves, spec = pytree.tree_flatten({"mask": mask, "x": x})
        assert len(leaves) == 10 and spec == pytree.tree_structure({"mask": mask_of(torch.tensor(6)), "x": x})
        again = pytree.tree_map(lambda leaf: leaf.clone(), mask)
        assert torch.equal(program(x, again), program(x, mask))
        """
    )
