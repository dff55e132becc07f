"""What the report proposes to write instead of a line, and that it runs on a machine that has only a CPU."""

from __future__ import annotations

import textwrap

import pytest
import torch

from torchspan.report._portable import Porter
from torchspan.report._source import Source

TOP = """\
import torch
import torch as th
import torch.nn as nn
import torch.distributed as dist
from torch.cuda import synchronize
from torch.cuda.amp import GradScaler, autocast
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader
"""
HERE = 'str(torch.accelerator.current_accelerator(check_available=True) or "cpu")'
KIND = "torch.device(device).type"
DEVICE = 'torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")'
MODULE = "torch.get_device_module(device)"
GUARD = "if torch.accelerator.is_available():\n    "

# A line, and what is to be written instead; all of these run as they are where there is no accelerator.
RUNS = {
    'device = "cuda"': f"device = {HERE}",
    'device = "cuda:0" if torch.cuda.is_available() else "cpu"': f"device = {HERE}",
    'device = torch.device("cuda")': f"device = {DEVICE}",
    'dev = torch.device("cuda" if torch.cuda.is_available() else "cpu")': f"dev = {DEVICE}",
    'kind = "cuda" if "cuda" in str(x.device) else "cpu"': "kind = torch.device(str(x.device)).type",
    'device = "cuda" if rank else "cpu"': f'device = ({HERE}) if rank else "cpu"',
    'device = torch.device("cuda" if torch.cuda.is_available() and rank else "cpu")': (
        f'device = torch.device(({HERE}) if torch.accelerator.is_available() and rank else "cpu")'
    ),
    'x = torch.zeros(3, device="cuda")': "x = torch.zeros(3, device=device)",
    'x = th.zeros(3, device="cuda:0")': "x = th.zeros(3, device=device)",
    'y = x.to("cuda", torch.float64)': "y = x.to(device, torch.float64)",
    "y = x.cuda()": "y = x.to(device)",
    "y = x.float().cuda(non_blocking=True).sum()": "y = x.float().to(device, non_blocking=True).sum()",
    "y = x.cuda(0)": "y = x.to(device)",
    'kind = "cuda" if str(x.device).startswith("cuda") else "cpu"': "kind = torch.device(str(x.device)).type",
    'kind = "cpu" if x.device.type == "cpu" else "cuda"': "kind = x.device.type",
    'kind = "cpu" if not x.is_cuda else "cuda"': "kind = x.device.type",
    'kind = "cuda" if "cuda:0".split(":")[0] == "cuda" else "cpu"': 'kind = torch.device("cuda:0").type',
    'kind = "cuda" if rank else "cpu"': f'kind = ({HERE}) if rank else "cpu"',
    "y = x.cuda(rank, True)": f"y = x.to(torch.device({KIND}, rank), non_blocking=True)",
    "y = x.to(rank)": f"y = x.to(torch.device({KIND}, rank))",
    "y = torch.zeros(2, device=0)": "y = torch.zeros(2, device=device)",
    "y = x.to(torch.cuda.current_device())": "y = x.to(torch.device(device))",
    'device = torch.device("cuda", rank)': f"device = torch.device({HERE}, rank)",
    'y = x.to("cuda:%d" % rank)': f'y = x.to(f"{{{KIND}}}:%d" % rank)',
    'y = x.to("cuda:{}".format(rank))': f'y = x.to(f"{{{KIND}}}:{{{{}}}}".format(rank))',
    'y = x.to(f"cuda:{rank % torch.cuda.device_count()}")': (
        f'y = x.to(f"{{{KIND}}}:{{rank % max(1, torch.accelerator.device_count())}}")'
    ),
    "n = 8 // torch.cuda.device_count()": "n = 8 // max(1, torch.accelerator.device_count())",
    "if torch.cuda.device_count() > 1: rank = 1": "if torch.accelerator.device_count() > 1: rank = 1",
    "x.record_stream(torch.cuda.current_stream())": f"{GUARD}x.record_stream({MODULE}.current_stream())",
    "for y in [x]: y.record_stream(torch.cuda.current_stream())": (
        f"for y in [x]: (y.record_stream({MODULE}.current_stream()) if torch.accelerator.is_available() else None)"
    ),
    "torch.cuda.current_stream().synchronize()": f"{GUARD}{MODULE}.current_stream().synchronize()",
    "with torch.random.fork_rng(devices=[0]): pass": (
        f"with torch.random.fork_rng(devices=[0] if torch.accelerator.is_available() else [], device_type={KIND}): pass"
    ),
    'with torch.random.fork_rng(device_type="cuda"): pass': (
        f"with torch.random.fork_rng(device_type={KIND}, devices=None if torch.accelerator.is_available() else []): pass"
    ),
    "y = x.cuda(rank)": f"y = x.to(torch.device({KIND}, rank))",
    'y = x.to(f"cuda:{rank}")': f'y = x.to(f"{{{KIND}}}:{{rank}}")',
    'y = x.to(torch.device("cuda", rank))': f"y = x.to(torch.device({KIND}, rank))",
    'y = x.to(torch.device("cuda"))': "y = x.to(torch.device(device))",
    'device = torch.device(f"cuda:{rank}")': f'device = torch.device(f"{{({DEVICE}).type}}:{{rank}}")'.replace(
        '"cpu"', "'cpu'"
    ),
    'y = torch.zeros(2, device="cuda:1")': f'y = torch.zeros(2, device=f"{{{KIND}}}:1")',
    'options = dict(device="cuda", dtype=torch.float32)': "options = dict(device=device, dtype=torch.float32)",
    'options = {"device": "cuda"}': 'options = {"device": device}',
    'def f(device="cuda"): pass': "def f(device=device): pass",
    "torch.cuda.synchronize()": f"{GUARD}torch.accelerator.synchronize()",
    "synchronize()": f"{GUARD}torch.accelerator.synchronize()",
    "a = 1; torch.cuda.synchronize()": f"a = 1; {MODULE}.synchronize()",
    "torch.cuda.set_device(rank)": f"{GUARD}torch.accelerator.set_device_index(rank)",
    "torch.cuda.empty_cache()": f"{GUARD}torch.accelerator.empty_cache()",
    "stream = torch.cuda.Stream()": f"stream = {MODULE}.Stream()",
    "torch.cuda.current_stream().wait_stream(torch.cuda.Stream())": f"{MODULE}.current_stream().wait_stream({MODULE}.Stream())",
    "m = torch.cuda.max_memory_allocated() / 2**20": (
        "m = (torch.accelerator.max_memory_allocated() if torch.accelerator.is_available() else 0) / 2**20"
    ),
    'print(f"{torch.cuda.memory_allocated():,} bytes")': (
        'print(f"{(torch.accelerator.memory_allocated() if torch.accelerator.is_available() else 0):,} bytes")'
    ),
    "n = torch.cuda.device_count() if torch.cuda.is_available() else 1": (
        "n = torch.accelerator.device_count() if torch.accelerator.is_available() else 1"
    ),
    "torch.cuda.manual_seed_all(1)": "torch.manual_seed(1)",
    'c = torch.autocast("cuda", dtype=torch.bfloat16)': f"c = torch.autocast({KIND}, dtype=torch.bfloat16)",
    'c = torch.amp.autocast(device_type="cuda")': f"c = torch.amp.autocast(device_type={KIND})",
    "c = torch.cuda.amp.autocast()": f"c = torch.autocast(device_type={KIND})",
    "c = autocast(True, torch.bfloat16)": f"c = torch.autocast(device_type={KIND}, enabled=True, dtype=torch.bfloat16)",
    "s = GradScaler(enabled=False)": f"s = torch.amp.GradScaler({KIND}, enabled=False)",
    's = torch.amp.GradScaler("cuda")': f"s = torch.amp.GradScaler({KIND})",
    "loader = DataLoader([1], pin_memory=True)": "loader = DataLoader([1], pin_memory=torch.accelerator.is_available())",
    "y = x.pin_memory()": "y = (x.pin_memory() if torch.accelerator.is_available() else x)",
    "y = 1 if x.is_cuda else 2": 'y = 1 if x.device.type != "cpu" else 2',
    "y = x.is_cuda == True": 'y = (x.device.type != "cpu") == True',
    'backend = "nccl"': "backend = torch.distributed.get_default_backend_for_device(device)",
    'g = torch.Generator(device="cuda").manual_seed(1)': "g = torch.Generator(device=device).manual_seed(1)",
    "p = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])": (
        "p = profile(activities=torch.profiler.supported_activities())"
    ),
    'torch.set_default_device("cuda")': "torch.set_default_device(device)",
}
# Lines whose portable form wants more than this test has: a group of processes, two devices.
NOT_RUN = {
    'dist.init_process_group("nccl", rank=rank)': (
        "dist.init_process_group(torch.distributed.get_default_backend_for_device(device), rank=rank)"
    ),
    'dist.init_process_group("nccl", device_id=torch.device("cuda:0"))': (
        "dist.init_process_group(torch.distributed.get_default_backend_for_device(device), "
        f"device_id=torch.device({KIND}, 0) if torch.accelerator.is_available() else None)"
    ),
    'dist.init_process_group(backend="nccl" if torch.cuda.is_available() else "gloo", device_id=dev)': (
        "dist.init_process_group(backend=torch.distributed.get_default_backend_for_device(device), "
        "device_id=dev if torch.accelerator.is_available() else None)"
    ),
    "model = DDP(model, device_ids=[rank], output_device=rank)": (
        "model = DDP(model, device_ids=[rank] if torch.accelerator.is_available() else None, "
        "output_device=rank if torch.accelerator.is_available() else None)"
    ),
    "model = DDP(model, device_ids=[rank])": (
        "model = DDP(model, device_ids=[rank] if torch.accelerator.is_available() else None)"
    ),
    'mesh = dist.init_device_mesh("cuda", (2, 4))': f"mesh = dist.init_device_mesh({KIND}, (2, 4))",
    'parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])': (
        'parser.add_argument("--device", default=device, choices=["cuda", "cpu"])'
    ),
}
# Lines for which there is no portable one, and a word of what is said instead.
NONE = {
    "e = torch.cuda.Event(enable_timing=True)": "torch.Event",
    "g = torch.cuda.CUDAGraph()": "reduce-overhead",
    "name = torch.cuda.get_device_name(0)": "torch.cuda.is_available()",
    "torch.cuda.nvtx.range_push('a')": "record_function",
    "torch.cuda.jiterator._create_jit_fn('code')": "No counterpart",
    'if x.device.type == "cuda": pass': "Asks for CUDA by name",
    "torch.backends.cudnn.benchmark = True": "May stay",
    "from torch.cuda import nccl": "Not needed once",
    "y = x.type(torch.cuda.FloatTensor)": "dtype=",
    "if torch.cuda.is_available(): print(torch.cuda.get_device_name())": "Stays as it is",
    "y = torch.cuda.is_available() and torch.cuda.is_bf16_supported()": "Stays as it is",
    "torch.cuda.synchronize = print": "Changes torch.cuda itself",
    "wait = torch.cuda.synchronize": "Handed on",
    'devices = ["cuda:0", "cuda:1"]': "in a list",
    "y = torch.version.cuda.split('.')": "None where torch was built without CUDA",
    "print(torch.version.cuda)": "None where torch was built without CUDA",
    "os.system('nvidia-smi')": "nvidia-smi is of NVIDIA's driver",
    "import triton": "with NVIDIA's driver alone",
    'y = torch.utils.cpp_extension.load_inline("a", "", cuda_sources="")': "NVIDIA's compiler",
}
# What is left to do, of lines for which there is no portable one or only a part of it.
WORK = {
    "torch.backends.cudnn.benchmark = True": "nothing",
    "if torch.cuda.is_available(): print(torch.cuda.get_device_name())": "nothing",
    "print(torch.version.cuda)": "nothing",
    'if x.device.type == "cuda": pass': "nothing",
    'if x.device.type != "cuda": raise SystemExit': "by hand",
    "assert torch.cuda.is_available()": "by hand",
    "if not torch.cuda.is_available(): raise SystemExit": "by hand",
    "name = torch.cuda.get_device_name(0)": "by hand",
    "torch.cuda.synchronize()": "replace",
}
# Lines that name no device, though they may look so.
UNTOUCHED = (
    'print("cuda")',
    '"cuda"',
    "cuda = 1",
    'd["cuda"] = 1',
    "x.to(device)",
    'raise ValueError("no cuda device")',
    "obj.method(cuda=True)",
    'x = torch.zeros(3, device="cpu")',
)


def ported(line: str) -> tuple[Porter, str | None, tuple[str, ...]]:
    porter = Porter(Source("program.py", TOP + line))
    first = TOP.count("\n") + 1
    port = porter.port((first, first))
    return porter, port.portable, port.notes


@pytest.mark.parametrize(("line", "expected"), [*RUNS.items(), *NOT_RUN.items()], ids=lambda value: value[:40])
def test_a_line_has_its_portable_form(line: str, expected: str) -> None:
    _, portable, _ = ported(line)
    assert portable == expected


@pytest.mark.parametrize("line", RUNS, ids=lambda value: value[:40])
def test_the_portable_form_runs_without_an_accelerator(line: str) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    porter, portable, _ = ported(line)
    names = {"x": torch.ones(3), "rank": 0}
    exec(TOP + (porter.header() or "device = 'cpu'"), names)
    try:
        exec(portable or "", names)
    finally:
        torch.set_default_device(None)
        vars(torch._GLOBAL_DEVICE_CONTEXT).pop("device_context", None)  # with None there, get_default_device fails on torch 2.8


@pytest.mark.parametrize(("line", "word"), NONE.items(), ids=lambda value: value[:40])
def test_where_there_is_no_portable_form_it_is_said(line: str, word: str) -> None:
    _, portable, notes = ported(line)
    assert portable is None
    assert any(word in note for note in notes)


@pytest.mark.parametrize(("line", "work"), WORK.items(), ids=lambda value: value[:40])
def test_what_is_to_be_done_by_hand_is_told_from_nothing_to_do(line: str, work: str) -> None:
    porter = Porter(Source("program.py", TOP + line))
    first = TOP.count("\n") + 1
    assert porter.port((first, first)).work == work


def test_a_name_that_is_no_device_is_left_to_be_what_it_is() -> None:
    number = Porter(Source("a.py", "import torch\ndevice = 0\nx = torch.ones(1).cuda(device)"))
    assert number.port((3, 3)).portable == "x = torch.ones(1).to(torch.device(torch.device(device_here).type, device))"
    assert number.header() == f"device_here = {HERE}"
    later = Porter(Source("a.py", 'import torch\ndef f(x):\n    y = x.cuda()\n    device = "cuda"\n    return y.cuda()'))
    assert later.port((3, 3)).portable == "    y = x.to(device_here)"
    assert later.port((5, 5)).portable == "    return y.to(device)"
    default = Porter(Source("a.py", 'import torch\ndef f(n, device="cuda"):\n    return torch.ones(n, device=device)'))
    assert default.port((2, 2)).portable == "def f(n, device=device):" and default.header() == f"device = {HERE}"
    unless_given = Porter(Source("a.py", "import torch\ndef f(x, device=None):\n    return x.cuda()"))
    assert unless_given.port((3, 3)).portable == "    return x.to(device_here)"


def test_a_line_whose_device_is_set_elsewhere_says_where() -> None:
    text = "import torch\ndevice = torch.accelerator.current_accelerator()\nx = torch.ones(1).to(device)"
    port = Porter(Source("a.py", text)).port((3, 3), ["Tensor.to(device='cuda')"])
    assert port.work == "nothing" and port.notes == (
        "Nothing to do in this line: device is set in line 2, which is portable as it is",
    )
    port = Porter(Source("a.py", text.replace("torch.accelerator.current_accelerator()", '"cuda"'))).port(
        (3, 3), ["Tensor.to(device='cuda')"]
    )
    assert port.work == "nothing" and "line 2, which is to be ported" in port.notes[0]
    port = Porter(Source("a.py", "import torch\ndef f(x, where):\n    x.to(where)")).port((3, 3), ["Tensor.to(device='0')"])
    assert port.work == "by hand" and "by its number" in port.notes[0]


@pytest.mark.parametrize("line", UNTOUCHED)
def test_what_names_no_device_is_left_alone(line: str) -> None:
    porter, portable, _ = ported(line)
    assert portable is None
    assert not [span for span in porter.named() if span[0] > TOP.count("\n")]


def test_the_top_of_a_file_gets_a_device_only_where_it_has_none() -> None:
    without = Porter(Source("a.py", 'import torch\nx = torch.ones(1, device="cuda")'))
    assert without.header() == f"device = {HERE}"
    module = Porter(Source("a.py", 'import torch\ndevice = "cuda"\nx = torch.ones(1, device="cuda")'))
    assert module.header() is None
    late = Porter(Source("a.py", 'import torch\nx = torch.ones(1, device="cuda")\ndevice = "cuda"'))
    assert late.header() == f"device = {HERE}"
    inside = Porter(Source("a.py", 'import torch\ndef f(device):\n    return torch.ones(1, device="cuda")'))
    assert inside.header() is None
    bare = Porter(Source("a.py", 'from torch import ones\nx = ones(1, device="cuda")'))
    assert bare.header() == f"import torch\ndevice = {HERE}"


def test_a_statement_of_several_lines_is_ported_as_one() -> None:
    text = textwrap.dedent(
        """\
        import torch
        def f():
            model = torch.nn.Sequential(
                torch.nn.Linear(2, 2, device="cuda"),  # ä first
                torch.nn.Linear(2, 2).cuda(),
            )
            with torch.autocast(
                "cuda",
            ), torch.no_grad():
                return model
        """
    )
    source = Source("a.py", text)
    assert source.span(4) == (3, 6) and source.span(8) == (7, 9) and source.span(10) == (10, 10)
    porter = Porter(source)
    assert porter.port((3, 6)).portable == text.split("\n    with")[0].split("f():\n")[1].replace('"cuda"', "device").replace(
        ".cuda()", ".to(device)"
    )
    assert porter.port((7, 9)).portable == (f"    with torch.autocast(\n        {KIND},\n    ), torch.no_grad():")


def test_what_is_given_from_elsewhere_says_so() -> None:
    porter = Porter(Source("a.py", "import torch\nx = torch.ones(1, device=args.device)"))
    port = porter.port((2, 2), ["torch.ones(device='cuda')"])
    assert port.portable is None and "comes from elsewhere (args.device)" in port.notes[0]


def test_a_checkpoint_of_a_gpu_is_loaded_to_the_device() -> None:
    porter = Porter(Source("a.py", 'import torch\nstate = torch.load("model.pt")'))
    assert porter.port((2, 2), ["torch.load, storage at(device='cuda:0')"]).portable == (
        'state = torch.load("model.pt", map_location=device)'
    )
    assert porter.port((2, 2)).portable is None


@pytest.mark.parametrize("text", ["", "x = (", "\0", "class A:\n  x\n y", "# nothing\r\n\x0c"], ids=repr)
def test_what_is_no_python_is_shown_and_not_ported(text: str) -> None:
    source = Source("a.py", text)
    assert Porter(source).named() == []
    assert source.span(1) == (1, 1)
    assert Porter(source).port((1, 1), ["Tensor.cuda(device='cuda')"]).portable is None
