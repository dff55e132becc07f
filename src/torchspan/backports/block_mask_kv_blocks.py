"""``BlockMask.from_kv_blocks(…, compute_q_blocks=)`` and the write order of dQ's blocks, which a mask of this torch has not."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport, Change
from torchspan.core.errors import UnsupportedError

_PLACE = "torch.nn.attention.flex_attention"
_ORDERS = ("dq_write_order", "dq_write_order_full", "dq_kv_order", "dq_kv_order_spt")


def _check_orders(place: str, orders: dict[str, Any]) -> None:
    for name, value in orders.items():
        if name not in _ORDERS:
            raise TypeError(f"{place} got an unexpected keyword argument {name!r}")
        if value is not None:
            raise UnsupportedError(
                f"{place}({name}=…): this torch's kernels add up dQ in an order of their own; "
                "torch has it since 2.13.0; leave it None"
            )


def _computing(from_kv_blocks: Any) -> Any:
    """from_kv_blocks, which has the blocks of queries computed whatever is asked for."""

    @functools.wraps(from_kv_blocks.__func__)
    def build(
        cls: Any,
        kv_num_blocks: Any,
        kv_indices: Any,
        full_kv_num_blocks: Any = None,
        full_kv_indices: Any = None,
        BLOCK_SIZE: Any = 128,
        mask_mod: Any = None,
        seq_lengths: Any = None,
        compute_q_blocks: bool = True,
        **orders: Any,
    ) -> Any:
        _check_orders("BlockMask.from_kv_blocks", orders)
        if not compute_q_blocks:
            BACKPORT.record_use("BlockMask.from_kv_blocks(compute_q_blocks=False): they are computed all the same")
        arguments = (kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices, BLOCK_SIZE, mask_mod, seq_lengths)
        return from_kv_blocks.__func__(cls, *arguments)

    decorator: Any = classmethod
    return decorator(build)


def _without_orders(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def construct(self: Any, *args: Any, **options: Any) -> None:
        orders = {name: options.pop(name) for name in _ORDERS if name in options}
        _check_orders("BlockMask", orders)
        init(self, *args, **options)

    return construct


def _no_order(old: Any) -> object:
    return old or property(lambda self: None)


def _lacks(module: ModuleType | None) -> bool:
    return module is None or "compute_q_blocks" not in inspect.signature(module.BlockMask.from_kv_blocks).parameters


BACKPORT = Backport(
    name="block_mask_kv_blocks",
    summary="BlockMask.from_kv_blocks(compute_q_blocks=…), and BlockMask(dq_write_order=None, …)",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/nn/attention/flex_attention.py",
    differs="the blocks of queries are computed always, which costs memory only; an order of dQ's blocks is refused",
    replaces={"BlockMask.from_kv_blocks": _computing, "BlockMask.__init__": _without_orders},
    also=(
        Change("torch.nn.attention.flex_attention", "BlockMask.dq_write_order", _no_order, create=True),
        Change("torch.nn.attention.flex_attention", "BlockMask.dq_write_order_full", _no_order, create=True),
        Change("torch.nn.attention.flex_attention", "BlockMask.dq_kv_order", _no_order, create=True),
        Change("torch.nn.attention.flex_attention", "BlockMask.dq_kv_order_spt", _no_order, create=True),
    ),
    lacks=_lacks,
)
