"""What is asked of an activation: the same for the command line, the API, and the processes that a program starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torchspan.core.errors import InputError


@dataclass(frozen=True)
class Activation:
    """The arguments of :func:`torchspan.activate` as text, as they stand in environment variables.

    A budget of None is torchspan's default; a memory of "" has no limit. `disable` has names separated by commas.

    >>> asked = Activation("cpu", masquerade=True, budget_seconds="20")
    >>> Activation.from_environ(asked.to_environ()) == asked
    True
    """

    device: str = "auto"
    masquerade: bool = False
    backports: bool = True
    compile: str = "off"
    budget_seconds: str | None = None
    budget_memory: str | None = None
    disable: str = ""

    @classmethod
    def from_environ(cls, variables: Mapping[str, str]) -> Activation:
        """As the variables say; raises InputError for a way of compiling that there is not."""
        compile = variables.get("TORCHSPAN_COMPILE", "off")
        if compile not in ("off", "bounded"):
            raise InputError(f"TORCHSPAN_COMPILE is {compile!r}; expected 'off' or 'bounded'")
        return cls(
            variables.get("TORCHSPAN_DEVICE", "auto"),
            variables.get("TORCHSPAN_MASQUERADE", "0") not in ("", "0"),
            variables.get("TORCHSPAN_BACKPORTS", "1") != "0",
            compile,
            variables.get("TORCHSPAN_BUDGET_SECONDS"),
            variables.get("TORCHSPAN_BUDGET_MEMORY"),
            variables.get("TORCHSPAN_DISABLE", ""),
        )

    def to_environ(self) -> dict[str, str]:
        """The variables that have another process activate torchspan in this way."""
        budget = {"TORCHSPAN_BUDGET_SECONDS": self.budget_seconds, "TORCHSPAN_BUDGET_MEMORY": self.budget_memory}
        return {
            "TORCHSPAN": "1",
            "TORCHSPAN_DEVICE": self.device,
            "TORCHSPAN_MASQUERADE": str(int(self.masquerade)),
            "TORCHSPAN_BACKPORTS": str(int(self.backports)),
            "TORCHSPAN_COMPILE": self.compile,
            "TORCHSPAN_DISABLE": self.disable,
        } | {name: value for name, value in budget.items() if value is not None}
