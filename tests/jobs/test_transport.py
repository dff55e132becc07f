"""Programs travel without their weights, keep what is shared, and are never run again on the other side."""

from __future__ import annotations

import importlib
import operator
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from torchspan.core.errors import InputError
from torchspan.jobs.transport import dumps, loads
from torchspan.regions import ambient


def test_weights_arrive_as_zeros_and_cost_no_bytes() -> None:
    model = nn.Linear(1000, 1000)
    sent = dumps(model)
    arrived = loads(sent)
    assert len(sent) < 10_000
    assert type(arrived) is nn.Linear and arrived.weight.shape == (1000, 1000) and not arrived.weight.any()
    assert isinstance(arrived.weight, nn.Parameter) and arrived.weight.requires_grad and arrived.weight.grad_fn is None


def test_tied_weights_and_views_are_shared_on_the_other_side() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    row = model[0].weight.detach()[1]
    arrived, arrived_row = loads(dumps((model, row)))
    assert arrived[0].weight is arrived[1].weight
    assert arrived_row.data_ptr() == arrived[0].weight[1].data_ptr()
    assert [name for name, _ in arrived.named_parameters()] == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize(
    "value",
    [
        torch.arange(12).view(3, 4)[:, ::2],
        torch.ones(3, dtype=torch.bool),
        torch.rand(4, dtype=torch.bfloat16),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.ones(2, 3).t(),
        torch.ones(1).expand(5),
    ],
)
def test_small_tensors_travel_by_value_with_their_strides(value: torch.Tensor) -> None:
    arrived = loads(dumps(value))
    assert torch.equal(arrived, value) and arrived.stride() == value.stride() and arrived.dtype == value.dtype


def test_large_inputs_keep_shape_strides_and_the_wish_for_a_gradient() -> None:
    x = torch.randn(300, 400).t().requires_grad_()
    arrived = loads(dumps(x))
    assert arrived.shape == x.shape and arrived.stride() == x.stride() and arrived.requires_grad and not arrived.any()
    assert loads(dumps(torch.empty(3, device="meta"))).is_meta


def test_operators_and_closures_travel() -> None:
    factor = 3
    function, op, builtin = loads(dumps((lambda x: x * factor, torch.ops.aten.add.Tensor, operator.getitem)))
    assert function(2) == 6 and op is torch.ops.aten.add.Tensor and builtin is operator.getitem


def test_operators_arrive_where_nothing_has_defined_them_yet(run_python: Callable[..., Any], tmp_path: Path) -> None:
    """Those that inductor defines when it is imported, as a graph has them whose operators it took apart."""
    importlib.import_module("torch._inductor.inductor_prims")
    (tmp_path / "sent").write_bytes(dumps(torch.ops.prims.inductor_seed.default))
    answer = run_python(
        f"""
        import torch
        from torchspan.jobs import transport
        assert not hasattr(torch.ops.prims, "inductor_seed"), "then this shows nothing"
        print(transport.loads(open({str(tmp_path / "sent")!r}, "rb").read()))
        """
    )
    assert answer.stdout.strip() == "prims.inductor_seed.default"


def test_a_function_inside_a_function_finds_the_globals_of_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "import threading",
        "lock = threading.Lock()",
        "def make(n):",
        "    def inner(x):",
        "        with lock: return x * n",
    ]
    (tmp_path / "with_a_lock.py").write_text("\n".join([*lines, "    return inner"]))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("with_a_lock")
    arrived = loads(dumps(module.make(3)))  # the lock could not travel
    assert arrived(2) == 6 and arrived.__globals__ is vars(module)


def test_a_class_that_torch_has_by_another_name_arrives_as_itself() -> None:
    from torch.nn.attention import SDPBackend  # whose full name is _SDPBackend, in every release

    arrived = loads(dumps({"backends": [SDPBackend.MATH], "kind": SDPBackend}))
    assert arrived["kind"] is SDPBackend
    assert arrived["backends"] == [SDPBackend.MATH]


def test_a_local_class_keeps_its_name() -> None:
    class Local(nn.Module):
        pass

    assert type(loads(dumps(Local()))).__qualname__ == Local.__qualname__


def test_what_cannot_travel_is_named() -> None:
    with pytest.raises(InputError, match=r"cannot be sent to the compile process: cannot pickle '_thread.lock' object"):
        dumps({"lock": threading.Lock()})


def test_the_ambient_state_is_set_where_it_differs_and_modes_hold_for_a_block() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
            sent = loads(dumps(ambient.capture()))
    finally:
        torch.set_default_dtype(torch.float32)
    try:
        ambient.restore(sent)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with ambient.modes(sent):
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16
    assert torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")


class OwnLinear(nn.Linear):
    """A class that travels by value."""


def test_a_parametrized_module_is_parametrized_on_the_other_side() -> None:
    model = nn.Sequential(weight_norm(OwnLinear(4, 4)), spectral_norm(nn.Linear(4, 2)))
    there = loads(dumps(model, keep_values=True))
    x = torch.randn(3, 4)
    assert torch.equal(there.eval()(x), model.eval()(x))
    assert [type(module).__name__ for module in there] == ["ParametrizedOwnLinear", "ParametrizedLinear"]
    assert list(there.state_dict()) == list(model.state_dict())
    assert not isinstance(there[0].weight, nn.Parameter) and there[0].weight.grad_fn is not None
