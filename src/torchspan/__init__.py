"""torchspan: one PyTorch program, on any PyTorch, any device, any scale. Importing this changes nothing.

Its public names are in ``__init__.pyi``; each is imported when it is first looked up: importing torchspan imports no torch.
"""

from torchspan.core.lazy import public_names

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = public_names(__name__)
