"""Write the index of what torchspan's backports change and provide, which activation reads in place of their files."""

from __future__ import annotations

import json

from torchspan.backports._base import INDEX, REGISTRY, get_backport, index_entry


def main() -> None:
    """Write the index, one backport a line."""
    own = (name for name in REGISTRY.names() if REGISTRY.target(name) == f"{REGISTRY.package}.{name}")
    lines = (f"{json.dumps(name)}: {json.dumps(index_entry(get_backport(name)))}" for name in own)
    INDEX.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
