"""Import of torch with torchspan active over plain import, each in fresh processes."""

from __future__ import annotations

import _harness as harness

CODE = "import time; start = time.perf_counter(); import torch; print(time.perf_counter() - start)"


def main() -> None:
    """Measure and write."""
    options = harness.arguments(__doc__, repeats=15)
    harness.fresh_process(CODE, {"TORCHSPAN": "1"})  # writes the bytecode
    ours, theirs = harness.in_turn(
        lambda: harness.fresh_process(CODE, {"TORCHSPAN": "1"}), lambda: harness.fresh_process(CODE), options.repeats
    )
    idle, plain = harness.in_turn(
        lambda: harness.fresh_process(CODE),
        lambda: harness.fresh_process(CODE, {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}),
        options.repeats,
    )
    rows = [
        harness.Row("import torch, TORCHSPAN=1 over plain", ours, theirs, goal=1.02),
        harness.Row("import torch, installed but not asked for, over no entry point", idle, plain, goal=1.02),
    ]
    harness.write("import_time", rows, options.out)


if __name__ == "__main__":
    main()
