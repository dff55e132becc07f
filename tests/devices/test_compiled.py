"""Compiled, exported, traced and scripted code is redirected without one more graph break."""

from __future__ import annotations

import subprocess
from collections.abc import Callable

import pytest

Run = Callable[..., subprocess.CompletedProcess[str]]

PROGRAM = """
{first}
import torch
from torchspan.core.report import Report
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

report = Report()
environment = Environment(device_patches(Facts(), "auto", report), report)
environment.activate()
n = 4

def body(x):
    a = torch.arange(n, device="cuda")
    b = (x.to("cuda") + a).cuda()
    c = torch.tensor([1.0, 2.0, 3.0, 4.0], device=torch.device("cuda", 0))
    d = torch.zeros_like(c) + x.new_ones(4, device="cuda") + torch.zeros(4)
    return b + c + d + torch.full((4,), 2.0, device=c.device)

compiled = torch.compile(body, fullgraph=True, backend="aot_eager")
expected = torch.tensor([5.0, 7.0, 9.0, 11.0])
assert torch.equal(compiled(torch.ones(4)), expected) and torch.equal(compiled(torch.ones(4)), expected)
import torch._dynamo.utils
assert not torch._dynamo.utils.counters["graph_break"]
assert torch._dynamo.utils.counters["aot_autograd"]["ok"] == 1
sites = {{decision.subject: decision.site for decision in reversed(report.decisions)}}
assert sites["torch.arange(device='cuda')"] == f"{{__file__}}:{{body.__code__.co_firstlineno + 1}}", sites
assert sites["torch.tensor(device='cuda:0')"] == f"{{__file__}}:{{body.__code__.co_firstlineno + 3}}", sites

class Module(torch.nn.Module):
    def forward(self, x):
        return body(x)

exported = torch.export.export(Module(), (torch.ones(4),))
assert torch.equal(exported.module()(torch.ones(4)), expected)
assert torch.equal(torch.jit.trace(body, torch.ones(4))(torch.ones(4)), expected)
environment.deactivate()

torch._dynamo.reset()
def plain(x):
    return x.to(torch.float64) + torch.zeros_like(x) + torch.tensor([1.0])

plain = torch.compile(plain, fullgraph=True, backend="aot_eager")
assert plain(torch.ones(2)).tolist() == [2.0, 2.0]
"""


@pytest.mark.parametrize("first", ["", "import torch; torch.compile(lambda x: x + 1, backend='eager')(torch.ones(2))"])
def test_compiled_code_is_redirected_whether_dynamo_came_before_or_after(first: str, run_python: Run) -> None:
    run_python(PROGRAM.format(first=first))


def test_torchscript_knows_the_functions_behind_the_wrappers(run_python: Run) -> None:
    run_python(
        """
        import torch
        from torchspan.devices._base import device_patches
        from torchspan.environment.facts import Facts
        from torchspan.environment.scope import Environment

        def f(x):
            return torch.zeros(3) + torch.ones_like(x) + x

        with Environment(device_patches(Facts())):
            assert torch.jit.script(f)(torch.ones(3)).tolist() == [2.0] * 3
        assert torch.jit.script(f)(torch.ones(3)).tolist() == [2.0] * 3
        """
    )
