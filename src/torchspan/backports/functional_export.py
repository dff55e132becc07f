"""``torch._dynamo.functional_export``: a program's graph as dynamo sees it, in a module that is called as the program is."""

from __future__ import annotations

import builtins
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from torchspan.backports._base import Backport
from torchspan.backports._export_frame import capture_frame, check_example_inputs, without_outside_changes

_PLACE = "torch._dynamo.functional_export"


def dynamo_graph_capture_for_export(
    fn: Callable[..., Any], constraints: Sequence[Any] | None = None
) -> Callable[..., GraphModule]:
    """A function that, given example arguments of `fn`, returns its graph; `fn` itself is not run.

    The graph's module takes what `fn` takes and returns what it returns; it has the parameters, buffers, submodules and
    attributes of `fn` where that is a module. Its placeholders are the tensors that are used, parameters too. Changes to Python
    objects that `fn` makes are left out, with a warning. ``meta["fake_mode"]`` and ``meta["tracing_context"]`` are what to
    trace it further with.

    Args:
        fn: a module, a method or a function.
        constraints: of dynamic shapes.

    Raises:
        torch._dynamo.exc.Unsupported: `fn` is not one graph.
        torch._dynamo.exc.UserError: an example argument that is no tensor, number, string or None.
        AssertionError: `fn` does nothing with tensors.
    """

    def capture(*args: Any, **kwargs: Any) -> GraphModule:
        check_example_inputs(pytree.tree_leaves((args, kwargs)))
        function, owner = _function_of(fn)
        bound = () if owner is None else (owner,)
        frame, scope = _frame(function, (*bound, *args), kwargs)
        changes: list[str] = []
        with without_outside_changes(changes):
            captured = capture_frame(frame, constraints)
        if changes:
            warnings.warn(
                f"the program changes Python objects, which its graph does not: {', '.join(changes)}", UserWarning, stacklevel=2
            )
        assert captured is not None, f"{fn!r} does nothing with tensors: there is no graph to capture"
        module = captured.module
        if isinstance(owner, torch.nn.Module):
            _take_state(module, owner)
        root = module if isinstance(owner, torch.nn.Module) else owner
        call = _Call(function, captured.code, scope, captured.graph_name, () if root is None else (root,), len(args), [*kwargs])
        vars(module).pop("_param_name_to_source", None)  # with it, AOTAutograd would take this for dynamo's own graph
        flatten, unflatten = call.ends()
        names = ["self_" if name == "self" else name for name in _argument_names(fn, args, kwargs)]
        module.graph.set_codegen(_BytecodeCodeGen(names, flatten, unflatten))
        for node in module.graph.find_nodes(op="placeholder"):
            node.meta["val"] = node.meta["example_value"]
        vars(module).update(_dynamo_bytecode_flatten=flatten, _dynamo_bytecode_unflatten=unflatten)
        module.recompile()
        module.meta |= {"module_call_specs": {}, "fake_mode": captured.fake_mode, "tracing_context": captured.tracing_context()}
        captured.fake_mode.allow_non_fake_inputs = True
        return module

    return capture


dynamo_graph_capture_for_export.__module__ = _PLACE


# what is traced


def _function_of(target: Any) -> tuple[FunctionType, Any]:
    """The Python function that a call of `target` runs, and the object that it is bound to, or None."""
    if isinstance(target, torch.nn.Module):
        method = target.__call__ if _has_hooks(target) else target.forward
    elif isinstance(target, torch._ops.OpOverload):
        return _call_of(target), None
    else:
        method = target
    if inspect.ismethod(method):
        return method.__func__, method.__self__  # type: ignore[return-value]
    if inspect.isfunction(method):
        return method, None
    raise RuntimeError(f"{target!r} has no Python code to capture: expected a module, a method or a function")


def _call_of(operator: Any) -> FunctionType:
    def call(*args: Any, **kwargs: Any) -> Any:
        return operator(*args, **kwargs)

    return call  # type: ignore[return-value]


def _has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call does more than run ``forward``."""
    kinds = ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks")
    everywhere = torch.nn.modules.module
    own_call = type(module).__call__ is not torch.nn.Module.__call__ and not isinstance(module, GraphModule)
    return own_call or any(getattr(module, f"_{kind}") or getattr(everywhere, f"_global_{kind}") for kind in kinds)


def _frame(function: FunctionType, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The frame that dynamo would see in a call, and its global names, which are a copy: dynamo adds its own."""
    bound = inspect.signature(function, follow_wrapped=False).bind(*args, **kwargs)
    bound.apply_defaults()
    code = function.__code__.replace()  # a code object of its own: dynamo keeps state by code
    scope = dict(function.__globals__)
    held = {name: cell.cell_contents for name, cell in zip(code.co_freevars, function.__closure__ or ()) if _is_filled(cell)}
    frame = SimpleNamespace(
        f_code=code,
        f_globals=scope,
        f_locals={**bound.arguments, **held},
        f_builtins=vars(builtins),
        closure=function.__closure__ or (),
        f_lasti=0,
        f_lineno=code.co_firstlineno,
    )
    return frame, scope


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - there is no other way to ask
    except ValueError:
        return False
    return True


def _argument_names(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    """Names for the arguments of a call, in their order; those of a module are the ones of its ``__call__``, as upstream."""
    positional: list[str] = []
    for parameter in inspect.signature(target).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.POSITIONAL_ONLY):
            positional.append(parameter.name)
        elif parameter.kind is parameter.VAR_POSITIONAL:
            positional += [f"{parameter.name}_{index}" for index in range(len(args) - len(positional))]
    return [*positional[: len(args)], *kwargs]


# what is returned


def _take_state(module: GraphModule, root: torch.nn.Module) -> None:
    """Give the graph's module all that `root` has; hooks have been traced, and do not run again."""
    own_names = set(vars(module)) - {"_parameters", "_buffers", "_non_persistent_buffers_set"}
    module._modules.update(root._modules)
    for name, value in vars(root).items():
        if name not in own_names and name not in getattr(torch.nn.Module, "__annotations__", {}):
            vars(module)[name] = value
    for name in ("_parameters", "_buffers", "_non_persistent_buffers_set"):
        vars(module)[name] = vars(root)[name]
    if _has_hooks(root):
        type(module)._call_impl = lambda self, *args, **kwargs: self.forward(*args, **kwargs)  # type: ignore[method-assign]
        for kind in ("forward_pre_hooks", "forward_hooks", "backward_pre_hooks", "backward_hooks"):
            vars(module)[f"_{kind}"] = getattr(root, f"_{kind}").copy()


class _Stopped(BaseException):
    """Ends the bytecode where it calls the graph."""


@dataclass(frozen=True)
class _Call:
    """Dynamo's bytecode for a call of `function`: it finds the graph's inputs, calls the graph, and builds the result."""

    function: FunctionType
    code: CodeType
    scope: Mapping[str, Any]
    graph_name: str
    bound: tuple[Any, ...]
    num_args: int
    kwarg_names: list[str] = field(default_factory=list)

    def ends(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """From arguments to the graph's inputs, and from the graph's outputs (and the arguments) to the result."""
        return torch.compiler.disable(self._inputs_of), torch.compiler.disable(self._result_of)

    def _inputs_of(self, *arguments: Any) -> tuple[Any, ...]:
        calls: list[tuple[Any, ...]] = []

        def stop(*inputs: Any) -> None:
            calls.append(inputs)
            raise _Stopped

        try:
            self._run(stop, arguments)
        except _Stopped:
            return calls[0]
        raise AssertionError(f"the bytecode of {self.function.__qualname__} did not call its graph")

    def _result_of(self, outputs: Sequence[Any], arguments: tuple[Any, ...]) -> Any:
        with torch._C._DisableTorchDispatch():  # what a trace sees is the graph alone
            return self._run(lambda *inputs: outputs, arguments)

    def _run(self, graph: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        scope = {**self.scope, self.graph_name: graph}
        run = FunctionType(self.code, scope, None, self.function.__defaults__, self.function.__closure__)
        run.__kwdefaults__ = self.function.__kwdefaults__
        kwargs = dict(zip(self.kwarg_names, arguments[self.num_args :]))
        return run(*self.bound, *arguments[: self.num_args], **kwargs)


class _BytecodeCodeGen(CodeGen):
    """Code for a graph that is called as the program: the ends of dynamo's bytecode stand before and after it."""

    def __init__(self, argument_names: list[str], flatten: Callable[..., Any], unflatten: Callable[..., Any]) -> None:
        super().__init__()
        self.argument_names = argument_names
        self.flatten, self.unflatten = flatten, unflatten
        self._arguments: tuple[Any, ...] = ()

    def process_inputs(self, *args: Any) -> Any:
        self._arguments = args
        return self.flatten(*args)

    def process_outputs(self, outputs: Any) -> Any:
        arguments, self._arguments = self._arguments, ()
        return self.unflatten(outputs, arguments)

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, **options: Any) -> str:
        inputs = "".join(f"{variable.split(':')[0].split('=')[0].split('#')[0].strip()}, " for variable in free_vars)
        definition = super().gen_fn_def([*self.argument_names], maybe_return_annotation, **options)
        arguments = "".join(f"{name}, " for name in self.argument_names)
        lines = [definition, f"_fn_args = ({arguments})", f"{inputs or '_ '}= self._dynamo_bytecode_flatten(*_fn_args)"]
        return "\n    ".join(lines)

    def generate_output(self, output_args: Any, **options: Any) -> str:
        outputs = "".join(f"{value!r}, " for value in output_args)
        return f"return self._dynamo_bytecode_unflatten(({outputs}), _fn_args)"


BACKPORT = Backport(
    name="functional_export",
    summary="a program's graph as dynamo sees it, called as the program is: dynamo_graph_capture_for_export",
    target=_PLACE,
    since="2.10.0",
    first_forms={
        "2.10": "asks for keyword-only arguments of the model at each call, and makes an input of a dynamic dimension's size",
        "2.11": "makes an input of a dynamic dimension's size",
    },
    upstream="https://github.com/pytorch/pytorch/pull/165225",
    differs='meta["module_call_specs"] is empty',
    names={"dynamo_graph_capture_for_export": lambda: dynamo_graph_capture_for_export},
    is_module=True,
)
