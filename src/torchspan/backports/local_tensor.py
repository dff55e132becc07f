"""``torch.distributed._local_tensor``: every rank of a job simulated in one process; it can be imported, and not be used."""

from __future__ import annotations

from torchspan.backports._base import Backport


def _why_not() -> str:
    return (
        "a simulation needs a rank's number, and what DTensor computes from it, to be as many numbers as there are ranks; this "
        "torch's device meshes, DTensor and random numbers take a rank for one plain integer"
    )


def _never_built() -> object:
    raise AssertionError("where it is not possible, something that says so is in its place")


_NAMES = ("LocalTensor", "LocalTensorMode", "rank_map", "tensor_map")

BACKPORT = Backport(
    name="local_tensor",
    summary="every rank simulated in one process: torch.distributed._local_tensor",
    target="torch.distributed._local_tensor",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/164537",
    differs="it can be imported; its use is an error",
    names=dict.fromkeys(_NAMES, _never_built),
    is_module=True,
    impossible=_why_not,
    instead="run real ranks (torchrun, the gloo backend), or one rank of a fake process group to see shapes and graphs",
)
