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
            output: torch.Tensor = old(self, input)
            return output
        self._check_input_dim(input)
        self._check_non_zero_input_channels(input)
        redirection.note("SyncBatchNorm", None, "its kernels are for GPUs: computed with the target's own and all-reduce")
        distributed = torch.distributed
        is_shared = self.training and distributed.is_initialized() and distributed.get_world_size(self.process_group) > 1
        return _over_ranks(self, input) if is_shared else torch.nn.modules.batchnorm._BatchNorm.forward(self, input)

    return forward


class _Sum(torch.autograd.Function):
    """The sum over the ranks, whose gradient is the sum of theirs; no graph keeps a destroyed process group alive."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, module: Any) -> torch.Tensor:
        ctx.module = module
        return _summed(values, module)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _summed(grad, ctx.module), None


def _summed(values: torch.Tensor, module: Any) -> torch.Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(total, group=module.process_group)
    return total


def _over_ranks(module: Any, input: torch.Tensor) -> torch.Tensor:
    """Normalise by the mean and the variance over the batches of all ranks, which may differ in size."""
    dims = [0, *range(2, input.dim())]
    shape = [1, -1, *[1] * (input.dim() - 2)]
    values = input.float()
    count = values.new_full((1,), values.numel() / values.shape[1])
    totals = _Sum.apply(torch.cat([values.sum(dims), count]), module)
    count, mean = totals[-1].detach(), totals[:-1] / totals[-1].detach()
    centred = values - mean.view(shape)
    variance = _Sum.apply(centred.square().sum(dims), module) / count
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
