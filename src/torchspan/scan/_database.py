"""The file of torch's names, read: the modules of several releases, with the names in each and what stands there.

``tools/make_names_database.py`` makes ``names.xz``; ``_module_names.py`` and ``_link_names.py`` there say what its lines mean.
A set of releases is a mask: an int with one bit for each, the oldest one lowest.
"""

from __future__ import annotations

import lzma
from dataclasses import dataclass, field
from pathlib import Path

DATABASE = Path(__file__).with_name("names.xz")

Variants = tuple[tuple[int, str], ...]  # (mask, entry)


@dataclass
class Module:
    """One module in the releases of `mask`; in those of `open_mask` it may have more names than are listed."""

    mask: int
    open_mask: int
    is_partial: bool
    names: dict[str, Variants] = field(default_factory=dict)
    members: dict[str, dict[str, Variants]] = field(default_factory=dict)  # of each class


def read_database(path: Path) -> str:
    """The text of a file such as `DATABASE`."""
    return lzma.decompress(path.read_bytes()).decode()


class Database:
    """The modules of several torch releases, given as text; each is read when it is first asked for."""

    def __init__(self, text: str) -> None:
        first, *blocks = text.split("\0")
        self.releases = tuple(first.split())
        self.all = (1 << len(self.releases)) - 1
        self.blocks = {block[: block.index("\t")]: block for block in blocks}
        self._modules: dict[str, Module] = {}

    def module(self, name: str) -> Module | None:
        """The module `name`; None where no release has it."""
        module = self._modules.get(name)
        if module is None and name in self.blocks:
            module = self._modules[name] = _parse(self.blocks[name])
        return module


def _parse(block: str) -> Module:
    head, *lines = block.rstrip("\n").split("\n")
    _, mask, open_mask, partial = head.split("\t")
    module = Module(int(mask, 16), int(open_mask, 16), bool(partial))
    owner, owner_mask = "", 0
    for line in lines:
        name, _, rest = line.partition("\t")
        its_text, _, entry = rest.partition("\t")
        if name.startswith("."):
            members = module.members.setdefault(owner, {})
            its = int(its_text, 16) if its_text else owner_mask
            members[name[1:]] = (*members.get(name[1:], ()), (its, entry))
            continue
        its = int(its_text, 16) if its_text else module.mask
        if entry.startswith(":"):
            owner_mask = its if name != owner else owner_mask | its
            owner = name
        module.names[name] = (*module.names.get(name, ()), (its, entry))
    return module
