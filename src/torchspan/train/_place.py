"""Place: the device of a process of a job, and the backend by which it talks to the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchspan.core.errors import InputError


@dataclass(frozen=True)
class Ranks:
    """A process among those of its job: `rank` of `world_size`, `local_rank` of the `num_local` on this machine.

    >>> Ranks.of({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"})
    Ranks(rank=5, world_size=8, local_rank=1, num_local=4)
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    num_local: int = 1

    @staticmethod
    def of(environ: Mapping[str, str]) -> Ranks:
        """What a launcher says in the environment; alone where it says nothing, on one machine where it names none."""
        rank, world_size = _number(environ, "RANK", 0), _number(environ, "WORLD_SIZE", 1)
        return Ranks(rank, world_size, _number(environ, "LOCAL_RANK", rank), _number(environ, "LOCAL_WORLD_SIZE", world_size))


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdecimal():
        raise InputError(f"{name} is {text!r} in the environment; expected a whole number, as torchrun sets it")
    return int(text)


@dataclass(frozen=True)
class Place:
    """A device by `device_type` and `index` (None: the only one), and the `backend` of the process group; `reason` says why."""

    device_type: str
    index: int | None
    backend: str
    reason: str

    @property
    def device(self) -> str:
        """The device as torch writes it.

        >>> Place("cuda", 1, "cpu:gloo,cuda:nccl", "").device, Place("cpu", None, "gloo", "").device
        ('cuda:1', 'cpu')
        """
        return self.device_type if self.index is None else f"{self.device_type}:{self.index}"


def choose_place(num_gpus: int, has_nccl: bool, ranks: Ranks) -> Place:
    """A GPU of its own for each rank and NCCL, where there are as many; else the CPU and gloo.

    With NCCL there is gloo beside it, for what is sent from the CPU.

    >>> choose_place(num_gpus=8, has_nccl=True, ranks=Ranks(1, 2, 1, 2))
    Place(device_type='cuda', index=1, backend='cpu:gloo,cuda:nccl', reason='each rank of this machine has a GPU of its own')
    >>> choose_place(num_gpus=1, has_nccl=True, ranks=Ranks(1, 2, 1, 2)).reason
    '1 GPU for 2 ranks here; NCCL needs one for each'
    """
    if not num_gpus:
        return Place("cpu", None, "gloo", "no CUDA GPU is here")
    if ranks.world_size > 1 and not has_nccl:
        return Place("cpu", None, "gloo", f"this torch has no NCCL, by which {ranks.world_size} ranks on GPUs would talk")
    if num_gpus < ranks.num_local:
        gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
        return Place("cpu", None, "gloo", f"{gpus} for {ranks.num_local} ranks here; NCCL needs one for each")
    if ranks.world_size == 1:
        return Place("cuda", 0, "cpu:gloo,cuda:nccl", "a CUDA GPU is here")
    return Place("cuda", ranks.local_rank, "cpu:gloo,cuda:nccl", "each rank of this machine has a GPU of its own")


def place_of_group(backend: str, current_gpu: int | None) -> Place:
    """The place of a process whose group was made by somebody else: the current GPU where the group has NCCL.

    >>> place_of_group("cpu:gloo,cuda:nccl", current_gpu=3).device, place_of_group("gloo", current_gpu=None).device
    ('cuda:3', 'cpu')
    """
    reason = "the process group was there before"
    if "nccl" in backend and current_gpu is not None:
        return Place("cuda", current_gpu, backend, reason)
    return Place("cpu", None, backend, reason)
