"""``torch.fx.passes.regional_inductor``: only the annotated parts of a graph are compiled with inductor."""

from __future__ import annotations

from typing import Any

from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from torchspan.backports._base import Backport
from torchspan.backports._part import compile_part
from torchspan.core.regions import Region, cut_regions, list_regions, replace_region
from torchspan.private import inductor


def regional_inductor(gm: GraphModule, *example_args: object) -> GraphModule:
    """Compile the nodes annotated with ``compile_with_inductor`` with inductor, and leave the others as they are.

    The value of the annotation may be a dictionary: ``inductor_configs`` in it are options of inductor for that region. Usable
    as a compiler of AOTAutograd, for the forward and for the backward: where there was something to compile, the module that
    is returned takes its inputs in one list, which it clears.

    Raises:
        ValueError: an option that inductor does not have.
        GraphError: a region's input has no ``meta["val"]``.
    """
    compiled, num_regions = _compile_regions(gm)
    if num_regions:
        compiled.graph.set_codegen(_BoxedCodeGen())
        compiled.recompile()
        vars(compiled)["_boxed_call"] = True
    return compiled


regional_inductor.__module__ = "torch.fx.passes.regional_inductor"


def _compile_regions(gm: GraphModule) -> tuple[GraphModule, int]:
    """The graph with its regions compiled, also those of the graphs that it calls, and the number of its own."""
    cut = cut_regions(gm)
    for target in dict.fromkeys(str(node.target) for node in cut.graph.find_nodes(op="get_attr")):  # one may be called twice
        called = cut.get_submodule(target) if _is_submodule(cut, target) else None
        if isinstance(called, GraphModule):
            parent, _, last = target.rpartition(".")
            setattr(cut.get_submodule(parent), last, _compile_regions(called)[0])
    regions = list_regions(cut)
    for region in regions:
        replace_region(cut, region, _compile_region(region))
    return cut, len(regions)


def _is_submodule(gm: GraphModule, target: str) -> bool:
    return target in dict(gm.named_modules(remove_duplicate=False))


def _compile_region(region: Region) -> Any:
    options = region.annotation.get("inductor_configs", {}) if isinstance(region.annotation, dict) else {}
    for name in options:
        if not hasattr(inductor.config, name):
            raise ValueError(
                f"Invalid inductor config key '{name}' in the annotation of region {region.name!r}; "
                "torch._inductor.config lists the keys that there are"
            )
    with inductor.config.patch(dict(options)):
        return compile_part(region.module, region.example_inputs())


class _BoxedCodeGen(CodeGen):
    """Code for a function that takes its inputs in one list and clears it, so that each can be freed after its last use."""

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        names = [variable.split(":")[0].split("=")[0].strip() for variable in free_vars if variable != "self"]
        name = getattr(self, "_func_name", "forward")
        unpack = f"\n    {', '.join(names)}, = args_list\n    args_list.clear()" if names else ""
        return f"def {name}(self, args_list){maybe_return_annotation}:{unpack}"


BACKPORT = Backport(
    name="regional_inductor",
    summary="compile only the annotated parts of a graph with inductor: torch.fx.passes.regional_inductor",
    target="torch.fx.passes.regional_inductor",
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/164776",
    differs=(
        "parts with different annotations are compiled apart, where upstream merges those without an inductor_region; in-place "
        "changes stay outside; works outside of a torch.compile too"
    ),
    names={"regional_inductor": lambda: regional_inductor},
    is_module=True,
)
