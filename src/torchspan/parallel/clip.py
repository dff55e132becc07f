"""Clipping gradients by their norm over all ranks, whichever meshes the parameters are on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float, norm_type: float = 2.0) -> Tensor:
    """Scale the gradients of `parameters`, in place, so that their norm together is `max_norm` at most; the norm before, ().

    As ``torch.nn.utils.clip_grad_norm_``, which refuses parameters of several meshes: those of experts and the dense ones.
    Every rank of the job must call this.

    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0), weight.grad
    (tensor(5.), tensor([0.6000, 0.8000]))
    """
    by_mesh: dict[object, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            by_mesh.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter.grad)
    norms = [_whole(torch.nn.utils.get_total_norm(gradients, norm_type)) for gradients in by_mesh.values()]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros(())
    scale = (max_norm / (total + 1e-6)).clamp(max=1.0)
    for gradients in by_mesh.values():
        for gradient in gradients:
            (gradient.to_local() if isinstance(gradient, DTensor) else gradient).mul_(scale)
    return total


def _whole(norm: Tensor) -> Tensor:
    """A norm over all ranks, on each of them."""
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
