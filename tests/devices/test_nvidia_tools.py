"""What a program asks of NVIDIA's libraries and tools, and of packages for GPUs: it goes on, and the report says how."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch

from torchspan.core.report import Report
from torchspan.devices import _nvidia
from torchspan.devices._base import device_patches
from torchspan.environment.facts import Facts
from torchspan.environment.scope import Environment

BUILT_WITH = torch.version.cuda
"""None in a build of torch for the CPU; one for CUDA tells it wherever it runs."""


def subjects(report: Report) -> dict[str, str]:
    return {decision.subject: decision.choice for decision in report.decisions}


def test_versions_can_be_read(redirected: Report) -> None:
    assert int(torch.version.cuda.split(".")[0]) >= 12
    from torch.version import cuda

    assert cuda == torch.version.cuda
    assert torch.backends.cudnn.version() > 90000 and torch.cuda.nccl.version() >= (2, 0)
    names = ["torch.backends.cudnn.version()", "torch.cuda.nccl.version()"]
    names += ["torch.version.cuda"] if BUILT_WITH is None else []
    assert {name: subjects(redirected)[name] for name in names} == dict.fromkeys(names, "simulated")


def test_torch_is_told_the_truth_of_its_versions_and_so_is_all_the_world_afterwards() -> None:
    before = (type(torch.version), torch.version.cuda, torch.backends.cudnn.version(), torch.version.__name__)
    with Environment(device_patches(Facts())):
        from torch.utils import collect_env

        assert str(collect_env.get_env_info().cuda_compiled_version) == str(before[1])
    assert (type(torch.version), torch.version.cuda, torch.backends.cudnn.version(), torch.version.__name__) == before


def test_a_program_that_is_redirected_strictly_is_told_the_truth_of_versions() -> None:
    before = torch.version.cuda
    with Environment(device_patches(Facts(), "strict")):
        assert torch.version.cuda == before


@pytest.mark.parametrize("command", [["nvidia-smi", "-L"], "nvidia-smi -L"], ids=["list", "shell"])
def test_the_tool_is_on_the_report(redirected: Report, command: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    try:
        subprocess.run(command, shell=isinstance(command, str), stderr=subprocess.DEVNULL, check=False)
    except FileNotFoundError:
        assert isinstance(command, list)
    (decision,) = [decision for decision in redirected.decisions if decision.subject == "nvidia-smi"]
    assert decision.choice == "not found" and "--masquerade" in decision.reason
    assert decision.site is not None and decision.site.startswith(__file__)


def test_the_tool_and_nvml_answer_in_disguise() -> None:
    path, report = os.environ["PATH"], Report()
    with Environment(device_patches(Facts(), report=report, masquerade=True), report):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True).stdout
        query = "nvidia-smi --query-gpu=index,memory.total --format=csv,noheader,nounits"
        output = subprocess.run(query, shell=True, capture_output=True, text=True, check=True).stdout
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        with pytest.raises(pynvml.NVMLError, match="Not Supported"):
            pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)
        with pytest.raises(pynvml.NVMLError, match="Invalid Argument"):
            pynvml.nvmlDeviceGetHandleByIndex(pynvml.nvmlDeviceGetCount())
    assert listed.startswith("GPU 0: ")
    assert output.split(", ")[0] == "0" and int(output.split(", ")[1]) == memory.total // 2**20
    assert subjects(report)["nvidia-smi"] == subjects(report)["pynvml.nvmlInit()"] == "simulated"
    assert os.environ["PATH"] == path


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["--query-gpu=name,driver_version", "--format=csv"], 0, "name, driver_version\n"),
        (["--query-gpu=memory.total", "--format=csv"], 0, "memory.total [MiB]\n"),
        (["--query-gpu=horns", "--format=csv"], 2, 'Field "horns" is not a valid field to query.'),
        (["--query-compute-apps=pid,used_memory", "--format=csv,noheader"], 0, ""),
        (["-i", "7", "-L"], 0, "GPU 0"),
        (["-i", "7", "--query-gpu=name", "--format=csv"], 6, "No devices were found"),
        (["--horns"], 1, "Invalid combination of input arguments"),
        ([], 0, "CUDA Version: 12.8"),
    ],
    ids=str,
)
def test_the_tool_speaks_as_nvidias(arguments: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert _nvidia.main(arguments) == code
    assert text in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore:torch.sparse.SparseTensor:UserWarning")
def test_old_sparse_types_make_tensors(redirected: Report) -> None:
    sparse = torch.cuda.sparse.FloatTensor(torch.tensor([[0, 1], [1, 0]]), torch.tensor([1.0, 2.0]), torch.Size([2, 2]))
    assert sparse.to_dense().tolist() == [[0.0, 1.0], [2.0, 0.0]] and isinstance(sparse, torch.cuda.sparse.FloatTensor)
    assert subjects(redirected)["torch.cuda.sparse.FloatTensor()"] == "cpu"


def test_memory_that_is_not_there_is_told_in_cudas_words(redirected: Report) -> None:
    with pytest.raises(torch.cuda.OutOfMemoryError, match=r"CUDA out of memory\. Tried to allocate 3725290\.30 GiB") as caught:
        torch.empty(10**15, device="cuda")
    assert "DefaultCPUAllocator" in str(caught.value.__cause__)


LACKS = """\
    import importlib.util, torch
    assert importlib.util.find_spec("{package}") is None
    try:
        import {package}
    except ImportError:
        pass
    import {package}.part
    """


@pytest.mark.once
def test_a_package_that_is_for_gpus_is_on_the_report_with_advice(run_python, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text("\n".join(line[4:] for line in LACKS.format(package="flash_attn").splitlines()))
    process = run_python(None, "-m", "torchspan", "run", "--quiet", "--report", "out.json", "program.py", expect=1)
    *_, error, advice = process.stderr.splitlines()
    assert error == "ModuleNotFoundError: No module named 'flash_attn'"
    assert advice.startswith("torchspan: flash_attn is not installed here: torch.nn.functional")
    entries = [
        (entry["line"], entry["asked"], entry["standing"])
        for file in json.loads((tmp_path / "out.json").read_text())["files"]
        for statement in file["statements"]
        for entry in statement["entries"]
    ]
    assert entries == [(4, "import flash_attn", "unsupported"), (7, "import flash_attn", "unsupported")]
