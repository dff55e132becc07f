"""What CUDA's libraries are called by their versions: None in a torch that is built without them, which programs take apart.

The program is told of the versions that torch's own builds for CUDA have; torch's code is told the truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from types import ModuleType
from typing import Any

from torchspan.devices import _nvidia, _redirect
from torchspan.devices._callers import asked_by_torch
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, unless_torch_asks
from torchspan.environment.patch import Patch, Redefinition, Replacement

CUDNN = 91002
NCCL = (2, 27, 3)
_WHAT = "the version that torch's builds for CUDA have; there is no such library here"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The versions of CUDA, cuDNN and NCCL; the truth in the mode ``strict``, and where CUDA is here."""
    if redirection.mode == "strict" or "cuda" not in redirection.kinds:
        return
    yield Replacement("versions", "torch.version", "__class__", partial(_with_cuda, redirection))
    yield Redefinition("versions", "torch.backends.cudnn", "version", partial(_told, redirection, "cudnn.version", CUDNN))
    yield Redefinition(
        "versions", "torch.backends.cudnn", "is_available", partial(_told, redirection, "cudnn.is_available", True)
    )
    yield Redefinition("versions", "torch.cuda.nccl", "version", partial(_told, redirection, "nccl.version", NCCL))


def _with_cuda(redirection: Redirection, old: Any) -> type[ModuleType]:
    """The class of a module whose `cuda` is read by the program: a plain name in a module cannot tell who reads it."""

    class Version(old):
        @property
        def cuda(self) -> str | None:
            version: str | None = self.__dict__["cuda"]
            if version is not None or asked_by_torch() or _redirect.in_force is not redirection:
                return version
            redirection.simulate("torch.version.cuda", f"{_nvidia.CUDA}, {_WHAT}")
            return _nvidia.CUDA

        @cuda.setter
        def cuda(self, value: str | None) -> None:
            self.__dict__["cuda"] = value

    return Version


def _told(redirection: Redirection, name: str, answer: Any, old: Function) -> Function:
    def version() -> Any:
        shown = f"torch.{'backends' if name.startswith('cudnn') else 'cuda'}.{name}()"
        redirection.simulate(shown, f"{answer}, {_WHAT}" if answer is not True else "the program is told so that it goes on")
        return answer

    return unless_torch_asks(version, old)
