"""A graph of operators and native libraries as JSON, and what runs it: no code is generated, nothing is unpickled."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.fx import GraphModule, Node

from torchspan.artifacts.size_conditions import Expression, encode_size, is_size
from torchspan.artifacts.values import decode, encode
from torchspan.core.errors import IntegrityError, UnsupportedError

# Of torch's own operators, a file may name those that compute; others read files, open libraries or talk to other processes.
# aten::from_file reads files, and is no computation. Operators of other namespaces are the program's own.
_NAMESPACES = ("aten", "prims", "_c10d_functional", "quantized")
_FORBIDDEN = ("aten.from_file",)
_OF_TORCH = frozenset(
    (
        "_c10d_functional_autograd",
        "_dtensor",
        "_inductor_test",
        "_native",
        "_native_aot",
        "_quantized",
        "_test",
        "c10d",
        "c10d_functional",
        "coor",
        "cuda",
        "debug_mode_ops",
        "debugprims",
        "export",
        "flex_gemm",
        "flex_lib",
        "fsdp",
        "higher_order",
        "inductor",
        "inductor_prims",
        "mempool",
        "mkl",
        "mkldnn",
        "mkldnn_prepacked",
        "nvprims",
        "onednn",
        "onnx",
        "onnx_symbolic",
        "os",
        "prepacked",
        "prim",
        "profiler",
        "quantization",
        "quantized_decomposed",
        "rngprims",
        "sparse",
        "static_runtime",
        "streams",
        "symm_mem",
        "torch_attn",
    )
)

# Operators that keep what their backward needs only where gradients are on.
WITH_WORKSPACE = ("aten.mkldnn_rnn_layer.default",)

Library = Callable[[list[torch.Tensor]], list[torch.Tensor]]


# writing


def write_program(
    module: GraphModule, libraries: Mapping[str, tuple[str, list[str]]]
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """A graph as JSON, and the constant tensors that it holds.

    `libraries` says for the submodules that were compiled by which name their library goes, and which symbols it needs. Numbers
    that depend on dynamic sizes are no steps: they are written as expressions over symbols, where they are used.

    Raises:
        UnsupportedError: a node that is neither an operator nor a compiled region; names it.
    """
    numbers: dict[Node, int] = {}
    steps: list[dict[str, Any]] = []
    constants: dict[str, torch.Tensor] = {}
    outputs: list[Any] = []
    num_inputs = sum(node.op == "placeholder" and not is_size(node.meta.get("val")) for node in module.graph.nodes)
    for node in module.graph.nodes:
        if is_size(node.meta.get("val")):
            continue
        if node.op == "output":
            values = node.args[0] if isinstance(node.args[0], (tuple, list)) else (node.args[0],)
            outputs = [_write(value, numbers) for value in values]
            break
        numbers[node] = len(numbers)
        if node.op != "placeholder":
            step = _write_node(node, numbers, libraries)
            if "tensor" in step:
                constants[step["tensor"]] = _attribute(module, step["tensor"])
            steps.append(step)
    return {"inputs": num_inputs, "steps": steps, "outputs": outputs}, constants


def _write_node(node: Node, numbers: Mapping[Node, int], libraries: Mapping[str, tuple[str, list[str]]]) -> dict[str, Any]:
    if node.op == "call_function" and str(node.target).startswith("auto_functionalized"):
        raise UnsupportedError(
            f"an artifact cannot hold {node.args[0]}, which changes its arguments in place; let it return new ones"
        )
    arguments: dict[str, Any] = {
        "args": [_write(value, numbers) for value in node.args],
        "kwargs": {name: _write(value, numbers) for name, value in node.kwargs.items()},
    }
    if node.op == "call_module" and node.target in libraries:
        library, symbols = libraries[str(node.target)]
        tensors = [_write(value, numbers) for value in node.all_input_nodes if not is_size(value.meta.get("val"))]
        return {"library": library, "args": [*({"size": name} for name in symbols), *tensors], "kwargs": {}}
    if node.op == "call_function" and node.target is operator.getitem:
        return {"item": node.args[1], "args": arguments["args"][:1], "kwargs": {}}
    if node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload):
        find_operator(str(node.target))
        return {"operator": str(node.target), **arguments}
    if node.op == "get_attr" and isinstance(_attribute(node.graph.owning_module, str(node.target)), torch.Tensor):
        return {"tensor": str(node.target), "args": [], "kwargs": {}}
    raise UnsupportedError(
        f"an artifact cannot hold the step {node.name} ({node.op} {node.target}) outside of a compiled part; compile the whole "
        "program, or annotate the part that it is in"
    )


def _write(value: Any, numbers: Mapping[Node, int]) -> Any:
    if isinstance(value, Node):
        return encode_size(value.meta["val"]) if is_size(value.meta.get("val")) else {"step": numbers[value]}
    if isinstance(value, (list, tuple)):
        return [_write(item, numbers) for item in value]
    return encode_size(value) if is_size(value) else encode(value)


def _attribute(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part)
    return module


# running


class _Reference:
    """The result of a step, by its number."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index


class _Step(NamedTuple):
    run: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    free: tuple[int, ...]
    plain: tuple[int, ...] | None  # the steps that it takes, if it takes nothing else


class Runner:
    """Runs a program that `write_program` wrote.

    >>> graph = torch.fx.experimental.proxy_tensor.make_fx(lambda x: (x + 1, x.sum()))(torch.ones(2))
    >>> program, constants = write_program(graph, {})
    >>> Runner(program, {}, constants)([torch.ones(2)])
    [tensor([2., 2.]), tensor(2.)]
    """

    def __init__(
        self, program: Mapping[str, Any], libraries: Mapping[str, Library], constants: Mapping[str, torch.Tensor]
    ) -> None:
        self._num_inputs = int(program["inputs"])
        self._outputs = [_read(value) for value in program["outputs"]]
        last: dict[int, int] = {}
        read = [
            (_read(step["args"]), {name: _read(value) for name, value in step["kwargs"].items()}) for step in program["steps"]
        ]
        for number, (args, kwargs) in enumerate(read, start=self._num_inputs):
            for index in _references([args, list(kwargs.values())]):
                if index >= number:
                    raise IntegrityError(f"an artifact's step {number} uses step {index}, which runs later")
                last[index] = number
        kept = set(_references(self._outputs))
        self._steps: list[_Step] = []
        for number, (step, (args, kwargs)) in enumerate(zip(program["steps"], read), start=self._num_inputs):
            free = tuple(
                index for index, user in last.items() if user == number and index not in kept and index >= self._num_inputs
            )
            is_plain = not kwargs and all(isinstance(value, _Reference) for value in args)
            plain = tuple(value.index for value in args) if is_plain else None
            self._steps.append(_Step(_function(step, libraries, constants), tuple(args), kwargs, free, plain))

    @property
    def num_outputs(self) -> int:
        """How many values it computes."""
        return len(self._outputs)

    def __call__(self, inputs: Sequence[Any], symbols: Mapping[str, int] | None = None) -> list[Any]:
        """The outputs, for `inputs` in order, and the symbols of dynamic sizes."""
        values = list(inputs)
        assert len(values) == self._num_inputs, f"{len(values)} inputs for a program of {self._num_inputs}"
        for step in self._steps:
            if step.plain is not None:
                values.append(step.run(*[values[index] for index in step.plain]))
            else:
                kwargs = {name: _fill(value, values, symbols) for name, value in step.kwargs.items()}
                values.append(step.run(*_fill(step.args, values, symbols), **kwargs))
            for index in step.free:
                values[index] = None
        return [_fill(value, values, symbols) for value in self._outputs]


def _function(
    step: Mapping[str, Any], libraries: Mapping[str, Library], constants: Mapping[str, torch.Tensor]
) -> Callable[..., Any]:
    if "operator" in step:
        function = find_operator(step["operator"])
        if function is torch.ops.aten.view.default:  # strides are not always what was foreseen: batch norms of permuted tensors
            return torch.ops.aten.reshape.default
        return partial(_with_workspace, function) if step["operator"] in WITH_WORKSPACE else function
    if "item" in step:
        return operator.itemgetter(int(step["item"]))
    if "tensor" in step:
        tensor = constants[step["tensor"]]
        return lambda: tensor
    library = libraries[step["library"]]
    num_sizes = sum(isinstance(value, dict) and "size" in value for value in step["args"])
    return (lambda *inputs: library(list(inputs))) if not num_sizes else partial(_call_sized, library, num_sizes)


def _with_workspace(operator: Any, *args: Any) -> Any:
    """Call an operator that keeps a workspace for its backward, which it does only where gradients are on."""
    with torch.enable_grad(), torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def _call_sized(library: Library, num_sizes: int, *inputs: Any) -> list[torch.Tensor]:
    """Call a library that takes the sizes it needs, which are the first inputs, from empty tensors."""
    return library([*(torch.empty((size, 0)) for size in inputs[:num_sizes]), *inputs[num_sizes:]])


def find_operator(name: str) -> Any:
    """The operator of a dotted name such as ``aten.add.Tensor``: one of torch's that compute, or one of the program's own.

    Raises:
        UnsupportedError: one of torch's that do something else, or an operator that is not registered here.
    """
    parts = name.split(".")
    if len(parts) != 3 or parts[0] in _OF_TORCH or ".".join(parts[:2]) in _FORBIDDEN:
        why = "reads files" if ".".join(parts[:2]) in _FORBIDDEN else f"is of none of {', '.join(_NAMESPACES)}"
        raise UnsupportedError(f"an artifact may not name the operator {name:.80}: it {why}")
    packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
    overload = getattr(packet, parts[2], None)
    if not isinstance(overload, torch._ops.OpOverload) or not torch._C._dispatch_has_kernel(overload.name()):
        # also: what only TorchScript has, such as aten::set_grad_enabled, is no computation
        if parts[0] not in _NAMESPACES:
            raise UnsupportedError(
                f"no operator {name:.80} is registered here; import what registers it before the artifact is loaded"
            )
        raise UnsupportedError(f"this torch has no operator {name}; rebuild the artifact with this torch")
    return overload


def _read(value: Any) -> Any:
    if isinstance(value, list):
        return [_read(item) for item in value]
    if isinstance(value, dict) and "step" in value:
        return _Reference(int(value["step"]))
    if isinstance(value, dict) and "size" in value:
        return Expression.of(value["size"])
    return decode(value)


def _references(value: Any) -> list[int]:
    if isinstance(value, _Reference):
        return [value.index]
    return [index for item in value for index in _references(item)] if isinstance(value, list) else []


def _fill(value: Any, values: list[Any], symbols: Mapping[str, int] | None) -> Any:
    if isinstance(value, _Reference):
        return values[value.index]
    if isinstance(value, (list, tuple)):
        return type(value)(_fill(item, values, symbols) for item in value)
    return value.value(symbols or {}) if isinstance(value, Expression) else value
