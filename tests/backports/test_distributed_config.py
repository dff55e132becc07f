"""Options of torch.distributed are read and patched; what a torch cannot do cannot be turned on."""

from __future__ import annotations

import pytest

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

BACKPORT = REGISTRY.get("distributed_config").BACKPORT

pytestmark = pytest.mark.usefixtures("environment")


def test_options_are_off_and_stay_off() -> None:
    import torch.distributed.config as options

    assert options.use_torchcomms is False
    with options.patch("use_torchcomms", False), options.patch(use_torchcomms=False):
        assert options.use_torchcomms is False
    with options.patch({"use_torchcomms": False}):
        assert options.use_torchcomms is False


def test_to_turn_one_on_says_why_it_cannot_be() -> None:
    import torch.distributed.config as options

    if not is_lacking(BACKPORT):
        with options.patch("use_torchcomms", True):
            assert options.use_torchcomms is True
        return
    with pytest.raises(UnsupportedError, match=r"use_torchcomms = True: .* since 2\.11\.0; leave it False"):
        options.use_torchcomms = True
    with pytest.raises(UnsupportedError, match="rank"), options.patch("compile_on_one_rank", True):
        pass
    with pytest.raises(AttributeError, match="other"), options.patch(other=True):
        pass
