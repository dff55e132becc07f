"""Context parallelism is found at its newer place, and is what it is at the older."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("environment")


def test_both_places_have_the_same_objects() -> None:
    from torch.distributed.tensor.experimental import _attention
    from torch.distributed.tensor.experimental import _context_parallel as package
    from torch.distributed.tensor.experimental._context_parallel import _attention as inner
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import _HeadTailLoadBalancer

    assert package._ContextParallel is inner._ContextParallel is _attention._ContextParallel
    assert package._context_parallel_shard is _attention._context_parallel_shard
    assert package._HeadTailLoadBalancer is _HeadTailLoadBalancer is _attention._HeadTailLoadBalancer
    assert package.context_parallel is _attention.context_parallel
    assert package._HeadTailLoadBalancer(8, 2, "cpu")._generate_indices().tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
    assert callable(inner.flex_cp_allgather)
