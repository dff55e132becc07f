"""``fully_shard([a, b])`` where the model runs `a`, and the program runs `b` by itself later, as a loss in chunks does.

Old FSDP puts its hooks for the backward on the last module of a group, once all of them have run; where one never runs inside
the model, the parameters of the others are not gathered again. Here a module that runs outside of the model has hooks of its
own, and the model's output has those of the rest of the group.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

from torchspan.backports._base import Backport, Change

_PLACE = "torch.distributed.fsdp._fully_shard._fsdp_state"


def _watching(register: Callable[..., Any]) -> Callable[..., Any]:
    """_register_group_forward_hooks, where a module that runs outside of the whole model is a group by itself."""

    @functools.wraps(register)
    def register_group(modules: Any, pre_hook: Any, post_hook: Any, modules_to_run: set[Any]) -> Any:
        _fsdp_state: Any = importlib.import_module(_PLACE)
        not_traced = getattr(_fsdp_state, "disable_if_config_true", None) or _fsdp_state._dynamo_disable  # 2.12 has that
        state, alone = pre_hook.__self__, set[int]()

        def begin(module: Any, args: Any) -> None:
            if state._is_root is False and state._state_ctx.iter_forward_root is None:
                alone.add(id(module))
                modules_to_run.clear()  # so that what torch does for the first of a group is done

        def begun(module: Any, args: Any) -> None:
            if id(module) in alone:
                alone.discard(id(module))
                modules_to_run.intersection_update({module})  # and what it does for the last

        handles = [register(modules, pre_hook, post_hook, modules_to_run)]
        for module in modules:
            handles.append(module.register_forward_pre_hook(not_traced(begin), prepend=True))
            handles.append(module.register_forward_pre_hook(not_traced(begun)))
        return _fsdp_state._MultiHandle(tuple(handles))

    return register_group


def _completing(post_forward: Callable[..., Any]) -> Callable[..., Any]:
    """FSDPState._post_forward; at the end of the whole model it prepares the backward of groups that have run in part."""

    @functools.wraps(post_forward)
    def after_forward(self: Any, module: Any, input: Any, output: Any) -> Any:
        is_whole = self._state_ctx.iter_forward_root is self
        output = post_forward(self, module, input, output)
        for state in self._state_ctx.all_states if is_whole else ():
            if _has_run_in_part(state):
                output = state._register_pre_backward_hook(output)
                state._modules_to_run_forward.clear()
        return output

    return after_forward


def _has_run_in_part(state: Any) -> bool:
    from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

    return len(state._modules) > 1 and state._training_state == TrainingState.FORWARD


def _lacks(module: ModuleType | None) -> bool:
    return module is not None and not hasattr(module.FSDPState, "_force_complete_incomplete_states")


BACKPORT = Backport(
    name="fsdp_partial_groups",
    summary="fully_shard([a, b]) where the model runs a and the program runs b later, as a loss in chunks does",
    target=_PLACE,
    since="2.13.0",
    upstream="https://github.com/pytorch/pytorch/blob/v2.13.0/torch/distributed/fsdp/_fully_shard/_fsdp_state.py",
    differs="the dtype of what each module of such a group gives is the last one's to change",
    also=(
        Change("torch.distributed.fsdp._fully_shard._fsdp_state", "FSDPState._post_forward", _completing),
        Change("torch.distributed.fsdp._fully_shard._fsdp_state", "_register_group_forward_hooks", _watching),
    ),
    lacks=_lacks,
)
