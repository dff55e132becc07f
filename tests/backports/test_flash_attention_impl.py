"""Flash attention implementations: what a package registers is activated, is replaced by the next, and is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import attention

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.core.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("environment")

OURS = is_lacking(REGISTRY.get("flash_attention_impl").BACKPORT)
NAMESPACE = "torchspan_test_flash"


class Package:
    """One that registers a kernel of an operator, as those do that bring a flash attention."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.library: Any = None

    def register(self) -> Package:
        self.library = torch.library.Library(NAMESPACE, "IMPL")
        self.library.impl("attend", lambda x: torch.full_like(x, self.value), "CPU")
        return self

    def remove(self) -> None:
        self.library._destroy()


@pytest.fixture
def operator() -> Iterator[Any]:
    library = torch.library.Library(NAMESPACE, "DEF")
    library.define("attend(Tensor x) -> Tensor")
    yield getattr(torch.ops, NAMESPACE).attend
    attention.restore_flash_attention_impl(_raise_warn=False)
    library._destroy()


def test_each_activation_takes_the_one_before_back_and_restoring_the_last(operator: Any) -> None:
    attention.register_flash_attention_impl("one", register_fn=Package(1.0).register)
    attention.register_flash_attention_impl("two", register_fn=Package(2.0).register)
    assert {"one", "two"} <= set(attention.list_flash_attention_impls())
    assert attention.current_flash_attention_impl() is None
    for name, value in (("one", 1.0), ("two", 2.0)):
        attention.activate_flash_attention_impl(name)
        assert attention.current_flash_attention_impl() == name
        assert operator(torch.zeros(1)) == value
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None
    with pytest.raises(NotImplementedError):
        operator(torch.zeros(1))


def test_one_without_a_handle_is_activated_and_not_kept() -> None:
    calls: list[int] = []
    attention.register_flash_attention_impl("kept by itself", register_fn=lambda: calls.append(1))
    attention.activate_flash_attention_impl("kept by itself")
    assert calls == [1]
    assert attention.current_flash_attention_impl() is None


def test_an_unknown_one_is_an_error_that_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"Unknown flash attention impl 'FA0'.*Available implementations: \[.*'FA3', 'FA4'"):
        attention.activate_flash_attention_impl("FA0")


def test_restoring_torchs_own_where_it_is_active_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    attention.restore_flash_attention_impl()
    assert len(caplog.records) == 1
    attention.restore_flash_attention_impl(_raise_warn=False)
    assert len(caplog.records) == 1


@pytest.mark.skipif(not OURS, reason="torch's own can activate them, on some GPUs")
def test_those_that_a_newer_torch_brings_are_refused_with_the_release_and_the_way_out() -> None:
    with pytest.raises(UnsupportedError, match=r"'FA3'.*since 2\.10\.0; call its package directly"):
        attention.activate_flash_attention_impl("FA3")
