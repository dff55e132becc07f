"""inductor_compiled_code: compiled code inside selective checkpointing is one operator, which a policy can save."""

from __future__ import annotations

import functools
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),
    # dynamo of torch 2.9 keeps this from being shown, not from being made an error
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]

BACKPORT = REGISTRY.get("inductor_compiled_code").BACKPORT
OPTION = "wrap_inductor_compiled_regions"


def program(x: Tensor, weight: Tensor) -> Tensor:
    """Matrix products alone: inductor calls kernels that are there, and the C++ compiler is not run."""
    return x @ weight @ weight


def gradients_and_operators(compiled: Any, saves: bool) -> tuple[tuple[Tensor, ...], list[str]]:
    """Of a checkpointed region with two calls of `compiled`: the gradients, and what its policy was asked in the forward."""
    operator = torch._higher_order_ops.inductor_compiled_code
    operators: list[str] = []

    def policy(context: Any, called: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if not context.is_recompute:
            operators.append(str(called))
        return CheckpointPolicy.MUST_SAVE if called is operator and saves else CheckpointPolicy.PREFER_RECOMPUTE

    torch.manual_seed(0)
    x, weight = (torch.randn(4, 4, requires_grad=True) for _ in range(2))
    out = checkpoint(
        lambda x: compiled(x, weight) * compiled(x + 1, weight),
        x,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, policy),
    )
    return torch.autograd.grad(out.sum(), (x, weight)), operators


@pytest.mark.slow
def test_a_compiled_region_is_one_operator_for_selective_checkpointing(
    environment: Environment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    compiled = torch.compile(program, options={OPTION: True})
    expected, operators = gradients_and_operators(program, saves=True)
    assert "inductor_compiled_code" not in operators and "aten.mm.default" in operators
    for saves in (True, False):  # compiled inside the checkpoint, and called in it again
        actual, operators = gradients_and_operators(compiled, saves)
        assert operators.count("inductor_compiled_code") == 2 and "aten.mm.default" not in operators
        torch.testing.assert_close(actual, expected)
    if is_lacking(BACKPORT):
        assert any(OPTION in decision.subject for decision in environment.report.decisions)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    actual, operators = gradients_and_operators(torch.compile(program, options={OPTION: True}), saves=True)
    counters = torch._dynamo.utils.counters
    assert counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"], "out of the cache"
    assert operators.count("inductor_compiled_code") == 2
    torch.testing.assert_close(actual, expected)


def test_a_mode_without_a_rule_sees_what_compiled_code_calls(environment: Environment) -> None:
    if not is_lacking(BACKPORT):
        pytest.skip("torch's own fails")
    from torch.utils.flop_counter import FlopCounterMode

    x, weight = torch.ones(3, 3), torch.ones(3, 3)
    compiled = torch.compile(program, options={OPTION: True})
    expected = program(x, weight)
    torch.testing.assert_close(compiled(x, weight), expected)
    with FlopCounterMode(display=False) as counter:
        actual = compiled(x, weight)
    torch.testing.assert_close(actual, expected)
    assert counter.get_total_flops() == 2 * 2 * 27


def test_the_option_is_off_and_is_taken_back(run_python: Any) -> None:
    run_python(
        f"""
        import torch, torch._inductor.config as config, torchspan
        had, keys, digest = hasattr(config, "{OPTION}"), set(config.get_config_copy()), config.get_hash()
        with torchspan.activate(device="off"):
            assert config.{OPTION} is False
            assert config.get_hash() == digest, "code that was cached without torchspan stays valid"
            with config.patch({{"{OPTION}": True}}):
                assert config.{OPTION} is True
        assert hasattr(config, "{OPTION}") == had and set(config.get_config_copy()) == keys
        try:
            torch.compile(lambda x: x, options={{"no_such_option": True}})
        except RuntimeError as error:
            assert "no_such_option" in str(error)
        else:
            raise AssertionError("an unknown option was taken")
        """
    )


def test_fake_inputs_go_through_the_graph_that_was_compiled(environment: Environment) -> None:
    if not is_lacking(BACKPORT):
        pytest.skip("torch's own keeps its graphs elsewhere")
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    operator = torch._higher_order_ops.inductor_compiled_code
    kind = importlib.import_module("torchspan.backports.inductor_compiled_code").InductorCompiledCallable
    graph = make_fx(lambda x: [x.sin(), x.sum()])(torch.ones(3))
    code = kind(lambda inputs: graph(*inputs), graph)
    with FakeTensorMode():
        assert [tuple(out.shape) for out in operator(code, [torch.ones(5)])] == [(5,), ()]
    traced = make_fx(lambda x: operator(code, [x])[0] * 2)(torch.ones(3))
    torch.testing.assert_close(traced(torch.ones(3)), torch.ones(3).sin() * 2)
    assert any(node.target is operator for node in traced.graph.nodes)
    with FakeTensorMode(), pytest.raises(RuntimeError, match="came from a cache"):
        operator(kind(code), [torch.ones(5)])
