"""``python -m torchspan`` is ``torchspan``."""

import sys

from torchspan.cli import main

if __name__ == "__main__":
    sys.exit(main())
