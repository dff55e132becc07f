"""The order of dynamo's compiled code: the switch answers what held, and a torch without one says so."""

from __future__ import annotations

import torch

from torchspan.backports._base import REGISTRY, is_lacking
from torchspan.environment.scope import Environment

BACKPORT = REGISTRY.get("dynamo_lru_cache").BACKPORT


def test_the_switch_answers_what_held_before(environment: Environment) -> None:
    switch = torch._C._dynamo.eval_frame._set_lru_cache
    assert switch(True) in (True, None) and environment.report.decisions == ()  # torch said nothing before 2.14
    before = switch(False)
    try:
        assert before in (True, None)
        if is_lacking(BACKPORT):
            assert before is True
            (decision,) = environment.report.decisions
            assert decision.subject == "_set_lru_cache(False)" and "still follows its use" in decision.choice
            assert "torch 2.10" in decision.reason
    finally:
        switch(True)


def test_it_is_gone_with_the_environment() -> None:
    had = hasattr(torch._C._dynamo.eval_frame, "_set_lru_cache")
    with Environment(BACKPORT.patches()):
        assert hasattr(torch._C._dynamo.eval_frame, "_set_lru_cache")
    assert hasattr(torch._C._dynamo.eval_frame, "_set_lru_cache") == had
