"""TorchScript: devices that a script names are those of the target, from its compilation on.

A script is compiled to a graph that no Python runs in, so what it asks of a device is changed there: constants, ``x.cuda()``,
and devices that are known only when it runs. The graph stays as it is when the rules go.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cache, partial, wraps
from typing import Any

import torch

from torchspan.core.report import user_site
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function
from torchspan.environment.patch import Patch, Redefinition, Replacement

_MARK = "torchspan_here"
_PLACE = re.compile(r'File "([^"]+)", line (\d+)')


def patches(redirection: Redirection) -> Iterable[Patch]:
    """Where functions and modules are compiled and loaded."""
    if redirection.target != "cpu":
        return
    for name in ("_jit_script_compile", "_jit_script_compile_overload"):
        yield Replacement("scripting", "torch._C", name, partial(_compiling, redirection))
    yield Redefinition("scripting", "torch.jit._recursive", "create_script_module_impl", partial(_of_modules, redirection))
    yield Redefinition("scripting", "torch.jit._serialization", "load", partial(_of_modules, redirection))


def _compiling(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def compile_function(*args: Any, **kwargs: Any) -> Any:
        function = old(*args, **kwargs)
        rewrite(redirection, function.graph)
        return function

    return compile_function


def _of_modules(redirection: Redirection, old: Function) -> Function:
    def make(*args: Any, **kwargs: Any) -> Any:
        script_module = old(*args, **kwargs)
        for module in script_module.modules():
            if "_c" not in vars(module):
                continue  # a submodule of a plain kind
            for name in module._c._method_names():
                rewrite(redirection, module._c._get_method(name).graph)
        return script_module

    return make


def rewrite(redirection: Redirection, graph: Any) -> None:
    """Give the operators of `graph` the target where they ask for a device that is not here."""
    for node in list(_nodes(graph)):
        if node.kind() in ("aten::cuda", "aten::cpu"):
            _rewrite_move(redirection, graph, node)
        elif node.kind().startswith("aten::") and node.schema() != "(no schema)":
            _rewrite_arguments(redirection, graph, node)


def _nodes(block: Any) -> Iterator[Any]:
    for node in block.nodes():
        yield node
        for inner in node.blocks():
            yield from _nodes(inner)


def _rewrite_move(redirection: Redirection, graph: Any, node: Any) -> None:
    """``x.cuda()`` and ``x.cpu()`` are copies on the target."""
    if node.kind() == "aten::cuda":
        _note(redirection, node, "cuda")
    constants = [_constant(graph, node, value) for value in (torch.device("cpu"), None, False, True)]
    moved = graph.create("aten::to", [node.inputsAt(0), *constants], 1)
    moved.insertBefore(node)
    moved.copyMetadata(node)
    moved.output().setType(node.output().type())
    node.output().replaceAllUsesWith(moved.output())
    node.destroy()


def _rewrite_arguments(redirection: Redirection, graph: Any, node: Any) -> None:
    names = [argument.name for argument in torch._C.parse_schema(node.schema()).arguments]
    if "device" in names:
        _rewrite_device(redirection, graph, node, names.index("device"))
    if node.kind() == "aten::to" and "copy" in names and ("device" in names or "other" in names):
        place = node.inputsAt(names.index("device" if "device" in names else "other"))
        if not (place.node().kind() == "prim::Constant" and place.toIValue() is None):  # else only the type is changed
            node.replaceInput(names.index("copy"), _constant(graph, node, True))  # where a tensor lies is known to no graph


def _rewrite_device(redirection: Redirection, graph: Any, node: Any, position: int) -> None:
    value = node.inputsAt(position)
    device = value.toIValue() if value.node().kind() == "prim::Constant" else None
    if device is not None:
        if redirection.lookup(device) is None:
            return
        _note(redirection, node, device)
        node.replaceInput(position, _constant(graph, node, torch.device("cpu")))
    elif value.node().kind() not in ("prim::Constant", "prim::device") and not value.debugName().startswith(_MARK):
        is_optional = "Optional" in str(value.type()) or "?" in str(value.type())
        redirection.begin_use()  # it may be the device
        graph.setInsertPoint(node)
        (here,) = graph.insertGraph(_here(redirection.kinds, is_optional), [value])
        here.setDebugName(_MARK)
        node.replaceInput(position, here)


def _note(redirection: Redirection, node: Any, device: object) -> None:
    place = _PLACE.search(node.sourceRange())
    site = f"{place[1]}:{place[2]}" if place else user_site()
    redirection.note_at(site or "?:0", f"torch.jit, {node.kind()}", device)


def _constant(graph: Any, node: Any, value: Any) -> Any:
    """A constant of `graph`, before `node`."""
    constant = graph.create("prim::Constant", [], 1)
    if value is None:
        constant.output().setType(torch._C.NoneType.get())
    elif isinstance(value, bool):
        constant.i_("value", int(value))
        constant.output().setType(torch._C.BoolType.get())
    else:
        constant.s_("value", str(value))
        constant.output().setType(torch._C.DeviceObjType.get())
    constant.insertBefore(node)
    return constant.output()


@cache
def _here(kinds: tuple[str, ...], is_optional: bool) -> Any:
    """A graph that gives the CPU for a device of one of these kinds, and else the device itself."""
    kind = "Optional[Device]" if is_optional else "Device"
    of_kind = " or ".join(f"d.type == {kind!r}" for kind in kinds)
    test = f"d is not None and ({of_kind})" if is_optional else of_kind
    source = f"def here(d: {kind}) -> {kind}:\n    if {test}:\n        d = torch.device('cpu')\n    return d\n"
    return torch.jit.CompilationUnit(source).here.graph
