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


def test_a_sequence_that_cannot_be_cut_evenly_has_no_balancer(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.distributed.tensor.experimental._context_parallel._attention import _cp_options
    from torch.distributed.tensor.experimental._context_parallel._load_balancer import _create_default_load_balancer

    monkeypatch.setattr(_cp_options, "enable_load_balance", True)
    balancer = _create_default_load_balancer(8, 2, "cpu")
    assert balancer is not None and balancer._generate_indices().tolist() == [[0, 1, 6, 7, 2, 3, 4, 5]]
    assert _create_default_load_balancer(10, 2, "cpu") is None
    monkeypatch.setattr(_cp_options, "enable_load_balance", False)
    assert _create_default_load_balancer(8, 2, "cpu") is None


def test_the_rules_of_sharding_can_be_imported() -> None:
    from torch.distributed.tensor.experimental._context_parallel._sharding_rules import register_cp_sharding_rules

    assert callable(register_cp_sharding_rules)
