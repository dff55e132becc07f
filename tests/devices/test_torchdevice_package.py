"""``import TorchDevice`` where the package is not installed: programs that were written for it run."""

from __future__ import annotations

import pickle

import pytest
import torch

from device_modes import in_mode
from torchspan.core.report import Report
from torchspan.environment.facts import Facts


@pytest.fixture(params=["auto", "torchdevice"])
def package(request: pytest.FixtureRequest):
    """The package, under rules that are in force."""
    with in_mode(request.param):
        import TorchDevice

        yield TorchDevice
    assert torch.device is type(torch.zeros(1).device)


def test_its_class_is_what_programs_use(package) -> None:
    from TorchDevice import TorchDevice
    from TorchDevice.core.device import DeviceManager
    from TorchDevice.core.logger import auto_log, log_info

    TorchDevice.apply_patches()
    log_info("here")
    device = TorchDevice()
    assert torch.nn.Linear(2, 2).to(device.device).weight.device == torch.device("cpu")
    assert auto_log()(len) is len and package.TorchDevice is DeviceManager is TorchDevice
    assert DeviceManager.get_default_device() == TorchDevice._default_device == torch.device("cpu")


def test_labels_are_of_the_device_that_is_given(package) -> None:
    assert torch.device("cuda") == torch.device("cuda", 0) == torch.device("mps") == torch.device() == torch.device("")
    assert torch.device("meta").type == "meta" and torch.zeros(1, device=torch.device("cuda")).device.type == "cpu"
    assert isinstance(torch.zeros(1).device, torch.device) and not isinstance("cpu", torch.device)
    assert torch.cuda.memory_allocated(torch.device("cuda")) >= 0
    with torch.device("cuda"):
        assert torch.zeros(1).device.type == "cpu"
    assert pickle.loads(pickle.dumps(torch.device("cpu"))) == torch.device("cpu")
    with pytest.raises(RuntimeError, match=r"(?i)device"):
        torch.device("horns")


def test_the_label_of_the_cpu_is_a_switch(package) -> None:
    from TorchDevice import TorchDevice

    assert not TorchDevice._cpu_override
    assert torch.device("cpu:-1").type == "cpu" and TorchDevice._cpu_override
    assert torch.randn(2, device="cuda").device.type == "cpu"
    assert torch.device("cpu", -1).type == "cpu" and not TorchDevice.cpu_override()
    assert torch.zeros(1, device="cpu:-1").to("cpu:-1").device.type == "cpu"


def test_a_stream_is_made_by_its_lower_case_name(package) -> None:
    stream = torch.cuda.stream()
    with torch.cuda.stream(stream):
        assert stream.query()


def test_the_switch_keeps_the_cpu_where_there_is_an_accelerator() -> None:
    from torchspan.devices._redirect import Redirection

    redirection = Redirection(Facts(has_mps=True), "torchdevice", Report())
    assert redirection.lookup("cpu") == torch.device("mps")
    redirection.keep_cpu(True)
    assert redirection.lookup("cpu") is None and redirection.lookup("cuda") == torch.device("mps")
    redirection.keep_cpu(False)
    assert redirection.lookup("cpu") == torch.device("mps") and redirection.lookup("cpu:-1") == torch.device("cpu")


def test_the_report_says_whose_it_is(redirected: Report) -> None:
    import TorchDevice

    assert TorchDevice.__version__
    (decision,) = [decision for decision in redirected.decisions if decision.subject == "TorchDevice"]
    assert decision.topic == "device" and "not installed here" in decision.reason
