"""``fullgraph=True`` and a program that breaks: an error that names the user's line, as torch.compile raises one."""

from __future__ import annotations

import os
import re

import torch

# dynamo's errors for what it cannot capture, in the compile process; other errors there are the compiler's, not the program's
_BREAKS = ("Unsupported", "UncapturedHigherOrderOpError", "UserError")
_OTHERS = (os.path.dirname(torch.__file__) + os.sep, os.path.dirname(__file__) + os.sep)  # whose lines are not the user's
_LINE = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<function>\S+)(?:\n\s+(?P<code>\S.*))?')


def break_message(cause: str | None, name: str) -> str | None:
    """What to tell the user of a compile of `name` that ended with `cause`, if that is a graph break; None if it is not.

    >>> print(break_message('''Unsupported: Unsupported Tensor.item() call
    ...   Explanation: ...
    ... from user code:
    ...    File "m.py", line 7, in forward
    ...     n = x.item()
    ... ''', "Model"))
    Model was compiled with fullgraph=True and breaks at m.py:7, in forward: n = x.item() (Unsupported Tensor.item() call); ...
    >>> break_message("RuntimeError: lowering failed", "Model")
    """
    kind, _, text = (cause or "").partition(": ")
    is_uncaptured = kind == "RuntimeError" and "fullgraph=True" in text  # a program that has nothing to capture
    if kind not in _BREAKS and not is_uncaptured:
        return None
    lines = list(_LINE.finditer(text.partition("from user code:")[2]))
    lines = [line for line in lines if not line["file"].startswith(_OTHERS)] or lines
    at = f" at {_place(lines[-1])}" if lines else ""
    reason = text.strip().partition("\n")[0] or kind
    return (
        f"{name} was compiled with fullgraph=True and breaks{at} ({reason}); "
        "change that line, or use fullgraph=False, which compiles what is before and after it"
    )


def _place(line: re.Match[str]) -> str:
    code = f": {line['code'].strip()}" if line["code"] else ""
    return f"{line['file']}:{line['line']}, in {line['function']}{code}"
