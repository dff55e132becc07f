"""``torch.distributed._local_tensor``: every rank of a job simulated in one process; this torch is always outside of that."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from torchspan.backports._base import Backport, unavailable

_PLACE = "torch.distributed._local_tensor"
_CAUSE = (
    "a simulation needs a rank's number, and what DTensor computes from it, to be as many numbers as there are ranks; this "
    "torch's device meshes, DTensor and random numbers take a rank for one plain integer"
)
_INSTEAD = "run real ranks (torchrun, the gloo backend), or one rank of a fake process group to see shapes and graphs"
_SINCE = "2.10.0"


def local_tensor_mode() -> None:
    """The simulation that this is inside of: none."""
    return


def maybe_disable_local_tensor_mode() -> AbstractContextManager[None]:
    """Inside, no simulation is on: none is anywhere."""
    return nullcontext()


def maybe_run_for_local_tensor(func: Callable[..., Any]) -> Callable[..., Any]:
    """`func`, which a simulation would run for each rank."""
    return func


def rank_map(cb: Callable[[int], Tensor]) -> Tensor:
    """What `cb` makes of this process's rank."""
    from torch import distributed

    return cb(distributed.get_rank())


def tensor_map(tensor: Tensor, cb: Callable[[int, Tensor], Tensor | None]) -> Tensor | None:
    """What `cb` makes of this process's rank and the tensor."""
    from torch import distributed

    return cb(distributed.get_rank(), tensor)


def _indices_to_layout(indices: list[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shape and the strides of a regular grid of sorted ranks.

    Raises AssertionError for ranks that are no such grid.

    >>> _indices_to_layout([0, 1, 4, 5])
    ((2, 2), (4, 1))
    """
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    while len(indices) > 1:
        stride = math.gcd(*(after - before for before, after in itertools.pairwise(indices)))
        there = set(indices)
        starts = [index for index in indices if index - stride not in there]  # of the rows of the last dimension
        if stride == 0 or len(indices) % len(starts):
            raise AssertionError(f"Indices do not form a regular grid: {indices}")
        shape, strides = (len(indices) // len(starts), *shape), (stride, *strides)
        indices = starts
    return shape, strides


BACKPORT = Backport(
    name="local_tensor",
    summary="every rank simulated in one process: torch.distributed._local_tensor",
    target=_PLACE,
    since=_SINCE,
    came={
        "2.12.0": (
            "rank_map",
            "tensor_map",
        )
    },
    first_forms={"2.10, 2.11": "has a part of the module"},
    upstream="https://github.com/pytorch/pytorch/pull/164537",
    differs="a simulation cannot be begun; what only asks for one, or runs outside of one, works",
    names={
        "LocalTensor": lambda: unavailable("torch.distributed._local_tensor.LocalTensor", _CAUSE, _SINCE, _INSTEAD),
        "LocalTensorMode": lambda: unavailable("torch.distributed._local_tensor.LocalTensorMode", _CAUSE, _SINCE, _INSTEAD),
        "LocalRunnerMode": lambda: unavailable("torch.distributed._local_tensor.LocalRunnerMode", _CAUSE, _SINCE, _INSTEAD),
        "LocalIntNode": lambda: unavailable("torch.distributed._local_tensor.LocalIntNode", _CAUSE, _SINCE, _INSTEAD),
        "local_tensor_mode": lambda: local_tensor_mode,
        "enabled_local_tensor_mode": lambda: local_tensor_mode,
        "maybe_disable_local_tensor_mode": lambda: maybe_disable_local_tensor_mode,
        "maybe_run_for_local_tensor": lambda: maybe_run_for_local_tensor,
        "rank_map": lambda: rank_map,
        "tensor_map": lambda: tensor_map,
    },
    elsewhere={
        "torch.distributed._local_tensor._c10d": {
            "_indices_to_layout": lambda: _indices_to_layout,
            "local_p2p_op": lambda: unavailable("torch.distributed._local_tensor._c10d.local_p2p_op", _CAUSE, _SINCE, _INSTEAD),
            "wait_all": lambda: unavailable("torch.distributed._local_tensor._c10d.wait_all", _CAUSE, _SINCE, _INSTEAD),
        }
    },
    is_module=True,
)
