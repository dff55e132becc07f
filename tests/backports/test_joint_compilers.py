"""A joint graph is compiled with the compilers that are given, also where torch's own function takes none."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from torchspan.backports._base import REGISTRY, status

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
]


def test_the_compilers_that_are_given_compile_and_others_are_torchs_own() -> None:
    from functorch.compile import make_boxed_func
    from torch._functorch.aot_autograd import aot_compile_joint_with_descriptors, aot_export_joint_with_descriptors
    from torch._functorch.partitioners import default_partition

    model, x, calls = torch.nn.Linear(3, 3), torch.randn(4, 3), []

    def partition(*args: Any, **kwargs: Any) -> Any:
        calls.append("partition")
        return default_partition(*args, **kwargs)

    def compiler(name: str) -> Any:
        return lambda gm, inputs: calls.append(name) or make_boxed_func(gm.forward)

    for options in ({"fw_compiler": compiler("forward"), "bw_compiler": compiler("backward"), "partition_fn": partition}, {}):
        with ExitStack() as stack:
            joint = aot_export_joint_with_descriptors(stack, model, (x,))
            function = aot_compile_joint_with_descriptors(joint, **options)
        result = function(*model.parameters(), x)
        torch.testing.assert_close(result, model(x))
        result.sum().backward()
    assert calls == ["partition", "forward", "backward"]


def test_its_status_is_told_by_the_signature_of_torchs_own() -> None:
    from torch._functorch import aot_autograd

    backport = REGISTRY.get("joint_compilers").BACKPORT
    assert "fw_compiler" in inspect.signature(aot_autograd.aot_compile_joint_with_descriptors).parameters
    assert (status(backport)[0] == "native") == (torch.__version__ >= "2.10")
