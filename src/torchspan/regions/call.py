"""One call of a region, and what is computed of it once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torchspan.regions.signature import Sizes, family, signature


@dataclass(frozen=True, eq=False)
class Call:
    """`target` is the program, or one of the blocks that a region serves; `args` and `kwargs` are those of the call."""

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @cached_property
    def signature(self) -> Hashable:
        """What decides which compiled code may serve it."""
        return signature(self.target, self.args, self.kwargs)

    @property
    def family(self) -> Hashable:
        """The signature without sizes."""
        return self._family[0]

    @property
    def sizes(self) -> Sizes:
        """The sizes of its tensors."""
        return self._family[1]

    @cached_property
    def _family(self) -> tuple[Hashable, Sizes]:
        return family(self.target, self.args, self.kwargs)


def original(target: Any) -> Any:
    """The module that a compiled one was made of; anything else as it is."""
    return target._orig_mod if "_torchspan_plan" in vars(type(target)) else target
