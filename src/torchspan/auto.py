"""Importing this is :func:`torchspan.activate`, with what the variables ``TORCHSPAN_…`` say: the one-line switch."""

from torchspan.api import autoload

autoload()
