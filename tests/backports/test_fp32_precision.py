"""fp32_precision is read, set, inherited and refused as on a torch that has it, and it reaches what computes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError
from torchspan.environment.scope import Environment

BACKPORT = REGISTRY.get("fp32_precision").BACKPORT


def places() -> dict[str, object]:
    backends = torch.backends
    return {
        "all": backends,
        "cudnn": backends.cudnn,
        "cuda.matmul": backends.cuda.matmul,
        "cudnn.conv": backends.cudnn.conv,
        "cudnn.rnn": backends.cudnn.rnn,
        "mkldnn": backends.mkldnn,
        "mkldnn.matmul": backends.mkldnn.matmul,
        "mkldnn.conv": backends.mkldnn.conv,
        "mkldnn.rnn": backends.mkldnn.rnn,
    }


def values() -> dict[str, str]:
    return {name: place.fp32_precision for name, place in places().items()}  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def as_it_was(environment: Environment) -> Iterator[None]:
    yield
    for place in places().values():
        place.fp32_precision = "none"  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


def test_an_assignment_is_read_where_it_was_made_and_inherited_below() -> None:
    torch.backends.fp32_precision = "tf32"
    assert set(values().values()) == {"tf32"}
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    assert {name for name, value in values().items() if value == "ieee"} == {"cuda.matmul", "cudnn.conv", "cudnn.rnn"}
    torch.backends.fp32_precision = "bf16"  # which CUDA has not
    assert (values()["cudnn"], values()["mkldnn"], values()["mkldnn.conv"]) == ("none", "bf16", "bf16")
    torch.backends.mkldnn.fp32_precision = "ieee"  # as torch's own, it sets that of all
    assert values()["all"] == "ieee"


def test_the_older_switches_follow_and_are_followed() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    if is_lacking(BACKPORT):  # newer torch may refuse to read the older switches after the newer ones were set
        assert torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    assert not is_lacking(BACKPORT) or torch.get_float32_matmul_precision() == "medium"
    torch.set_float32_matmul_precision("highest")
    assert values()["cuda.matmul"] == values()["mkldnn.matmul"] == "ieee"
    for place in (torch.backends.cudnn.conv, torch.backends.cudnn.rnn):
        place.fp32_precision = "ieee"
    assert not is_lacking(BACKPORT) or not torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    assert values()["cudnn.conv"] == values()["cudnn.rnn"] == "tf32"
    torch.backends.cudnn.allow_tf32 = False
    assert values()["cudnn.conv"] == values()["cudnn.rnn"] == "none"


def test_flags_hold_inside_only() -> None:
    for module in (torch.backends, torch.backends.cudnn, torch.backends.mkldnn):
        quiet = {"allow_tf32": None} if module is torch.backends.mkldnn else {}  # it warns of TF32 without an Intel GPU
        with module.flags(fp32_precision="tf32", **quiet):
            assert module.fp32_precision == "tf32"
        assert module.fp32_precision == "none"


def test_other_attributes_are_none_of_these_objects() -> None:
    with pytest.raises(AttributeError, match="Unknown attribute other"):
        torch.backends.cudnn.conv.other = 1
    with pytest.raises(AttributeError, match="Unknown attribute other"):
        torch.backends.cuda.matmul.other  # noqa: B018
    assert torch.backends.cudnn.conv.op == "conv"


def test_what_is_no_precision_here_is_refused() -> None:
    if not is_lacking(BACKPORT):
        pytest.skip("torch's own errors, which differ from release to release")
    with pytest.raises(RuntimeError, match="Unknown precision: fp8; expected one of"):
        torch.backends.fp32_precision = "fp8"
    with pytest.raises(RuntimeError, match="backend 'cuda' does not support precision 'bf16'"):
        torch.backends.cuda.matmul.fp32_precision = "bf16"
    with pytest.raises(
        UnsupportedError, match=r"mkldnn\.conv\.fp32_precision = 'bf16': .* torch has it since 2\.9\.0; leave it"
    ):
        torch.backends.mkldnn.conv.fp32_precision = "bf16"
    assert values()["cuda.matmul"] == values()["mkldnn.conv"] == "none"
