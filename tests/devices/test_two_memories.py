"""The host's memory and the device's are told apart: a move copies, unless the tensor is known to lie there."""

from __future__ import annotations

import importlib.util
import io
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from torchspan.core.report import Report
from torchspan.devices import movement
from torchspan.devices._memories import DEVICE

pytestmark = pytest.mark.filterwarnings("ignore:To copy construct from a tensor", "ignore:TypedStorage is deprecated")
DEV, CPU = torch.device("cuda"), torch.device("cpu")

# In each, `x` is what is moved, `dev` and `cpu` are devices, `there` and `here` other tensors on the device and on the host.
BACK = [
    "x.to(cpu)",
    "x.to('cpu')",
    "x.to(device=cpu)",
    "x.to(cpu, torch.float32)",
    "x.to(dtype=torch.float32, device='cpu', non_blocking=True)",
    "x.to(here)",
    "x.to(tensor=here)",
    "x.to(here.device)",
    "x.cpu()",
    "x.cpu().cpu()",
    "x.detach().cpu()",
    "x[:].to(cpu)",
    "x.type(torch.FloatTensor)",
    "x.type('torch.FloatTensor')",
    "x.type_as(here)",
    "torch.tensor(x, device=cpu)",
    "torch.as_tensor(x, device=cpu)",
    "torch.as_tensor(data=x, dtype=torch.float32, device='cpu')",
    "torch.asarray(x, device='cpu')",
    "torch.empty(3).copy_(x)",
    "torch.from_numpy(x.cpu().numpy())",
    "torch.empty(0).set_(x.untyped_storage().cpu())",
    "torch.empty(0).set_(x.untyped_storage().to(device='cpu'))",
    "torch.empty(0).set_(x.storage().cpu())",
    "saved(x, 'cpu')",
    "boxed(x, lambda box: box.cpu())",
    "boxed(x, lambda box: box.to(cpu))",
    "boxed(x, lambda box: box.to('cpu', torch.float32))",
    "boxed(x, lambda box: box.to(device=here.device))",
    "boxed(x, lambda box: box.to(here))",
    "packed(x).cpu().data.view(3)",
    "packed(x).to('cpu').data.view(3)",
]
THERE = [
    "x.to(dev)",
    "x.to('cuda')",
    "x.to('cuda:0')",
    "x.to(0)",
    "x.to(device=dev)",
    "x.to(dev, torch.float32)",
    "x.to(dtype=torch.float32, device='cuda', non_blocking=True)",
    "x.to(there)",
    "x.to(tensor=there)",
    "x.to(there.device)",
    "x.to(computed.device)",
    "x.cuda()",
    "x.cuda(0, non_blocking=True)",
    "x.pin_memory().to(dev, non_blocking=True)",
    "x.type(torch.cuda.FloatTensor)",
    "x.type_as(there)",
    "torch.tensor(x, device=dev)",
    "torch.as_tensor(x, device=dev)",
    "torch.as_tensor(x, device=there.device)",
    "torch.as_tensor(x.numpy(), device=dev)",
    "torch.asarray(x, device='cuda')",
    "torch.asarray(x.numpy(), device='cuda')",
    "by_default(lambda: torch.as_tensor(x))",
    "torch.empty(3, device=dev).copy_(x)",
    "torch.empty(0, device=dev).set_(x.untyped_storage().cuda())",
    "torch.empty(0, device=dev).set_(x.untyped_storage().to(device='cuda'))",
    "saved(x, dev)",
    "saved(x, there.device)",
    "boxed(x, lambda box: box.cuda())",
    "boxed(x, lambda box: box.to(dev))",
    "boxed(x, lambda box: box.to(there.device))",
    "boxed(x, lambda box: box.to(there))",
    "boxed(x, lambda box: box.to(computed))",
    "packed(x).cuda().data.view(3)",
]
STAYS_HERE = [
    "x.to(cpu)",
    "x.to('cpu', torch.float32)",
    "x.to(device=cpu, non_blocking=True)",
    "x.to(here)",
    "x.to(here.device)",
    "x.to(x.device)",
    "x.cpu()",
    "x.type(torch.FloatTensor)",
    "x.type_as(here)",
    "torch.as_tensor(x, device=cpu)",
]
STAYS_THERE = [
    "x.to(dev)",
    "x.to('cuda:0', torch.float32)",
    "x.to(device=0, non_blocking=True)",
    "x.to(there)",
    "x.to(there.device)",
    "x.to(x.device)",
    "x.cuda()",
    "x.type(torch.cuda.FloatTensor)",
    "x.type_as(there)",
    "torch.as_tensor(x, device=dev)",
    "by_default(lambda: torch.as_tensor(x))",
]
# What makes a tensor of which it is known that it lies on the host, or on the device.
MADE_HERE = [
    "torch.ones(3)",
    "torch.tensor([1.0, 1.0, 1.0])",
    "torch.ones(3, device='cpu')",
    "torch.ones(3, device=cpu)",
    "torch.ones_like(here)",
    "torch.ones_like(there, device=cpu)",
    "here.new_ones(3)",
    "torch.from_numpy(np.ones(3, np.float32))",
    "torch.frombuffer(bytearray(12), dtype=torch.float32)",
    "torch.Tensor([1.0, 1.0, 1.0])",
    "torch.as_tensor([1.0, 1.0, 1.0])",
    "torch.ones(3).pin_memory()",
    "torch.ones(3).detach().view(3)[:]",
    "torch.nn.Parameter(torch.ones(3)).data",
    "torch.nn.Linear(3, 1).bias",
    "torch.nn.Linear(3, 1).half().float().bias",
    "there.cpu()",
    "computed.to(cpu)",
    "saved(here, None)",
    "saved(there, 'cpu')",
    "saved(there, lambda storage, location: storage)",
    "under('cpu', lambda: torch.ones(3))",
]
MADE_THERE = [
    "torch.ones(3, device=dev)",
    "torch.ones(3, device=there.device)",
    "torch.ones(3, device=0)",
    "torch.zeros_like(there)",
    "torch.zeros_like(here, device=dev)",
    "there.new_zeros(3)",
    "here.new_zeros(3, device='cuda')",
    "torch.cuda.FloatTensor([1.0])",
    "by_default(lambda: torch.ones(3))",
    "by_default(lambda: torch.ones(3, device=torch.get_default_device()))",
    "under(there.device, lambda: torch.ones(3))",
    "here.cuda()",
    "computed.to(dev)",
    "torch.nn.Linear(3, 1, device=dev).bias",
    "torch.nn.Linear(3, 1).cuda().half().float().bias",
    "torch.nn.Linear(3, 1).to_empty(device=dev).bias",
    "copy.deepcopy(there)",
    "copy.deepcopy(torch.nn.Linear(3, 1, device=dev)).bias",
]


class Box(torch.nn.Module):
    def __init__(self, x: torch.Tensor) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(x, requires_grad=False)


def boxed(x: torch.Tensor, move: Any) -> torch.Tensor:
    box = Box(x)
    before = box.weight
    assert move(box) is box and box.weight is before
    return box.weight.data


def packed(x: torch.Tensor) -> torch.nn.utils.rnn.PackedSequence:
    return torch.nn.utils.rnn.PackedSequence(x.view(3, 1), torch.tensor([1, 1, 1]))


def saved(x: torch.Tensor, map_location: Any) -> torch.Tensor:
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    loaded: torch.Tensor = torch.load(file, map_location=map_location)
    return loaded


def under(device: Any, make: Any) -> torch.Tensor:
    with torch.device(device) if isinstance(device, str) else device:
        result: torch.Tensor = make()
        return result


def names() -> dict[str, Any]:
    """What the lines above find."""
    import copy

    import numpy as np

    there = torch.zeros(3, device="cuda")
    results: dict[str, Any] = {
        "__name__": "program",
        "torch": torch,
        "np": np,
        "copy": copy,
        "dev": DEV,
        "cpu": CPU,
        "there": there,
    }
    results |= {"here": torch.zeros(3), "computed": there + 1}
    results |= {
        "boxed": boxed,
        "packed": packed,
        "saved": saved,
        "under": under,
        "by_default": lambda make: under("cuda", make),
    }
    return results


def is_apart(moved: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether neither changes with the other."""
    source.fill_(5)
    follows = moved.eq(5).any()
    moved.fill_(6)
    return not follows and bool(source.eq(5).all())


def test_gradients_that_were_brought_back_do_not_follow_the_next_step(redirected: Report) -> None:
    model = torch.nn.Linear(2, 2).to(DEV)
    model(torch.ones(1, 2, device=DEV)).sum().backward()
    gradients = [p.grad.to(CPU) for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=False)
    assert [each.abs().sum().item() for each in gradients] == [4.0, 2.0]


@pytest.mark.usefixtures("redirected_throughout")
class TestEachSpelling:
    @pytest.mark.parametrize("spelling", BACK)
    def test_what_is_brought_back_is_a_copy(self, spelling: str) -> None:
        result = names()
        for x in (torch.ones(3, device="cuda"), torch.ones(3, device="cuda") * 1, torch.ones(3).cuda()[:]):
            assert is_apart(eval(spelling, {**result, "x": x}), x)

    @pytest.mark.parametrize("spelling", THERE)
    def test_what_is_moved_there_is_a_copy(self, spelling: str) -> None:
        result = names()
        for x in (torch.ones(3), torch.ones(3) * 1, torch.ones(3).detach()[:]):
            assert is_apart(eval(spelling, {**result, "x": x}), x)

    @pytest.mark.parametrize("spelling", STAYS_HERE)
    def test_what_is_known_to_be_on_the_host_is_given_back_by_a_move_there(self, spelling: str) -> None:
        result = names()
        for x in (result["here"], torch.ones(3), torch.ones(6)[3:]):
            assert eval(spelling, {**result, "x": x}) is x

    @pytest.mark.parametrize("spelling", STAYS_THERE)
    def test_what_is_known_to_be_on_the_device_is_given_back_by_a_move_there(self, spelling: str) -> None:
        result = names()
        for x in (result["there"], torch.ones(3).cuda(), torch.ones(6, device="cuda")[3:]):
            assert eval(spelling, {**result, "x": x}) is x

    @pytest.mark.parametrize("spelling", MADE_HERE)
    def test_what_is_made_on_the_host_is_known_to_be_there(self, spelling: str) -> None:
        value = eval(spelling, names())
        assert value.cpu() is value and value.to(CPU) is value and value.cuda() is not value and value.device == CPU

    @pytest.mark.parametrize("spelling", MADE_THERE)
    def test_what_is_made_on_the_device_is_known_to_be_there(self, spelling: str) -> None:
        value = eval(spelling, names())
        assert value.cuda() is value and value.to(value.device) is value and value.cpu() is not value and value.device == CPU


def test_where_nothing_asked_for_the_device_moves_are_torchs_own(redirected: Report) -> None:
    x, y = torch.ones(3) * 2, torch.ones(3)
    assert x.cpu() is x and x.to(CPU) is x and x.to("cpu") is x and x.to(y) is x and x.to(y.device) is x
    assert redirected.decisions == ()
    y.cuda()
    assert x.cpu() is x  # it was there before the device was asked for


def test_a_move_of_a_result_is_said_to_copy_once(redirected: Report) -> None:
    x = torch.ones(3, device="cuda") * 2
    for _ in range(3):
        x.cpu()
    (decision,) = [each for each in redirected.decisions if each.subject == "moves of results"]
    assert (decision.choice, decision.count) == ("copies", 1) and decision.site is not None
    assert decision.site.startswith(__file__)


def test_a_leaf_of_the_host_stays_a_leaf(redirected: Report) -> None:
    torch.ones(1, device="cuda")
    w = torch.ones(3, requires_grad=True)
    assert w.to(CPU).is_leaf and w.cpu() is w and not w.to(DEV).is_leaf


def test_tied_parameters_and_parts_of_one_storage_stay_tied(redirected: Report) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[1].weight = model[0].weight
    model.to(DEV).half().to(DEV)
    assert model[1].weight is model[0].weight
    flat = torch.ones(6, device=DEV)
    model[0].weight.data, model[1].bias.data = flat[:4].view(2, 2), flat[4:]
    model.to(DEV)
    assert model[0].weight.data_ptr() == flat.data_ptr() and model[1].bias.data_ptr() == flat[4:].data_ptr()


def test_an_optimizers_state_is_loaded_to_its_parameters_and_kept_apart(redirected: Report) -> None:
    model = torch.nn.Linear(2, 2).to(DEV)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2, device=DEV)).sum().backward()
    optimizer.step()
    state = optimizer.state[model.weight]["exp_avg"]
    assert state.to(DEV) is state  # zeros_like of a parameter on the device
    host_state = {key: value.to(CPU) for key, value in optimizer.state[model.weight].items()}
    before = {key: value.clone() for key, value in host_state.items()}
    other = torch.optim.Adam(model.parameters())
    other.load_state_dict({"state": {0: host_state}, "param_groups": other.state_dict()["param_groups"]})
    for _ in range(2):
        optimizer.step()
        other.step()
    assert all(torch.equal(host_state[key], before[key]) for key in ("exp_avg", "exp_avg_sq"))


def test_asarray_without_a_copy_is_refused_where_the_other_memory_is_asked_for(redirected: Report) -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="can't alias tensor"):
        torch.asarray(x, device="cuda", copy=False)
    with pytest.raises(ValueError, match="can't alias tensor"):
        torch.asarray(x.cuda(), device="cpu", copy=False)
    assert torch.asarray(x, device="cpu", copy=False).data_ptr() == x.data_ptr()


def test_a_device_that_an_answer_gave_is_torchs_and_pickles_plainly(redirected: Report) -> None:
    import pickle

    x = torch.ones(3, device="cuda")
    for device in (x.device, (x + 1).device, torch.zeros(1).device, x.untyped_storage().device):
        assert type(device) is torch.device and device == CPU and hash(device) == hash(CPU)
        assert pickle.loads(pickle.dumps(device)) == CPU and str(device) == "cpu"
    assert torch.ones(1, device="meta").device == torch.device("meta")


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_scripts_copy_what_they_move(redirected: Report) -> None:
    def back(x: torch.Tensor, y: torch.Tensor, d: torch.device) -> list[torch.Tensor]:
        return [x.cpu(), x.to("cpu"), x.to(y.device), x.to(y), x.to(d), x.to(torch.device("cpu"), torch.float32)]

    x = torch.ones(3, device="cuda")
    for moved in torch.jit.script(back)(x, x + 1, torch.device("cpu")):
        assert is_apart(moved, x)
        x.fill_(1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_code_copies_what_it_moves_and_its_results_are_not_taken_to_be_the_hosts(
    backend: str, redirected: Report
) -> None:
    @torch.compile(backend=backend, fullgraph=True)
    def function(x: torch.Tensor, h: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        back = [x.cpu(), x.to("cpu"), x.to(torch.device("cpu"), torch.float32), x.to(h), x.type_as(h)]
        there = [
            h.cuda(),
            h.to("cuda"),
            h.to(device=torch.device("cuda")),
            h.to(x),
            h.to(x.device),
            torch.as_tensor(h, device="cuda"),
        ]
        return back, there, [torch.ones(3, device="cuda"), torch.zeros_like(x), x * 2]

    x, h = torch.ones(3, device="cuda"), torch.ones(3)
    back, there, result = function(x, h)
    for each, source in [*((each, x) for each in back), *((each, h) for each in there)]:
        source.fill_(1)
        assert is_apart(each, source)
    for each in (*there, *result):
        assert is_apart(each.cpu(), each)


@pytest.fixture(scope="module")
def programs() -> ModuleType:
    """The script that writes, runs and judges random programs."""
    spec = importlib.util.spec_from_file_location("two_memories", Path(__file__).parents[2] / "benchmarks" / "two_memories.py")
    assert spec is not None and spec.loader is not None
    module = sys.modules["two_memories"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_random_programs_do_what_they_do_with_two_memories(programs: ModuleType, redirected: Report) -> None:
    for seed in range(100):
        program, wrong = programs.run(seed)
        assert wrong == "", "\n".join([*program.lines, f"# seed {seed}: {wrong}"])


def test_the_judge_of_random_programs_sees_an_alias(
    programs: ModuleType, redirected: Report, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movement, "memory_of", lambda tensor: DEVICE)  # as if all that there is were on the device
    assert any("the model says" in programs.run(seed)[1] for seed in range(20))
