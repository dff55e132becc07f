"""``import TorchDevice`` where the package is not installed: what programs written for it use of it.

From then on ``torch.device`` answers as under the package: a device that is not here is the one that stands in for it, no
device is the default one, and the label ``cpu:-1`` turns "what asks for the CPU is given the CPU" on, and off the next time.
Under ``device='torchdevice'`` the rest of its policy is in force too.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from functools import partial, wraps
from typing import Any

import torch

from torchspan.devices._callers import is_torchs
from torchspan.devices._policy import KEEP_CPU
from torchspan.devices._redirect import Redirection
from torchspan.devices._value import TorchDevice
from torchspan.devices._wrap import Function
from torchspan.environment.patch import MissingModule, Patch, Replacement
from torchspan.environment.scope import active_environment

VERSION = "0.4.2"
"""The release of the package whose names these are."""
_REAL = torch.device
_REASON = "the package is not installed here; torchspan has what programs use of it"


def patches(redirection: Redirection) -> Iterable[Patch]:
    """The package and its modules that programs import."""
    if redirection.mode == "strict":
        return
    manager = _manager(redirection)
    modules: dict[str, Callable[[], Mapping[str, object]]] = {
        "TorchDevice": lambda: _package(redirection, manager),
        "TorchDevice.core": lambda: {"__path__": []},
        "TorchDevice.core.device": lambda: {"DeviceManager": manager},
        "TorchDevice.core.patch": lambda: {"apply_patches": manager.apply_patches, "ensure_patched": manager.apply_patches},
        "TorchDevice.core.logger": _logger,
    }
    for name, build in modules.items():
        yield MissingModule("torchdevice_package", name, build, _REASON, "device")


def _package(redirection: Redirection, manager: Any) -> Mapping[str, object]:
    """Its names; being imported is what puts its ``torch.device`` in force, and the end of the environment takes it back."""
    environment = active_environment()
    if environment is not None:
        device = Replacement("torchdevice_package", "torch", "device", partial(_labels, redirection, manager), follow=True)
        stream = Replacement("torchdevice_package", "torch.cuda", "stream", _stream, follow=True)
        environment.extend([device, stream])
    redirection.knows_keep_cpu = True
    return {"__path__": [], "__version__": VERSION, "TorchDevice": manager, "auto_log": _auto_log}


class _State(type):
    """What the class answers about itself."""

    redirection: Redirection
    _cpu_override: bool = False

    @property
    def _default_device(cls) -> torch.device:
        return _REAL("cpu") if cls._cpu_override else _REAL(cls.redirection.target)


def _manager(redirection: Redirection) -> Any:
    """torchspan's TorchDevice with what the package's class has besides."""

    class Manager(TorchDevice, metaclass=_State):
        __doc__ = TorchDevice.__doc__

        @classmethod
        def apply_patches(cls) -> None:
            """Nothing: torchspan's rules are in force."""

        @classmethod
        def get_default_device(cls) -> torch.device:
            """The device that is given where none is named."""
            return cls._default_device

        @classmethod
        def cpu_override(cls) -> bool:
            """Whether ``cpu:-1`` is on."""
            return cls._cpu_override

        @classmethod
        def toggle(cls) -> torch.device:
            """Turn "what asks for the CPU is given the CPU" on, or off."""
            cls._cpu_override = not cls._cpu_override
            redirection.keep_cpu(cls._cpu_override)
            redirection.simulate(
                f"torch.device({KEEP_CPU!r})", f"the CPU is {'kept' if cls._cpu_override else 'redirected'} now"
            )
            return cls._default_device

    Manager.__name__ = Manager.__qualname__ = "TorchDevice"
    Manager.redirection = redirection
    return Manager


def _labels(redirection: Redirection, manager: Any, old: Any) -> type:
    """``torch.device`` as the package has it; what it gives are torch's own devices, and they are its instances."""

    class Labels(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _REAL)

        def __subclasscheck__(cls, subclass: type) -> bool:
            return subclass is _REAL or type.__subclasscheck__(cls, subclass)

        def __call__(cls, *args: Any, **kwargs: Any) -> Any:
            asker = sys._getframe(1)
            if is_torchs(asker.f_globals, asker.f_code) or (args and isinstance(args[0], _REAL)):
                return _REAL(*args, **kwargs)
            if (not args and not kwargs) or args == ("",):
                return manager.get_default_device()
            if args in ((KEEP_CPU,), ("cpu", -1)):
                return manager.toggle()
            device = _REAL(*args, **kwargs)
            target = redirection.lookup(device)
            if target is None:
                return device
            redirection.note("torch.device", device)
            return _REAL("cpu") if manager.cpu_override() else target

    return Labels("device", (), {"__module__": "torch", "__doc__": old.__doc__})


def _stream(old: Any) -> Function:
    """``torch.cuda.stream()`` makes a stream under the package; with one it is torch's."""

    @wraps(old)
    def stream(*args: Any, **kwargs: Any) -> Any:
        return old(*args, **kwargs) if args or kwargs else torch.cuda.Stream()

    return stream


# logging


def _auto_log(*args: Any, **kwargs: Any) -> Function:
    """A decorator that changes nothing: torchspan's report has each redirection."""
    return lambda function: function


def _logger() -> Mapping[str, object]:
    log = logging.getLogger("TorchDevice")
    levels = {"log_debug": log.debug, "log_info": log.info, "log_warning": log.warning, "log_error": log.error}
    return {**levels, "auto_log": _auto_log}
