"""What a backport says of itself, and how it becomes Patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from torchspan.core.registry import Registry
from torchspan.environment.patch import MissingModule, MissingName, Patch, Replacement

REGISTRY = Registry("torchspan.backports", "backport")


@dataclass(frozen=True)
class Backport:
    """One thing that a newer torch has.

    `since` is the first torch release that has it, `upstream` a link to the change that brought it, `differs` what is not as
    upstream's. `names` are built in the module `target` where it lacks them; with `is_module`, the module itself is what is
    missing. `replaces` are changes to what is there (such as a function that lacks an argument).
    """

    name: str
    summary: str
    target: str
    since: str
    upstream: str
    differs: str = "nothing known"
    names: Mapping[str, Callable[[], object]] = field(default_factory=dict)
    is_module: bool = False
    replaces: Mapping[str, Callable[[object], object]] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why it was put in: the text of the Decision."""
        return f"torch has it since {self.since}"

    def patches(self) -> Iterable[Patch]:
        """The Patches that provide it; where torch has it, they change nothing."""
        if self.is_module:
            yield MissingModule(self.name, self.target, self._build_module, self.reason)
        else:
            for attribute, build in self.names.items():
                yield MissingName(self.name, self.target, attribute, build, self.reason)
        for attribute, rebuild in self.replaces.items():
            yield Replacement(self.name, self.target, attribute, rebuild)

    def _build_module(self) -> Mapping[str, object]:
        return {name: build() for name, build in self.names.items()}


def all_backports() -> list[Backport]:
    """Every backport, in the order of their names."""
    return [REGISTRY.get(name).BACKPORT for name in REGISTRY.names()]
