"""``aot_compile_joint_with_descriptors(fw_compiler=…, bw_compiler=…, partition_fn=…)``, which torch 2.9's own does not take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport

_NAME = "aot_compile_joint_with_descriptors"
_NATIVE = "_torchspan_native"


def _with_compilers(compile_joint: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own function, which finds its compilers in the settings of the joint graph: they are put there."""

    def aot_compile_joint_with_descriptors(
        jd: Any,
        *,
        partition_fn: Callable[..., Any] | None = None,
        fw_compiler: Callable[..., Any] | None = None,
        bw_compiler: Callable[..., Any] | None = None,
    ) -> Callable[..., Any]:
        choices = {
            "partition_fn": partition_fn,
            "fw_compiler": fw_compiler,
            "inference_compiler": fw_compiler,
            "bw_compiler": bw_compiler or fw_compiler,
        }
        for name, value in choices.items():
            if value is not None:
                setattr(jd._aot_state.aot_config, name, value)
        return compile_joint(jd)

    functools.update_wrapper(aot_compile_joint_with_descriptors, compile_joint)
    names = vars(aot_compile_joint_with_descriptors)
    names[_NATIVE] = names.pop("__wrapped__")  # its signature is its own
    return aot_compile_joint_with_descriptors


def _lacks(module: ModuleType | None) -> bool:
    function = vars(module).get(_NAME)
    native = getattr(function, _NATIVE, function)
    if native is None or native.__globals__["__name__"].startswith("torchspan."):
        return True
    return "fw_compiler" not in inspect.signature(native).parameters


BACKPORT = Backport(
    name="joint_compilers",
    summary="aot_compile_joint_with_descriptors(fw_compiler=…, bw_compiler=…, partition_fn=…)",
    target="torch._functorch.aot_autograd",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/162692",
    differs="where torch has no such function at all (2.8), that of joint_with_descriptors takes them",
    replaces={_NAME: _with_compilers},
    lacks=_lacks,
)
