"""``torch.fx.graph._BoxedCodeGen`` and ``print_readable(expanded_def=, additional_meta=)``: newer code of graphs."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torchspan.backports._base import Backport, Change


@functools.cache
def _boxed() -> type:
    """The class, made when it is asked for: its base is torch.fx's."""
    from torch.fx.graph import CodeGen

    class _BoxedCodeGen(CodeGen):
        """Code whose function takes one list and empties it, so that what is in it can be freed early."""

        def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
            """The first lines of the function."""
            names = [name.split(":")[0].split("=")[0].strip() for name in free_vars if name != "self"]
            lines = [f"def {self._func_name}(self, args_list){maybe_return_annotation}:"]
            if names:
                lines += ["    args_iter = iter(args_list)", *(f"    {name} = next(args_iter)" for name in names)]
                lines += ["    args_list.clear()"]
            return "\n".join(lines)

    _BoxedCodeGen.__module__, _BoxedCodeGen.__qualname__ = "torch.fx.graph", "_BoxedCodeGen"
    return _BoxedCodeGen


def _printing(print_readable: Callable[..., str]) -> Callable[..., str]:
    """print_readable, which leaves out what this torch cannot show."""
    own = inspect.signature(print_readable).parameters
    if "additional_meta" in own:
        return print_readable

    @functools.wraps(print_readable)
    def show(self: Any, *args: Any, **options: Any) -> str:
        for name in ("expanded_def", "additional_meta"):
            if name not in own and options.pop(name, None):
                BACKPORT.record_use(f"print_readable({name}=…): the text is without it")
        return print_readable(self, *args, **options)

    return show


BACKPORT = Backport(
    name="fx_boxed_codegen",
    summary="code of graphs that takes one list: torch.fx.graph._BoxedCodeGen; print_readable(expanded_def=, additional_meta=)",
    target="torch.fx.graph",
    since="2.10.0",
    first_forms={"2.10": "print_readable takes no additional_meta"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.10.0/torch/fx/graph.py",
    differs="print_readable's text has each function's parameters on one line and no additional metadata",
    names={"_BoxedCodeGen": _boxed},
    also=(Change("torch.fx", "GraphModule.print_readable", _printing, always=True),),
)
