"""Binding: without an accelerator it fails with the reason, or goes on unbound where that was asked for."""

from __future__ import annotations

import os

import pytest
import torch

from torchspan.backports._base import has_module
from torchspan.core.errors import UnsupportedError

IS_OLDER = has_module("torch.numa") and tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)

pytestmark = [
    pytest.mark.usefixtures("environment"),
    pytest.mark.skipif(IS_OLDER, reason="torch's own has gpu_index for device_index before 2.14"),
]


def test_without_options_nothing_is_bound() -> None:
    from torch.numa.binding import _maybe_wrap_command_args_with_numa_binding, _maybe_wrap_with_numa_binding

    assert _maybe_wrap_with_numa_binding(max, device_index=0, numa_options=None) is max
    assert _maybe_wrap_command_args_with_numa_binding(("ls",), device_index=0, numa_options=None) == ("ls",)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="asks what happens without an accelerator")
def test_a_failure_is_an_error_or_passed_over_as_the_options_say() -> None:
    from torch.numa import binding

    strict = binding.NumaOptions(affinity_mode=binding.AffinityMode.NODE)
    lenient = binding.NumaOptions(affinity_mode=binding.AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    before = os.sched_getaffinity(0)
    with pytest.raises(RuntimeError, match="No accelerator available for NUMA binding"):
        binding._maybe_apply_numa_binding_to_current_process(device_index=0, numa_options=strict)
    binding._maybe_apply_numa_binding_to_current_process(device_index=0, numa_options=lenient)
    wrapped = binding._maybe_wrap_command_args_with_numa_binding(("ls",), device_index=0, numa_options=lenient)
    assert wrapped == ("ls",)
    assert binding._maybe_wrap_with_numa_binding(max, device_index=0, numa_options=lenient)(1, 2) == 2
    assert os.sched_getaffinity(0) == before
    assert binding.AffinityMode("core-complex") is binding.AffinityMode.CORE_COMPLEX


def test_the_launcher_takes_options_where_it_may_start_processes_unbound() -> None:
    from torch.distributed.launcher.api import LaunchConfig
    from torch.numa import binding

    lenient = binding.NumaOptions(affinity_mode=binding.AffinityMode.NODE, should_fall_back_if_binding_fails=True)
    config = LaunchConfig(1, 1, 1, numa_options=lenient)
    assert config.numa_options == lenient and config.nproc_per_node == 1
    assert LaunchConfig(min_nodes=1, max_nodes=1, nproc_per_node=2, numa_options=None).nproc_per_node == 2
    if not has_module("torch.numa"):
        strict = binding.NumaOptions(affinity_mode=binding.AffinityMode.NODE)
        with pytest.raises(UnsupportedError, match=r"LaunchConfig\(numa_options=.*this torch's launcher cannot bind"):
            LaunchConfig(1, 1, 1, numa_options=strict)
