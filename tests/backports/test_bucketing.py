"""Bucketing: collectives are told apart, and FSDP's become fewer; that numbers stay: test_overlap_manual_scheduling.py."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from torchspan.backports._base import REGISTRY, is_lacking

PROGRAM = """
import json
import torch, torchspan
torchspan.activate(device="off")
import torch.distributed as dist
from torch._inductor.fx_passes import bucketing
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
group = dist.group.WORLD.group_name
ops = torch.ops._c10d_functional


def gathered(x):
    return ops.wait_tensor(ops.all_gather_into_tensor(x, 2, group))


def scattered(x):
    return ops.wait_tensor(ops.reduce_scatter_tensor(x, "sum", 2, group))


def program(a, b, c, x):
    out = x @ gathered(a) @ gathered(b.float()) @ gathered(c)
    y = gathered(out * 2)  # of something computed: not FSDP's
    return y, scattered(out), scattered(out * 3)


def count(gm, kind):
    return sum(kind in str(node.target) for node in gm.graph.nodes)


report = {}
inputs = torch.randn(4, 8), torch.randn(4, 8).half(), torch.randn(4, 8), torch.randn(4, 8)
for name, cap in (("all", None), ("small", lambda bucket: 0.0005)):
    gm = make_fx(program, tracing_mode="fake")(*inputs)
    told = {
        kind: sum(getattr(bucketing, kind)(node) for node in gm.graph.nodes)
        for kind in ("is_all_gather_into_tensor", "is_reduce_scatter_tensor", "is_wait_tensor", "is_fsdp_reduce_scatter")
    }
    shapes = [tuple(value.shape) for value in gm(*inputs)]
    bucketing.bucket_all_gather(gm, cap)
    bucketing.bucket_reduce_scatter(gm, cap)
    gm.graph.lint()
    assert [tuple(value.shape) for value in gm(*inputs)] == shapes
    report[name] = [count(gm, "all_gather_into_tensor"), count(gm, "reduce_scatter_tensor")]
print(json.dumps({"told": told, **report}))
"""


@pytest.mark.skipif(
    not is_lacking(REGISTRY.get("bucketing").BACKPORT), reason="torch's own takes its arguments in an order of each release"
)
def test_collectives_are_told_apart_and_fsdps_are_merged_up_to_the_size_asked_for(run_python: Any) -> None:
    answer = json.loads(run_python(PROGRAM).stdout.strip().splitlines()[-1])
    assert answer["told"] == {
        "is_all_gather_into_tensor": 4,
        "is_reduce_scatter_tensor": 2,
        "is_wait_tensor": 6,
        "is_fsdp_reduce_scatter": 2,
    }
    assert answer["all"] == [2, 1], "three gathers of parameters become one; that of something computed stays"
    assert answer["small"] == [3, 1], "two of 256 bytes in a bucket of 524, and one more"


def test_nodes_are_told_apart_as_upstream_does(environment: Any) -> None:
    from torch._inductor.fx_passes.bucketing import (
        is_all_gather_into_tensor,
        is_wait_tensor,
        is_wait_tensor_from_all_gather_into_tensor,
    )

    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    gather = graph.call_function(torch.ops._c10d_functional.all_gather_into_tensor.default, (x, 2, "group"))
    wait = graph.call_function(torch.ops._c10d_functional.wait_tensor.default, (gather,))
    assert is_all_gather_into_tensor(gather) and not is_all_gather_into_tensor(wait)
    assert is_wait_tensor(wait) and is_wait_tensor_from_all_gather_into_tensor(wait) and not is_wait_tensor(x)


OPTIONS = """
import json
import torch, torchspan
torchspan.activate(device="off")
import torch.distributed as dist
import torch._inductor.config as config
from torch._inductor.fx_passes.post_grad import post_grad_passes
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
group = dist.group.WORLD.group_name
ops = torch.ops._c10d_functional


def program(a, b, c, x):
    whole = [ops.wait_tensor(ops.all_gather_into_tensor(part, 2, group)) for part in (a, b, c)]
    out = x @ whole[0] @ whole[1] @ whole[2]
    return [ops.wait_tensor(ops.reduce_scatter_tensor(out * i, "sum", 2, group)) for i in range(2)]


def collectives():
    gm = make_fx(program, tracing_mode="fake")(*(torch.randn(4, 8) for _ in range(4)))
    fake_mode = next(iter(gm.graph.nodes)).meta["val"].fake_mode
    with V.set_fake_mode(fake_mode):
        post_grad_passes(gm, True)
    gm.graph.lint()
    targets = [str(node.target) for node in gm.graph.nodes]
    return [sum(kind in target for target in targets) for kind in ("all_gather_into_tensor", "reduce_scatter_tensor")]


report = {"default": collectives()}
with config.patch({"bucket_all_gathers_fx": "all", "bucket_reduce_scatters_fx": "all"}):
    report["all"] = collectives()
    with config.patch({"bucket_all_gathers_fx_bucket_size_determinator": lambda index: 0.0001}):
        report["small gathers"] = collectives()
try:
    config.bucket_everything = True
except AttributeError:
    report["unknown"] = "refused"
print(json.dumps(report))
"""


def test_inductor_merges_collectives_where_its_options_ask_for_it(run_python: Any) -> None:
    answer = json.loads(run_python(OPTIONS).stdout.strip().splitlines()[-1])
    assert answer == {"default": [3, 2], "all": [1, 1], "small gathers": [3, 1], "unknown": "refused"}
