"""``torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch``: it can be called; this torch never warns."""

from __future__ import annotations

from torchspan.backports._base import Backport

_NAME = "set_warn_on_accumulate_grad_stream_mismatch"


def set_warn_on_accumulate_grad_stream_mismatch(enabled: bool) -> None:
    """Say whether to warn where a gradient is accumulated on another stream than it was made on.

    This torch has no such warning to switch: nothing changes.
    """
    BACKPORT.record_use(f"torch.autograd.graph.{_NAME}({enabled})")


set_warn_on_accumulate_grad_stream_mismatch.__module__ = "torch.autograd.graph"

BACKPORT = Backport(
    name="accumulate_grad_stream_warning",
    summary=f"the switch for a warning about streams can be called: torch.autograd.graph.{_NAME}",
    target="torch.autograd.graph",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/autograd/graph.py",
    differs="this torch has no such warning, so that there is nothing to switch",
    names={_NAME: lambda: set_warn_on_accumulate_grad_stream_mismatch},
)
