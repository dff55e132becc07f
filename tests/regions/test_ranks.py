"""Two gloo ranks of a program with collectives in its forward: compiled, taken over in one call by both, or eager on both."""

import json

import pytest

PROGRAM = """
import json, os, sys, tempfile, threading, time, warnings
import torch, torch.distributed as dist, torch.distributed.fsdp, torch.multiprocessing as mp
from torch import nn
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
import torch.distributed.nn.functional as differentiable
import torchspan

class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x):
        y = self.linear(x)
        with torch.no_grad():
            mean = y.detach().mean(0)
            dist.all_reduce(mean)
        return (y - mean).tanh()

class Differentiable(InPlace):
    def forward(self, x):
        return differentiable.all_reduce(self.linear(x).relu()) * 2

class Subgroup(InPlace):
    def __init__(self):
        super().__init__()
        self.group = dist.new_group([0, 1])
    def forward(self, x):
        with torch.no_grad():
            return functional.all_gather_tensor(self.linear(x).relu(), 0, self.group).sum(0) * 2

class Branch(InPlace):
    def forward(self, x):
        y = self.linear(x)
        if self.training:
            dist.all_reduce(y.detach())
        return y.tanh()

class Parallel(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 4)
        parallelize_module(self, init_device_mesh("cpu", (2,)), {"a": ColwiseParallel(), "b": RowwiseParallel()})
    def forward(self, x):
        return self.b(self.a(x).relu())

class Refused(InPlace):  # rank 1's program cannot be sent
    def __init__(self):
        super().__init__()
        if dist.get_rank() == 1:
            self.lock = threading.Lock()

def plain():
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))

def Replicated():  # with a bucket for each layer
    return nn.parallel.DistributedDataParallel(plain(), bucket_cap_mb=5e-5)

def Held():  # a program with DDP in it
    return nn.Sequential(plain(), Replicated())

def Sharded():
    return torch.distributed.fsdp.fully_shard(plain())

KINDS = (InPlace, Differentiable, Subgroup, Branch, Parallel, Refused, Replicated, Held, Sharded)

def gradients(model):
    found = [one.grad for one in model.parameters()]
    return [getattr(one, "_local_tensor", one).clone() for one in found if one is not None]

def step(model, x):
    model.zero_grad()
    y = model(x)
    if y.requires_grad:
        y.sum().backward()
    return [y.detach(), *gradients(model)]

def train(kind, rank, backend):
    torch.manual_seed(0)
    model = kind()
    compiled = torchspan.compile(model, backend=backend)
    regions = compiled._torchspan_plan._regions
    swapped_in, wrong, after, began, calls = None, 0, 0, time.time(), 0
    while after < 5 and time.time() - began < 200:
        torch.manual_seed(2 * calls + rank)
        if kind is Branch:
            compiled.train(calls % 3 != 0)
        x = torch.randn(4, 4)
        calls += 1
        expected, actual = step(model, x), step(compiled, x)
        wrong += not all(map(torch.allclose, actual, expected)) or len(actual) != len(expected)
        generations = [one for region in regions for one in region._generations.all()]
        stages = [one.stage for one in generations]
        is_done = bool(stages) and not {"compiling", "ready"} & set(stages)
        both = torch.tensor([is_done, time.time() - began > 180], dtype=torch.int)
        if swapped_in is None and any(one.agreement and one.stage == "swapped" for one in generations):
            swapped_in = calls
        dist.all_reduce(both)
        after += int(both[0] == 2 or both[1] > 0)
        time.sleep(0.005)
    causes = [one.cause for one in compiled.report.attempts]
    told = [one.choice for one in compiled.report.decisions]
    return {"stages": stages, "wrong": wrong, "swapped_in": swapped_in, "causes": causes, "told": told}

def main(rank, path, backend, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    found = {kind.__name__: train(kind, rank, backend) for kind in KINDS}
    with open(f"{folder}/{rank}.json", "w") as file:
        json.dump(found, file)
    dist.barrier()
    dist.destroy_process_group()

if __name__ == "__main__":
    mp.spawn(main, (tempfile.mktemp(), sys.argv[1], sys.argv[2]), nprocs=2)
"""


@pytest.fixture(scope="module")
def ranks(run_python_once, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    run_python_once(PROGRAM, "aot_eager", str(folder))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["InPlace", "Differentiable", "Subgroup", "Branch", "Parallel"])
def test_ranks_take_over_code_with_collectives_in_one_call_and_give_eagers_numbers(ranks, kind: str) -> None:
    assert ranks[0][kind]["swapped_in"] == ranks[1][kind]["swapped_in"] is not None
    for rank in ranks:
        assert set(rank[kind]["stages"]) == {"swapped"}, rank[kind]
        assert rank[kind]["wrong"] == 0
        assert {"verified apart", "not verified"} & set(rank[kind]["told"])


def test_a_rank_that_does_not_compile_keeps_all_ranks_eager(ranks) -> None:
    for rank in ranks:
        assert set(rank["Refused"]["stages"]) == {"eager"}, rank["Refused"]
        assert rank["Refused"]["wrong"] == 0
    assert "cannot be sent" in ranks[1]["Refused"]["causes"][0]
    assert ranks[0]["Refused"]["causes"][-1].startswith("rank 1 runs eagerly: the program cannot be sent")


def test_the_module_in_ddp_is_compiled_and_its_reducer_is_left_alone(ranks) -> None:
    for rank in ranks:
        assert set(rank["Replicated"]["stages"]) == {"swapped"}, rank["Replicated"]
        assert rank["Replicated"]["wrong"] == 0


def test_a_program_that_holds_ddp_runs_eagerly_and_the_report_says_what_to_do(ranks) -> None:
    for rank in ranks:
        assert rank["Held"]["wrong"] == 0
        assert "DistributedDataParallel keeps a reducer" in rank["Held"]["causes"][0]


def test_what_fsdp_shards_runs_eagerly_and_the_report_says_what_to_do(ranks) -> None:
    for rank in ranks:
        assert rank["Sharded"]["wrong"] == 0
        assert "is sharded by FSDP" in rank["Sharded"]["causes"][0]
        assert "compile modules inside" in rank["Sharded"]["causes"][0]
