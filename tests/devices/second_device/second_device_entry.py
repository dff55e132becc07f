"""What torch calls when it is imported, by the entry point in ``second_device-1.0.dist-info``."""

from __future__ import annotations

import sys


def load() -> None:
    """Load the device, unless it is its own module that imports torch: then who imports that loads it."""
    if "second_device" not in sys.modules:
        import second_device

        second_device.load()
