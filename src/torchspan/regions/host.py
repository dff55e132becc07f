"""What a region needs from the plan that it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from torchspan.core.report import Report
from torchspan.jobs.budget import Allowance
from torchspan.jobs.supervisor import Ending
from torchspan.regions.part import Part
from torchspan.regions.settings import Settings


class Host(Protocol):
    """The plan of the program that a region is part of: how to compile, what may be spent, what to report."""

    settings: Settings
    report: Report
    verify: Literal["first", "off", "always"]
    is_waiting: bool
    shows_progress: bool

    def wants_artifact(self, part: Part) -> bool:
        """Whether the compile process is to make an artifact of `part`."""

    def turn(
        self, part: Part, is_cancelled: Callable[[], bool], has_compiled: bool
    ) -> AbstractContextManager[Allowance | Ending]:
        """Wait for the turn to have a compile process for `part`; gives what it may spend, or how it ended without one."""

    def spend(self, strategy: str, part: Part, ending: Ending) -> None:
        """Count what a compile process took."""

    def overhead(self) -> AbstractContextManager[None]:
        """Count the time inside as what compiling made a call wait."""

    def part_failed(self, part: Part) -> None:
        """Nothing of `part` could be compiled."""

    def has_moved_on(self, part: Part) -> bool:
        """Whether the program is now cut in another way than the one that made `part`."""

    def call_again(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run the program as it is cut now."""
