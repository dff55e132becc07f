"""Options of torch.export are read and patched; what a torch does not do cannot be turned on."""

from __future__ import annotations

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("environment")


def test_export_runs_with_its_newer_tracer_asked_for() -> None:
    with torch.no_grad(), torch._export.config.patch(use_new_tracer_experimental=True):
        exported = torch.export.export(torch.nn.ReLU(), (torch.ones(2),), strict=True)
    assert torch.equal(exported.module()(-torch.ones(2)), torch.zeros(2))


def test_what_this_torch_does_not_do_cannot_be_turned_on() -> None:
    with torch._export.config.patch("use_legacy_dynamo_graph_capture", True):
        assert torch._export.config.use_legacy_dynamo_graph_capture is True
    if is_lacking(REGISTRY.get("export_config").BACKPORT):
        refused = torch._export.config.patch(detect_non_strict_fake_tensor_leaks=True)
        with pytest.raises(UnsupportedError, match=r"leaks = True: .* since 2\.10\.0; leave it False"), refused:
            pass
