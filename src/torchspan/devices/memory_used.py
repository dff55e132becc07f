"""``torch.cuda.device_memory_used``: the used bytes of the device that stands in, where NVIDIA's driver is not there to ask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import stand_ins
from torchspan.environment.patch import Patch


def patches(redirection: Redirection) -> Iterable[Patch]:
    """``torch.cuda.device_memory_used()``, from what ``torch.cuda.mem_get_info`` is redirected to."""

    def device_memory_used(device: Any = None) -> int:
        with redirection.quiet():
            free, total = torch.cuda.mem_get_info(device)
        redirection.simulate("torch.cuda.device_memory_used()", "total less free memory of the device that stands in")
        return total - free

    yield from stand_ins("memory_used", "torch.cuda", {"device_memory_used": device_memory_used})
