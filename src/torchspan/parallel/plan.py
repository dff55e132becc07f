"""Plans: patterns of submodule names, such as ``layers.*.attention.wq``, and the submodules that answer to them."""

from __future__ import annotations

from torch import nn

from torchspan.core.errors import InputError


def answers(name: str, pattern: str) -> bool:
    """Whether the submodule `name` answers to `pattern`, in which ``*`` stands for one part of a name.

    >>> answers("layers.3.attention", "layers.*.attention"), answers("layers.3.attention.wq", "layers.*.attention")
    (True, False)
    """
    parts, pattern_parts = name.split("."), pattern.split(".")
    return len(parts) == len(pattern_parts) and all(part in ("*", name_part) for part, name_part in zip(pattern_parts, parts))


def modules_of(module: nn.Module, pattern: str, plan: str) -> list[nn.Module]:
    """The submodules that answer to `pattern`; InputError where there is none, which names the `plan`.

    A pattern that ends with ``?`` is for submodules that only some configurations of a model have.

    >>> modules_of(nn.Sequential(nn.ReLU()), "0?", "tensor-parallel"), modules_of(nn.Sequential(), "0?", "tensor-parallel")
    ([ReLU()], [])
    """
    path = pattern.removesuffix("?")
    matches = [submodule for name, submodule in module.named_modules() if answers(name, path)]
    if not matches and path == pattern:
        raise InputError(f"no submodule answers to {pattern!r} of the {plan} plan; did the model change?")
    return matches
