"""``torch.distributed._local_tensor``: every rank of a job simulated in one process; it can be imported, and not be used."""

from __future__ import annotations

from torchspan.backports._base import Backport


def _never_built() -> object:
    raise AssertionError("where it is not possible, something that says so is in its place")


BACKPORT = Backport(
    name="local_tensor",
    summary="every rank simulated in one process: torch.distributed._local_tensor",
    target="torch.distributed._local_tensor",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/164537",
    differs="it can be imported; its use is an error",
    names={
        "LocalTensor": _never_built,
        "LocalTensorMode": _never_built,
        "rank_map": _never_built,
        "tensor_map": _never_built,
    },
    is_module=True,
    impossible=lambda: (
        "a simulation needs a rank's number, and what DTensor computes from it, to be as many numbers as there are ranks; this "
        "torch's device meshes, DTensor and random numbers take a rank for one plain integer"
    ),
    instead="run real ranks (torchrun, the gloo backend), or one rank of a fake process group to see shapes and graphs",
)
