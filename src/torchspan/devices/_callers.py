"""Who calls: the program, or code of torch and torchspan, which is told the truth about devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from types import CodeType, FrameType
from typing import Any

from torchspan.environment import patch

_HERE = os.path.dirname(__file__) + os.sep
# What answers for the program, although it is torch's: dynamo folds `torch.cuda.is_available()` of the program it reads.
_ON_BEHALF = "torch._dynamo.variables"
_HANDLERS = "torch._dynamo.variables.torch"  # of the calls in it
_OWN = ("torch.", "torchspan.", "triton.")  # Triton asks as the compiler's part that it is
# What stands between the asker and the function that it called.
_BETWEEN = (
    "torchspan.devices",
    "torchspan.environment.patch",
    "torchspan.backports.accelerator",
    "torchspan.backports.cuda",
    "torch.cuda",
    "torch.library",
    "torch._library",
)

_REDEFINED = patch.__file__  # where the code of a redefined function is, whose globals are torch's


class Callers:
    """Tells the program's frames from torch's, and remembers which code is whose.

    `known` has for each code, by identity (a code's own hash reads all of it), whether it is torch's, and the code itself.
    """

    def __init__(self) -> None:
        self.known: dict[int, tuple[bool, CodeType]] = {}

    def is_torchs(self, frame: FrameType) -> bool:
        """Whether the code of a frame is torch's or torchspan's."""
        code = frame.f_code
        known = self.known.get(id(code))
        if known is None:
            known = self.known[id(code)] = (is_torchs(frame.f_globals, code), code)
        return known[0]

    def is_programs(self, frame: FrameType | None) -> bool:
        """Whether the first frame from here on that is not torchspan's is the program's."""
        while frame is not None and self.is_torchs(frame):
            if not frame.f_code.co_filename.startswith(_HERE):
                return False
            frame = frame.f_back
        return frame is not None


def is_torchs(names: Mapping[str, Any], code: CodeType) -> bool:
    """Whether code is torch's or torchspan's, not the program's."""
    name = names.get("__name__") or ""
    file = code.co_filename
    is_generated = file.startswith(("<eval_with_key>", "<frozen ")) or (file == "<string>" and not name)
    return (
        is_generated
        or name in ("torch", "contextlib", "collections", "functools", "typing_extensions")
        or name.startswith(_OWN)
    )


def asked_by_torch(name: str = "") -> bool:
    """Whether torch's own code (or torchspan's) is what called the redefined function that calls this.

    It is told the truth: that there is no such device. The program is told what it needs to go on. With the `name` of the
    function, what torch asks for itself (its code names it) is told from what it calls for the program: dynamo's guards and
    what dynamo folds are calls of a function that torch's code does not name.
    """
    frame: FrameType | None = sys._getframe(2)
    while frame is not None and (
        frame.f_code.co_filename == _REDEFINED or (frame.f_globals.get("__name__") or "").startswith(_BETWEEN)
    ):
        frame = frame.f_back
    if frame is None:
        return False
    module = frame.f_globals.get("__name__") or ""
    if name:
        return module.startswith(_OWN) and name in frame.f_code.co_names and module != _HANDLERS
    return module.startswith(_OWN) and not module.startswith(_ON_BEHALF)
