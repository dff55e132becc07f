"""Whether Transformers gathers what the blocks of a model compute: hidden states, attentions, logits of routers."""

from __future__ import annotations

import sys


def is_gathering() -> bool:
    """Whether hooks on the blocks that are called here and now keep what these compute, in a list outside of the model.

    A block that is compiled by itself would depend on what other blocks have put there.
    """
    capturing = sys.modules.get("transformers.utils.output_capturing")
    active = getattr(capturing, "_active_collector", None)
    return active is not None and bool(active.get())
