"""The same for a device that has no double precision (``SECOND_DEVICE_FLOAT64=0``), as MPS: every spelling gives single."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import numpy as np
import second_device
import torch
from checks import environment, outcome

second_device.load()
WIDE, ARRAY = torch.arange(3, dtype=torch.float64), np.arange(3, dtype=np.float64)


def here() -> torch.Tensor:
    return torch.arange(3.0, device="cuda")


def with_default(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    torch.set_default_dtype(torch.float64)
    try:
        return make()
    finally:
        torch.set_default_dtype(torch.float32)


def in_context(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    with torch.device("cuda"):
        return make()


def loaded() -> torch.Tensor:
    file = io.BytesIO()
    torch.save({"x": WIDE}, file)
    file.seek(0)
    return torch.load(file, map_location="cuda")["x"]


SPELLINGS: dict[str, Callable[[], torch.Tensor]] = {
    "zeros(dtype)": lambda: torch.zeros(3, dtype=torch.float64, device="cuda"),
    "tensor(numpy)": lambda: torch.tensor(ARRAY, device="cuda"),
    "tensor(numbers)": lambda: torch.tensor([np.float64(1), np.float64(2)], device="cuda"),
    "tensor(dtype)": lambda: torch.tensor([1.0], dtype=torch.float64, device="cuda"),
    "as_tensor(numpy)": lambda: torch.as_tensor(ARRAY, device="cuda"),
    "as_tensor(dtype)": lambda: torch.as_tensor([1.0], dtype=torch.float64, device="cuda"),
    "asarray(numpy)": lambda: torch.asarray(ARRAY, device="cuda"),
    "from_numpy.to": lambda: torch.from_numpy(ARRAY).to("cuda"),
    "from_numpy.cuda": lambda: torch.from_numpy(ARRAY).cuda(),
    "zeros_like(device)": lambda: torch.zeros_like(WIDE, device="cuda"),
    "zeros_like(dtype)": lambda: torch.zeros_like(here(), dtype=torch.float64),
    "rand_like(dtype)": lambda: torch.rand_like(here(), dtype=torch.float64),
    "new_zeros(dtype)": lambda: here().new_zeros(3, dtype=torch.float64),
    "new_tensor(dtype)": lambda: here().new_tensor([1.0], dtype=torch.float64),
    "device of a tensor": lambda: torch.ones(3, dtype=torch.float64, device=here().device),
    "default: zeros": lambda: with_default(lambda: torch.zeros(3, device="cuda")),
    "default: randn": lambda: with_default(lambda: torch.randn(3, device="cuda")),
    "default: full": lambda: with_default(lambda: torch.full((3,), 1.5, device="cuda")),
    "default: linspace": lambda: with_default(lambda: torch.linspace(0, 1, 3, device="cuda")),
    "default: module": lambda: with_default(lambda: torch.nn.Linear(2, 2, device="cuda").weight),
    "default: context": lambda: with_default(lambda: in_context(lambda: torch.zeros(3))),
    "context": lambda: in_context(lambda: torch.zeros(3, dtype=torch.float64)),
    "to(dtype)": lambda: here().to(torch.float64),
    "to(dtype=)": lambda: here().to(dtype=torch.float64),
    "to(device, dtype)": lambda: torch.ones(3).to("cuda", torch.float64),
    "type(dtype)": lambda: here().type(torch.float64),
    "type(name)": lambda: WIDE.type("torch.cuda.DoubleTensor"),
    "type of cuda": lambda: torch.cuda.DoubleTensor([1.0]),
    "double": lambda: here().double(),
    "Module.double": lambda: torch.nn.Linear(2, 2).cuda().double().weight,
    "Module.to": lambda: torch.nn.Linear(2, 2).double().to("cuda").weight,
    "module(dtype)": lambda: torch.nn.Linear(2, 2, dtype=torch.float64, device="cuda").weight,
    "sum(dtype)": lambda: here().sum(dtype=torch.float64),
    "torch.sum(dtype)": lambda: torch.sum(here(), dtype=torch.float64),
    "softmax(dtype)": lambda: torch.nn.functional.softmax(here(), 0, dtype=torch.float64),
    "cumsum(dtype)": lambda: here().cumsum(0, dtype=torch.float64),
    "load": loaded,
}


def what_is_wrong(name: str) -> str:
    """What is wrong with one spelling; "" if nothing is."""

    def asked() -> None:
        before = len(environment.report.decisions)
        result = SPELLINGS[name]()
        assert (result.dtype, result.device.type) == (torch.float32, "second"), f"{result.dtype} on {result.device}"
        reasons = [decision.reason for decision in environment.report.decisions[before:]]
        assert "SECOND has no double precision" in reasons, reasons

    return outcome(asked)


def of_the_cpu() -> None:
    """What stays on the CPU stays double."""
    assert torch.tensor(ARRAY).dtype == torch.zeros_like(WIDE).dtype == here().cpu().double().dtype == torch.float64


if __name__ == "__main__":
    print(json.dumps({**{name: what_is_wrong(name) for name in SPELLINGS}, "of the CPU": outcome(of_the_cpu)}))
