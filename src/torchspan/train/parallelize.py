"""A model made parallel as its spec's plans say: tensor parallelism, expert parallelism, then SimpleFSDP."""

from __future__ import annotations

from torch import nn

from torchspan.core.errors import InputError
from torchspan.models._base import ModelSpec
from torchspan.parallel.expert_parallel import apply_expert_parallel
from torchspan.parallel.mesh import DP_REPLICATE, DP_SHARD, TP, Meshes, submesh
from torchspan.parallel.plan import modules_of
from torchspan.parallel.reshard import Resharding
from torchspan.parallel.simple_fsdp import MixedPrecision, apply_simple_fsdp
from torchspan.parallel.tensor_parallel import apply_tensor_parallel


def parallelize(
    model: nn.Module,
    spec: ModelSpec,
    meshes: Meshes,
    precision: MixedPrecision | None = None,
    reshard_after_forward: bool = False,
) -> nn.Module:
    """`model`, an unsharded module of `spec`, with its parameters stored on `meshes`; in place.

    Every rank must hold the same weights before. With `reshard_after_forward` parameters are gathered again for the backward,
    without they are kept for it. Without a mesh, that is in one process, nothing is changed.
    """
    if meshes.dense is None:
        return model
    ties = _ties(model)
    tp_mesh = submesh(meshes.dense, TP)
    if tp_mesh is not None:
        apply_tensor_parallel(model, tp_mesh, spec.tensor_parallel)
    axes = (submesh(meshes.dense, axis) for axis in (DP_REPLICATE, DP_SHARD, TP))
    apply_expert_parallel(model, spec.expert_parallel, meshes.experts, tuple(axis for axis in axes if axis is not None))
    _tie_again(ties)
    resharding = Resharding(model) if reshard_after_forward else None
    if meshes.experts is not None:
        for pattern in (pattern for pattern, style in spec.expert_parallel.items() if style == "experts"):
            for experts in modules_of(model, pattern, "expert-parallel"):
                _refuse_ties(experts, ties)
                apply_simple_fsdp(experts, meshes.experts, precision, resharding)
    return apply_simple_fsdp(model, meshes.dense, precision, resharding)


Tie = list[tuple[nn.Module, str, str]]
"""The places of one parameter: the module, the name in it, and the name in the model."""


def _ties(model: nn.Module) -> list[Tie]:
    """The parameters that have several places."""
    places: dict[int, Tie] = {}
    for path, submodule in model.named_modules():
        for name, parameter in submodule._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((submodule, name, f"{path}.{name}".lstrip(".")))
    return [tie for tie in places.values() if len(tie) > 1]


def _tie_again(ties: list[Tie]) -> None:
    """Tie parameters again that were one before the plans; InputError where the plans split them in different ways."""
    for tie in ties:
        (first, name, path), *others = tie
        parameter = first._parameters[name]
        for other, other_name, other_path in others:
            other_parameter = other._parameters[other_name]
            if getattr(other_parameter, "placements", None) != getattr(parameter, "placements", None):
                raise InputError(f"{path} and {other_path} are one parameter, and the plan splits them in different ways")
            other.register_parameter(other_name, parameter)


def _refuse_ties(experts: nn.Module, ties: list[Tie]) -> None:
    """Experts are stored on a mesh of their own, which a parameter that is tied to others cannot be."""
    for tie in ties:
        inside = [module for module, _, _ in tie if any(module is part for part in experts.modules())]
        if inside:
            raise InputError(f"{tie[0][2]} and {tie[1][2]} are one parameter; expected experts with parameters of their own")
