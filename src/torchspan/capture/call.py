"""Capture of one call with make_fx: what a function does with tensors, its backward too, as one graph of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from torchspan.core.errors import CaptureError, UnsupportedError
from torchspan.private import fx

_GIVEN = "L['args']"


@dataclass(frozen=True)
class CapturedCall:
    """One call as a graph.

    `module` takes `inputs`, which stand at `sources` (expressions over ``L['args']``): parameters of the modules among the
    arguments, then buffers, then the other tensors; each once, with its other places in `same`. It gives the tensors of the
    result, then the gradients that the call left at the parameters of `gradients`. `build` makes the result of the former.
    """

    module: GraphModule
    inputs: tuple[Tensor, ...]
    sources: tuple[str, ...]
    same: tuple[tuple[str, str], ...]
    num_parameters: int
    gradients: tuple[str, ...]
    build: Callable[[Sequence[Any]], Any]


def capture_call(function: Callable[..., Any], args: tuple[Any, ...], decompositions: Any = None) -> CapturedCall:
    """Run ``function(*args)`` once, on fake tensors, and record its operators, those of a backward included.

    Nothing is computed: neither tensors nor gradients nor torch's random state are changed. Python runs as it is: control flow
    and numbers are fixed as this call had them.

    Args:
        function: the whole computation; it takes the modules whose parameters and buffers it uses.
        args: modules, tensors, containers of tensors, constants.
        decompositions: a decomposition table, as make_fx takes it.

    Raises:
        CaptureError: it used a tensor that it was not given, asked for a tensor's value, or left a gradient at something that
            is no parameter.
        UnsupportedError: arguments of a kind that is not taken.

    >>> captured = capture_call(lambda model, x: model(x).sum().backward(), (nn.Linear(2, 3), torch.ones(1, 2)))
    >>> captured.gradients
    ("L['args'][0]._parameters['weight']", "L['args'][0]._parameters['bias']")
    """
    from torch.fx.traceback import preserve_node_meta

    from torchspan.capture._kernels import kernels_kept_whole

    inputs = _Inputs.of(args)
    outcome: dict[str, Any] = {}

    def run(*tensors: Tensor) -> list[Tensor]:
        inputs.use(tensors)
        with inputs.in_modules():
            result = function(*inputs.arguments(args))
        return [*_result(result, outcome), *_gradients(inputs, outcome)]

    # real tensors are let in to be refused below, by what they are
    trace = fx.make_fx(run, decomposition_table=decompositions, tracing_mode="fake", _allow_non_fake_inputs=True)
    with kernels_kept_whole(), preserve_node_meta(), torch.enable_grad():
        try:
            module = trace(*inputs.stand_ins)
        except fx.value_errors() as cause:
            lines = str(cause).strip().splitlines() or [type(cause).__name__]
            raise CaptureError(
                f"the call asks for the value of a tensor, which a capture does not compute: {lines[0]}"
            ) from cause
    _refuse_constants(module)
    return CapturedCall(
        module=module,
        inputs=tuple(tensor.detach() for tensor in inputs.stand_ins),
        sources=tuple(inputs.sources),
        same=tuple(inputs.same),
        num_parameters=inputs.num_parameters,
        gradients=outcome["gradients"],
        build=outcome["build"],
    )


def module_source(index: int, name: str) -> str:
    """Where the submodule `name` of the module that is argument `index` stands.

    >>> module_source(1, "layers.0")
    "L['args'][1]._modules['layers']._modules['0']"
    """
    return f"{_GIVEN}[{index}]" + "".join(f"._modules[{part!r}]" for part in name.split(".") if part)


@dataclass
class _Inputs:
    """The tensors of a call: where each stands, and what stands in for it while the call is recorded."""

    sources: list[str] = field(default_factory=list)
    stand_ins: list[Tensor] = field(default_factory=list)
    same: list[tuple[str, str]] = field(default_factory=list)
    num_parameters: int = 0
    _places: dict[int, int] = field(default_factory=dict)
    _owners: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    _held: tuple[Tensor, ...] = ()

    @classmethod
    def of(cls, args: tuple[Any, ...]) -> _Inputs:
        self = cls()
        modules = [
            (module_source(index, name), part)
            for index, argument in enumerate(args)
            if isinstance(argument, nn.Module)
            for name, part in argument.named_modules()
        ]
        for kind in ("_parameters", "_buffers"):
            for source, module in modules:
                held = vars(module)[kind]
                for name, tensor in held.items():
                    if tensor is not None:
                        self._add(f"{source}.{kind}[{name!r}]", tensor)
                        self._owners.append((held, name))
            self.num_parameters = self.num_parameters or len(self.sources)
        for source, leaf in _leaves(args):
            if isinstance(leaf, nn.Module):
                raise CaptureError(f"a module inside of a container ({source}); pass it as an argument of its own")
            if isinstance(leaf, Tensor):
                _refuse_marks(source, leaf)
                self._add(source, leaf)
        return self

    def _add(self, source: str, tensor: Tensor) -> None:
        if id(tensor) in self._places:
            self.same.append((self.sources[self._places[id(tensor)]], source))
            return
        if type(tensor) not in (Tensor, nn.Parameter, nn.Buffer) or tensor.layout is not torch.strided:
            raise UnsupportedError(
                f"{source} is a {type(tensor).__name__} of layout {tensor.layout}; pass plain, dense tensors"
            )
        self._places[id(tensor)] = len(self.sources)
        self.sources.append(source)
        self.stand_ins.append(tensor.detach().requires_grad_(tensor.requires_grad))

    def use(self, tensors: tuple[Tensor, ...]) -> None:
        """Let `tensors` stand in from here on."""
        self._held = tensors

    def parameters(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.sources, self._held))[: self.num_parameters]

    def others(self) -> list[tuple[str, Tensor]]:
        return list(zip(self.sources, self._held))[self.num_parameters :]

    @contextmanager
    def in_modules(self) -> Iterator[None]:
        """While this is open, the modules have the stand-ins as their parameters and buffers."""
        before = [held[name] for held, name in self._owners]
        for (held, name), tensor in zip(self._owners, before):
            held[name] = self._held[self._places[id(tensor)]]
        try:
            yield
        finally:
            for (held, name), tensor in zip(self._owners, before):
                held[name] = tensor

    def arguments(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments, with stand-ins for their tensors."""
        from torch.utils._pytree import tree_map_only

        stand_ins: tuple[Any, ...] = tree_map_only(Tensor, lambda tensor: self._held[self._places[id(tensor)]], args)
        return stand_ins


def _leaves(args: tuple[Any, ...]) -> list[tuple[str, Any]]:
    """The values that are not containers, and where they stand; arguments that are modules are not listed."""
    from torch.utils._pytree import GetAttrKey, tree_flatten_with_path

    leaves = []
    try:
        flat = tree_flatten_with_path(args)[0]
    except ValueError as cause:  # a container that is registered without names of its parts
        raise UnsupportedError(f"an argument holds a container that cannot be taken apart by name: {cause}") from cause
    for path, leaf in flat:
        if len(path) > 1 or not isinstance(leaf, nn.Module):
            steps = (
                f".{key.name}" if isinstance(key, GetAttrKey) else f"[{getattr(key, 'key', getattr(key, 'idx', None))!r}]"
                for key in path
            )
            leaves.append((_GIVEN + "".join(steps), leaf))
    return leaves


def _refuse_marks(source: str, tensor: Tensor) -> None:
    if getattr(tensor, "_dynamo_dynamic_indices", None):
        raise CaptureError(
            f"{source} has dimensions that are marked with mark_dynamic; a single call is captured for the sizes that it has"
        )
    if getattr(tensor, "_dynamo_unbacked_indices", None) or getattr(tensor, "_dynamo_strict_unbacked_indices", None):
        raise UnsupportedError(
            f"{source} has dimensions marked with mark_unbacked, which is not carried here; torch has it since 2.15.0. "
            "Capture once for each size, or use torchspan.precompile with mark_dynamic"
        )


def _result(result: Any, outcome: dict[str, Any]) -> list[Tensor]:
    """The tensors of a call's result; how it is made of them is told in ``build``."""
    from torch.utils._pytree import tree_flatten, tree_unflatten

    leaves, spec = tree_flatten(result)
    places = [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]

    def build(tensors: Sequence[Any]) -> Any:
        values = list(constants)
        for index, tensor in zip(places, tensors):
            values[index] = tensor
        return tree_unflatten(values, spec)

    outcome["build"] = build
    outcome["results"] = [leaves[index] for index in places]
    return list(outcome["results"])


def _gradients(inputs: _Inputs, outcome: dict[str, Any]) -> list[Tensor]:
    """The gradients that the call left, each in memory of its own: what is given to a parameter is added to in place later."""
    for source, tensor in inputs.others():
        if tensor.is_leaf and tensor.grad is not None:
            raise CaptureError(
                f"{source} gets a gradient; only parameters of modules do here: make it a parameter, or detach it before"
            )
    pairs = [(source, tensor.grad) for source, tensor in inputs.parameters() if tensor.grad is not None]
    memories = {tensor.untyped_storage()._cdata for tensor in outcome["results"]}
    gradients = []
    for _, gradient in pairs:
        memory = gradient.untyped_storage()._cdata
        gradients.append(gradient.clone() if memory in memories else gradient)
        memories.add(memory)
    outcome["gradients"] = tuple(source for source, _ in pairs)
    return gradients


def _refuse_constants(module: GraphModule) -> None:
    for node in module.graph.nodes:
        if node.op != "get_attr":
            continue
        held = getattr(module, str(node.target))
        if isinstance(held, Tensor):
            raise CaptureError(
                f"a tensor of shape {tuple(held.shape)} and dtype {held.dtype} is used that is no argument, no parameter and "
                "no buffer (a global, a captured local, an attribute, or a literal such as torch.tensor([...])); pass it as an "
                "argument, or register it as a buffer"
            )
        raise CaptureError(
            f"the part {node.target} (of torch.cond, or such) cannot be captured in a single call; use torch.where"
        )
