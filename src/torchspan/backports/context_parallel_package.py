"""``torch.distributed.tensor.experimental._context_parallel``: context parallelism at its newer place."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch

from torchspan.backports._base import Backport, get_backport, unavailable

_PLACE = "torch.distributed.tensor.experimental._context_parallel"


def _moved(name: str) -> Callable[[], object]:
    """What is at the older place, torch's own or torchspan's."""

    def build() -> object:
        native = getattr(importlib.import_module("torch.distributed.tensor.experimental._attention"), name, None)
        backport = get_backport("context_parallel")
        if native is None:  # 2.9 has no _LoadBalancer that could be replaced
            return backport.names[name]() if name in backport.names else backport.replaces[name](None)
        return native

    return build


def _gathering() -> object:
    """The operator that gathers the keys and values of all ranks of a group."""
    _moved("_ContextParallel")()  # it is defined with the class that uses it
    return torch.ops.cplib.flex_cp_allgather


def _create_default_load_balancer(seq_length: int, world_size: int, device: Any) -> Any:
    """What cuts a sequence into equal work for each rank; None where balancing is off or the sequence cannot be cut so."""
    options: Any = _moved("_cp_options")()
    if not options.enable_load_balance or seq_length % (2 * world_size):
        return None
    balancer: Any = _moved("_HeadTailLoadBalancer")()
    return balancer(seq_length, world_size, device)


def _refused_rules(name: str) -> Callable[[], object]:
    cause = "this torch's DTensor has no rules of attention for a cut sequence; its dispatcher is changed instead"
    instead = "call _enable_context_parallel_dispatcher, or context_parallel"
    return lambda: unavailable(f"{_PLACE}._sharding_rules.{name}", cause, "2.10.0", instead)


_BALANCERS = {
    "_create_default_load_balancer": lambda: _create_default_load_balancer,
    "_HeadTailLoadBalancer": _moved("_HeadTailLoadBalancer"),
    "_LoadBalancer": _moved("_LoadBalancer"),
    "_PTRRLoadBalancer": _moved("_PTRRLoadBalancer"),
    "_PerDocumentHeadTailLoadBalancer": _moved("_PerDocumentHeadTailLoadBalancer"),
}
_SHARED = {
    "_CausalBehavior": _moved("_CausalBehavior"),
    "_ContextParallel": _moved("_ContextParallel"),
    "_RotateMethod": _moved("_RotateMethod"),
    "_context_parallel_shard": _moved("_context_parallel_shard"),
    "_cp_options": _moved("_cp_options"),
    "_disable_context_parallel_dispatcher": _moved("_disable_context_parallel_dispatcher"),
    "_enable_context_parallel_dispatcher": _moved("_enable_context_parallel_dispatcher"),
    "_is_causal_behavior": _moved("_is_causal_behavior"),
    "context_parallel": _moved("context_parallel"),
    "context_parallel_unshard": _moved("context_parallel_unshard"),
    "flex_cp_allgather": _gathering,
    "set_rotate_method": _moved("set_rotate_method"),
}

BACKPORT = Backport(
    name="context_parallel_package",
    summary="context parallelism at its newer place: torch.distributed.tensor.experimental._context_parallel",
    target=_PLACE,
    since="2.10.0",
    first_forms={"2.10, 2.11, 2.12": "balances a sequence that cannot be cut evenly too"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/distributed/tensor/experimental/_context_parallel/__init__.py",
    differs="see the backport context_parallel",
    is_module=True,
    names={
        **{name: build for name, build in _BALANCERS.items() if name != "_create_default_load_balancer"},
        **_SHARED,
    },
    elsewhere={
        "torch.distributed.tensor.experimental._context_parallel._attention": {
            **_SHARED,
            "_templated_ring_attention": _moved("_templated_ring_attention"),
        },
        "torch.distributed.tensor.experimental._context_parallel._cp_custom_ops": {
            "flex_cp_allgather": _gathering,
        },
        "torch.distributed.tensor.experimental._context_parallel._load_balancer": _BALANCERS,
        "torch.distributed.tensor.experimental._context_parallel._sharding_rules": {
            "register_cp_sharding_rules": _refused_rules("register_cp_sharding_rules"),
            "unregister_cp_sharding_rules": _refused_rules("unregister_cp_sharding_rules"),
        },
    },
)
