"""TorchScript: what a script asks of a GPU it asks of the target; what it copies there is a copy."""

from __future__ import annotations

import io

import pytest
import torch

from torchspan.core.report import Report

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit")  # torch deprecates it; programs use it still


def moves(x: torch.Tensor) -> torch.Tensor:
    y = x.cuda()
    y += 1
    z = x.to("cuda", torch.float64).to(device="cuda:0", dtype=torch.float32, non_blocking=True)
    return y + z + x.to("cuda").cpu()


def factories(x: torch.Tensor, n: int) -> torch.Tensor:
    here = torch.device("cuda")
    if n > 1:
        x = x + torch.zeros(2, device="cuda") + torch.ones([n], device=here) + torch.tensor([1.0, 2.0], device="cuda:0")
    return x + torch.zeros_like(x, device=here) + x.new_full([2], 1.0, device=here) + torch.arange(2, device=x.device)


def at_run_time(x: torch.Tensor, device: torch.device, other: torch.device | None = None) -> torch.Tensor:
    return x.to(device) + torch.ones(2, device=device) + torch.ones(2, device=other)


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x.cuda()) + torch.ones(2, device="cuda")


def test_what_a_script_moves_is_copied_to_the_target_and_recorded_at_its_line(redirected: Report) -> None:
    x = torch.ones(2)
    assert torch.jit.script(moves)(x).tolist() == [4, 4] and x.tolist() == [1, 1]
    sites = {(decision.subject, decision.site) for decision in redirected.decisions}
    line = moves.__code__.co_firstlineno
    assert ("torch.jit, aten::cuda(device='cuda')", f"{__file__}:{line + 1}") in sites
    assert {("torch.jit, aten::to(device='cuda')", f"{__file__}:{line + 3 + offset}") for offset in (0, 1)} <= sites


def test_what_a_script_makes_is_made_on_the_target(redirected: Report) -> None:
    assert torch.jit.script(factories)(torch.ones(2), 2).tolist() == [4, 6]


def test_a_device_that_is_known_when_a_script_runs_is_redirected_then(redirected: Report) -> None:
    script = torch.jit.script(at_run_time)
    assert script(torch.ones(2), torch.device("cuda")).tolist() == [3, 3]
    assert script(torch.ones(2), torch.device("cuda:0"), torch.device("cuda")).tolist() == [3, 3]
    assert script(torch.ones(2), torch.device("cpu"), torch.device("cpu")).tolist() == [3, 3]
    assert script(torch.ones(2), torch.device("meta"), torch.device("meta")).is_meta


def test_a_scripted_module_runs_is_saved_and_loaded_to_the_device(redirected: Report) -> None:
    module = torch.jit.script(Block().cuda())
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    loaded = torch.jit.load(file, map_location="cuda")
    assert torch.equal(loaded(torch.ones(1, 2)), module(torch.ones(1, 2)))
    frozen = torch.jit.freeze(torch.jit.script(Block().eval()))
    assert frozen(torch.ones(1, 2)).shape == (1, 2)


def test_a_trace_copies_what_it_moves_whatever_it_is_given(redirected: Report) -> None:
    trace = torch.jit.trace(lambda x: x.cuda() + torch.zeros(2, device="cuda"), torch.ones(2, device="cuda"))
    assert trace(torch.ones(2)).tolist() == trace(torch.ones(2, device="cuda")).tolist() == [1, 1]
