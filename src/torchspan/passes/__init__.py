"""Graph → Graph; one pass per file, valid in, valid out.

What a pass outside this package is written with is found here: `Pass`, `PassContext`, `Stage`, `editable`, `refuse_writes`,
`Pipeline`. They are imported when they are asked for.
"""

from torchspan.core.lazy import public_names

__getattr__, __dir__, __all__ = public_names(__name__)
