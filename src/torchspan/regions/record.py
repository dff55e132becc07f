"""The record of one compile, by which the next start of the same program loads its code and compiles nothing.

It is written when a call has taken the code over, and found by a digest of the program and of the state that it is compiled in.
The code is checked as new code is: its files by their digests, its results against eager. If a file of the program has changed,
or the code cannot be used for another reason, the record is removed and the program is compiled. The ways in which a generation
ends, and whether its record is removed, are in the table of :mod:`.lifecycle`.
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
    """The record of one generation: `payload` is the pickled Task, `ambient` the state of the process.

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
        self._known = threading.Event()  # set once it is known whether an earlier run's code can be used
        if not starts.may_have(self._folder, name):
            self._known.set()

    def wait(self) -> None:
        """Count a call; after the first few, wait until it is known whether an earlier run's code can be used."""
        self._patience -= 1
        if self._patience < 0:
            self._known.wait(LOADING_S)

    def settle(self) -> None:
        """Let the calls that wait go on."""
        self._known.set()

    def forget(self) -> None:
        """Drop what was offered: no call takes it over."""
        self._offered = None

    def read(self, kind: str) -> Filled | None:
        """What an earlier run compiled; None if there is nothing, or, with `why_not`, if it cannot be used."""
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
        """Set what `keep` is to write."""
        if not self.is_loaded:
            self._offered = kind, pickle.dumps(replace(filled, kept=ledger.Kept(filled.kept.files)))

    def keep(self) -> None:
        """Write what was offered: it was taken over. Raises OSError where the folder takes no file."""
        if self._offered is not None:
            kind, content = self._offered
            self._offered = None
            starts.keep(self._folder, self._name, self._digest(kind), content)

    def begin_again(self) -> None:
        """Have `keep` write what is compiled from now on: what was read cannot be used."""
        self.is_loaded = False

    def remove(self, kind: str) -> None:
        """Remove the record: its code cannot be used."""
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
