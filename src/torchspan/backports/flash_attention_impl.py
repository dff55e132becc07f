"""``torch.nn.attention.activate_flash_attention_impl`` and its like: which flash attention the operator of torch runs."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torchspan.backports._base import Backport, unavailable
from torchspan.core.errors import UnsupportedError

log = logging.getLogger("torchspan")

_PLACE = "torch.nn.attention"
_SINCE = "2.10.0"


class _Registry:
    """What can be activated, by name, and what is: its name and the handle that takes it back."""

    def __init__(self) -> None:
        self.activations: dict[str, Callable[..., Any]] = {name: _of_newer_torch(name) for name in ("FA3", "FA4")}
        self.active: tuple[str, Any] | None = None


def _of_newer_torch(name: str) -> Callable[..., Any]:
    def refuse() -> None:
        raise UnsupportedError(
            f"flash attention {name!r}: this torch does not know how to run it; torch has it since {_SINCE}; call its package "
            "directly, or let that register itself with register_flash_attention_impl"
        )

    return refuse


_registry = _Registry()


def register_flash_attention_impl(impl: str, *, register_fn: Callable[..., Any]) -> None:
    """Make an implementation known as `impl`.

    `register_fn` gives its kernels to torch's dispatcher, and may return a handle whose ``remove()`` takes them back.
    """
    _registry.activations[impl] = register_fn


def activate_flash_attention_impl(impl: str) -> None:
    """Run flash attention by the implementation `impl` from now on, instead of the one before.

    Raises:
        ValueError: it is not known.
        UnsupportedError: it is one that a newer torch brings itself.
    """
    restore_flash_attention_impl(_raise_warn=False)
    if impl not in _registry.activations:
        raise ValueError(f"Unknown flash attention impl {impl!r}. Available implementations: {list_flash_attention_impls()}")
    handle = _registry.activations[impl]()
    if handle is not None:
        _registry.active = impl, handle


def list_flash_attention_impls() -> list[str]:
    """The names of all implementations that are known, sorted."""
    return sorted(_registry.activations)


def current_flash_attention_impl() -> str | None:
    """The name of the active implementation that can be taken back; None while it is torch's own."""
    return None if _registry.active is None else _registry.active[0]


def restore_flash_attention_impl(_raise_warn: bool = True) -> None:
    """Run flash attention by torch's own implementation again; with `_raise_warn`, log where that is so already."""
    if _registry.active is not None:
        _registry.active[1].remove()
    elif _raise_warn:
        log.warning("restore_flash_attention_impl: no other implementation than torch's own is active")
    _registry.active = None


_PUBLIC = (
    register_flash_attention_impl,
    activate_flash_attention_impl,
    list_flash_attention_impls,
    current_flash_attention_impl,
)
for _public in (*_PUBLIC, restore_flash_attention_impl):
    _public.__module__ = _PLACE


def _build_restore() -> object:
    """Ours; but torch 2.10 has a registry of its own, which only torch's own could restore."""
    import torch.nn.attention as module

    if "activate_flash_attention_impl" in vars(module) and module.activate_flash_attention_impl not in _PUBLIC:
        return unavailable(f"{_PLACE}.restore_flash_attention_impl", "this torch cannot take one back", "2.11.0")
    return restore_flash_attention_impl


BACKPORT = Backport(
    name="flash_attention_impl",
    summary="which flash attention torch's operator runs: torch.nn.attention.activate_flash_attention_impl and its like",
    target=_PLACE,
    since=_SINCE,
    came={"2.11.0": ("restore_flash_attention_impl",)},
    first_forms={"2.10": "keeps no handle, cannot take an implementation back, and lists the known ones in other words"},
    upstream="https://github.com/pytorch/pytorch/pull/167348",
    differs="FA3 and FA4 are known by name, and refused; what a package registers is activated and restored",
    names={function.__name__: (lambda function=function: function) for function in _PUBLIC}
    | {"restore_flash_attention_impl": _build_restore},
)
