"""The record of one compile, by which the next start of the same program loads its code and compiles nothing.

It is written when a call has taken the code over, and found by a digest of the program and of the state that it is compiled in.
What it names is checked like code that was compiled just now: its files by their digests, its numbers against eager. Where a
file of the program was changed, or the code does not serve for another reason, it is removed and the program is compiled.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch

import torchspan
from torchspan.artifacts.manifest import platform_entries
from torchspan.caches import ledger, starts
from torchspan.jobs.digest import digest
from torchspan.private import inductor
from torchspan.regions.ambient import Ambient
from torchspan.regions.settings import Settings
from torchspan.regions.sources import changed_sources
from torchspan.regions.worker import Filled

LOADING_S = 30.0  # how long a call waits for what an earlier run compiled
_VARIABLES = ("TORCHINDUCTOR_", "TORCHDYNAMO_", "TORCH_COMPILE", "TRITON_", "CXX")
_PLACES = ("_CACHE_DIR", "_DUMP_DIR", "_DEBUG_DIR")


class Record:
    """That of one generation: `payload` is the pickled Task, `ambient` the state of the process.

    `patience` is the number of calls that run eagerly before one waits for what an earlier run compiled.
    """

    def __init__(self, name: str, payload: bytes, ambient: Ambient, patience: int) -> None:
        self.is_loaded = False
        self.why_not: str | None = None
        self._name = name
        self._payload = payload
        self._ambient_text = ambient.text()
        self._patience = patience
        self._offered: tuple[str, bytes] | None = None
        self._known = threading.Event()  # whether an earlier run's code serves, or nothing of one is there
        if not starts.may_have(self._folder, name):
            self._known.set()

    def wait(self) -> None:
        """Have the call after the first few wait for what an earlier run compiled, where there may be some."""
        self._patience -= 1
        if self._patience < 0:
            self._known.wait(LOADING_S)

    def settle(self) -> None:
        """No call needs to wait any more."""
        self._known.set()

    def forget(self) -> None:
        """What was offered is not taken over."""
        self._offered = None

    def read(self, kind: str) -> Filled | None:
        """What an earlier run compiled, whose files are all there; None if nothing is, and `why_not` if it does not serve."""
        self.is_loaded, self.why_not = False, None
        content = starts.read(self._folder, self._name, self._digest(kind))
        if content is None:
            return None
        filled: Filled = pickle.loads(content)
        files = filled.kept.files if filled.artifact is None else {}
        if changed := changed_sources(filled.sources):
            self.why_not = f"files of the program were changed since it was compiled: {', '.join(changed)}"
        elif damaged := ledger.check(self._folder, files):
            self.why_not = f"{ledger.DAMAGED} {', '.join(damaged)}"
        if self.why_not is not None:
            self.remove(kind)
            return None
        with suppress(OSError):  # used now, so that others are evicted first; a folder may be one to read from
            ledger.write(self._folder, files)
        self.is_loaded = True
        return filled

    def offer(self, kind: str, filled: Filled) -> None:
        """Have `keep` write this."""
        if not self.is_loaded:
            self._offered = kind, pickle.dumps(replace(filled, kept=ledger.Kept(filled.kept.files)))

    def keep(self) -> None:
        """Write what was offered: it was taken over. Raises OSError where the folder takes no file."""
        if self._offered is not None:
            kind, content = self._offered
            self._offered = None
            starts.keep(self._folder, self._name, self._digest(kind), content)

    def begin_again(self) -> None:
        """What was read does not serve: keep what is compiled instead."""
        self.is_loaded = False

    def remove(self, kind: str) -> None:
        """Have no record any more: it does not serve."""
        starts.remove(self._folder, self._name, self._digest(kind))

    def _digest(self, kind: str) -> str:
        return f"{self._of_program}-{kind}"

    @cached_property
    def _of_program(self) -> str:
        versions = [torchspan.__version__, sys.version, repr(platform_entries()), *_devices()]
        variables = [f"{name}={value}" for name, value in sorted(os.environ.items()) if _enters(name)]
        program_digest = digest(self._payload, *versions, *variables, self._ambient_text)
        self._payload = b""
        return program_digest

    @cached_property
    def _folder(self) -> Path:
        return inductor.cache_folder()


def _devices() -> list[str]:
    """The GPUs that code may be compiled for."""
    if not torch.cuda.is_initialized():
        return []
    return [repr(torch.cuda.get_device_properties(index)) for index in range(torch.cuda.device_count())]


def _enters(variable: str) -> bool:
    return variable.startswith(_VARIABLES) and not variable.endswith(_PLACES)


def can_be_kept(settings: Settings) -> bool:
    """Whether what is compiled with `settings` lies in inductor's caches, and these are not switched off."""
    return settings.is_inductor and os.environ.get("TORCHINDUCTOR_FORCE_DISABLE_CACHES") != "1"
