"""Program → Graph, and Program → graph, bytecode and guards.

What an author of passes needs is found here: `capture_train_step`, `capture_joint`, and `BoundGraph`, which runs a Graph with
the parameters of a program. They are imported when they are asked for.
"""

from torchspan.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__)
