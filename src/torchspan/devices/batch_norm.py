"""``SyncBatchNorm``, whose own kernels are a GPU's: the same statistics over all ranks, from collectives of any device."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Replacement


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The one method that refuses what is not on a GPU."""
    yield Replacement("batch_norm", "torch.nn", "SyncBatchNorm.forward", partial(_forward, redirection))


def _forward(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if input.device.type != redirection.target:
            found: torch.Tensor = old(self, input)
            return found
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        redirection.note("SyncBatchNorm", None, "its kernels are for GPUs: computed with the target's own and all-reduce")
        group = self.process_group or torch.distributed.group.WORLD
        is_shared = self.training and torch.distributed.is_initialized() and torch.distributed.get_world_size(group) > 1
        return _over_ranks(self, input, group) if is_shared else torch.nn.modules.batchnorm._BatchNorm.forward(self, input)

    return forward


def _over_ranks(module: Any, input: torch.Tensor, group: Any) -> torch.Tensor:
    """Normalise by the mean and the variance over the batches of all ranks, which may differ in size."""
    from torch.distributed.nn.functional import all_reduce  # gives gradients back to every rank

    dims = [0, *range(2, input.dim())]
    shape = [1, -1, *[1] * (input.dim() - 2)]
    values = input.float()
    count = values.new_full((1,), values.numel() / values.shape[1])
    totals = all_reduce(torch.cat([values.sum(dims), count]), group=group)
    count, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
    centred = values - mean.view(shape)
    variance = all_reduce(centred.square().sum(dims), group=group) / count
    _update(module, mean.detach(), variance.detach() * count / (count - 1))
    output = centred * torch.rsqrt(variance + module.eps).view(shape)
    if module.affine:
        output = output * module.weight.view(shape) + module.bias.view(shape)
    return output.to(input.dtype)


def _update(module: Any, mean: torch.Tensor, variance: torch.Tensor) -> None:
    if not module.track_running_stats:
        return
    module.num_batches_tracked.add_(1)
    share = 1 / int(module.num_batches_tracked) if module.momentum is None else module.momentum
    module.running_mean.lerp_(mean, share)
    module.running_var.lerp_(variance, share)
