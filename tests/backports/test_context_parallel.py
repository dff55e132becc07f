"""Context parallelism: sequences are cut over ranks and put together again, and flex_attention sees all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

OURS = is_lacking(REGISTRY.get("context_parallel").BACKPORT)


def attention(environment: Environment) -> Any:
    from torch.distributed.tensor.experimental import _attention

    return _attention


def test_head_and_tail_gives_every_rank_as_much_of_a_causal_mask(environment: Environment) -> None:
    indices = attention(environment)._HeadTailLoadBalancer(8, 2, "cpu")._generate_indices()
    assert indices.tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
    work = [part.sum().item() for part in indices[0].chunk(2)]
    assert work[0] == work[1]
    restore = attention(environment)._HeadTailLoadBalancer(8, 2, "cpu")._generate_indices(restore=True)
    assert indices[0][restore[0]].tolist() == list(range(8))


def test_documents_are_balanced_each_by_itself(environment: Environment) -> None:
    balancer = attention(environment)._PerDocumentHeadTailLoadBalancer([[4, 8], [12]], 2, "cpu")
    indices = balancer._generate_indices()
    by_document, by_rank = [0, 3, 1, 2, 4, 5, 10, 11, 6, 7, 8, 9], [0, 3, 4, 5, 10, 11, 1, 2, 6, 7, 8, 9]  # torch 2.15's
    assert indices[0].tolist() in (by_document, by_rank)
    assert indices[1].tolist() == [0, 1, 2, 9, 10, 11, 3, 4, 5, 6, 7, 8]
    restored = torch.stack([row[back] for row, back in zip(indices, balancer._generate_indices(restore=True))])
    assert restored.tolist() == [list(range(12))] * 2


def test_blocks_are_dealt_out_by_the_work_that_they_are(environment: Environment) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    balancer = attention(environment)._PTRRLoadBalancer
    times = torch.tensor([9, 14, 2, 20, 10, 15, 8, 14, 16, 19, 15, 3, 12, 1, 12, 10])
    groups = balancer.ptrr_scheduling(times, 4)
    assert groups.tolist() == [[3, 12, 13, 14], [2, 4, 7, 9], [1, 8, 11, 15], [0, 5, 6, 10]]
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 512, 512, device="cpu")
    indices = balancer(mask, 2)._generate_indices()
    assert indices.shape == (1, 512)
    assert [indices[0][start].item() // 128 for start in range(0, 512, 128)] == [0, 3, 1, 2]
    with pytest.raises(NotImplementedError, match="num_tasks 3 must be divisible by group_size 2"):
        balancer.ptrr_scheduling(torch.ones(3), 2)


PROGRAM = """
import sys
import torch, torchspan
torchspan.activate(device="off")
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.tensor import init_device_mesh
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

LENGTH = 512


class Attention(torch.nn.Module):
    def forward(self, query, key, value, block_mask=None):
        return flex_attention(query, key, value, block_mask=block_mask)


def documents(b, h, q, k):
    return (q >= k) & (q // 200 == k // 200)


def work(rank, port):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name in ("none", "head_tail", "ptrr"):
        attend(init_device_mesh("cpu", (2,)), name)
    dist.destroy_process_group()


def attend(mesh, name):
    from torch.distributed.tensor.experimental import _attention as cp
    torch.manual_seed(0)
    whole = [torch.randn(2, 2, LENGTH, 16, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    mask = create_block_mask(documents, 1, None, LENGTH, LENGTH, device="cpu")
    expected = flex_attention(*whole, block_mask=mask)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(expected, whole, weights)
    balancer = {
        "none": lambda: None,
        "head_tail": lambda: cp._HeadTailLoadBalancer(LENGTH, 2, "cpu"),
        "ptrr": lambda: cp._PTRRLoadBalancer(mask, 2),
    }[name]()
    *parts, part_weights, part_mask = cp._context_parallel_shard(
        mesh, [*(x.detach() for x in whole), weights, mask], [2] * 5, load_balancer=balancer)
    parts = [x.clone().requires_grad_() for x in parts]
    assert parts[0].shape == (2, 2, LENGTH // 2, 16)
    style = cp._ContextParallel(seq_dim=2, attention_type=cp._ContextParallel.AttentionType.FLEX)
    module = style._apply(Attention(), mesh)
    out = module(*parts, block_mask=part_mask)
    by_name = module(parts[0], key=parts[1], value=parts[2], block_mask=part_mask)
    torch.testing.assert_close(by_name, out, rtol=0, atol=0)
    found = torch.autograd.grad(out, parts, part_weights)
    tensors = cp.context_parallel_unshard(mesh, [out.detach(), *found], [2] * 4, balancer)
    torch.testing.assert_close(tensors, [expected.detach(), *gradients])
    named = cp._context_parallel_shard(mesh, {"x": whole[0].detach()}, {"x": 2}, load_balancer=balancer)
    torch.testing.assert_close(named["x"], parts[0].detach())
    try:
        cp._context_parallel_shard(mesh, [weights], [])
    except ValueError as cause:
        assert "number of elements" in str(cause)
    else:
        raise AssertionError("nothing was raised")
    from torch.distributed.tensor import DTensor
    before = DTensor._op_dispatcher._custom_op_handlers
    cp._enable_context_parallel_dispatcher()
    ring = torch.ops.aten._scaled_dot_product_flash_attention.default
    assert ring in DTensor._op_dispatcher._custom_op_handlers
    cp._disable_context_parallel_dispatcher()
    assert (ring in DTensor._op_dispatcher._custom_op_handlers) == (ring in before)


if __name__ == "__main__":
    mp.spawn(work, args=(int(sys.argv[1]),), nprocs=2)
"""


@pytest.mark.slow
@pytest.mark.skipif(not OURS, reason="flex_attention of newer torch has no backward on a CPU")
def test_flex_attention_over_two_ranks_is_that_of_one_with_its_gradients(run_python: Any, free_port: int) -> None:
    run_python(PROGRAM, str(free_port))


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def test_a_mask_that_cannot_be_cut_into_blocks_is_refused(environment: Environment) -> None:
    from torch.nn.attention.flex_attention import create_block_mask

    class Mesh:
        device_type = "cpu"
        size = staticmethod(lambda: 2)
        get_local_rank = staticmethod(lambda: 0)

    if not OURS:
        pytest.skip("torch's own asks its mesh for more")
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, None, 384, 384, device="cpu")
    with pytest.raises(NotImplementedError, match=r"Q_LEN 384 is not divisible by CP mesh world size 2 \* BLOCK_SIZE 128"):
        attention(environment)._context_parallel_shard(Mesh(), [mask], [2])
    with pytest.raises(ValueError, match="Unknown buffer type"):
        attention(environment)._context_parallel_shard(Mesh(), [3], [2])
