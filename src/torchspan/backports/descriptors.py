"""``torch._functorch._aot_autograd.descriptors``: what the inputs and outputs of a joint graph mean."""

from __future__ import annotations

from functools import partial

from torchspan.backports import _descriptors
from torchspan.backports._base import Backport

BACKPORT = Backport(
    name="descriptors",
    summary="what the inputs and outputs of AOTAutograd's joint graphs mean: ParamAOTInput, GradAOTOutput and the others",
    target=_descriptors.PLACE,
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/157779",
    names={name: partial(getattr, _descriptors, name) for name in _descriptors.CLASSES},
    is_module=True,
)
