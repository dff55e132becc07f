"""torchspan: one PyTorch program, on any PyTorch, any device, any scale. Importing this changes nothing."""

__version__ = "0.1.0"
