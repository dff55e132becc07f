"""torch.Precompile in two stages: dynamo captures, aot_autograd compiles."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import CodeType
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule

from torchspan.artifacts.compiling import compile_graph
from torchspan.artifacts.dynamic_marks import marked, marks_of, takes_keyword
from torchspan.artifacts.guard_export import portable_sizes
from torchspan.artifacts.size_conditions import Sizes
from torchspan.capture.dynamo import Guards, capture_dynamo
from torchspan.core.errors import CompileError, InputError, TorchspanError
from torchspan.core.program import Program

if TYPE_CHECKING:
    pass


Compiler = Callable[[GraphModule, Sequence[Any]], Any]


class Precompile:
    """Ahead-of-time compilation in two stages that can be stopped at and looked into: ``dynamo``, then ``aot_autograd``.

    >>> model = torch.nn.Linear(2, 3)
    >>> gm, bytecode, guards, inputs = Precompile.dynamo(model, torch.ones(1, 2))
    >>> compiled, guards = Precompile.aot_autograd(gm, guards, compiler=lambda graph, example_inputs: graph)
    >>> torch.equal(compiled(inputs), model(*inputs))
    True
    """

    @staticmethod
    def dynamo(
        model: Callable[..., Any], *example_inputs: Any, dynamic: Any = None, **example_kwargs: Any
    ) -> tuple[GraphModule, CodeType, Guards, tuple[Any, ...]]:
        """Trace a model into one FX graph, without running it.

        Args:
            model: a module or a function.
            example_inputs: its positional inputs; the graph is for their shapes, strides, dtypes and devices.
            dynamic: the dimensions that differ from call to call, as for `torchspan.precompile`; a model that has an input of
                this name gets it, and its dimensions are marked by ``torch._dynamo.mark_dynamic``.
            example_kwargs: its keyword inputs.

        Returns:
            The graph, whose placeholders are the parameters, buffers and inputs that it uses; the bytecode (``types.CodeType``)
            that dynamo wrote to fetch those, call the graph and make the result; the guards (iterable, ``holds``, ``check``);
            and the example inputs, as a tuple.

        Raises:
            CaptureError: the model is not one graph; names the file and line that stands in the way, and what to do.

        >>> gm, bytecode, guards, inputs = Precompile.dynamo(torch.nn.Linear(2, 3), torch.ones(1, 2))
        >>> [node.op for node in gm.graph.nodes]
        ['placeholder', 'placeholder', 'placeholder', 'call_function', 'output']
        """
        if dynamic is not None and takes_keyword(model, "dynamic"):
            dynamic, example_kwargs = None, {**example_kwargs, "dynamic": dynamic}
        program = Program(model, example_inputs, example_kwargs)
        with marked(marks_of(program, dynamic)):
            return capture_dynamo(program)

    @staticmethod
    def aot_autograd(gm: GraphModule, guards: Guards, compiler: Compiler | None = None) -> tuple[Callable[..., Any], Guards]:
        """Compile a graph that `dynamo` captured: forward and backward, each by `compiler`.

        Args:
            gm: the graph; it may have been transformed, if it takes and gives the same.
            guards: what `dynamo` returned beside it.
            compiler: ``(graph, example_inputs) -> callable`` over operator graphs, called for the forward and for the backward;
                None is inductor. ``torch.fx.passes.regional_inductor.regional_inductor`` compiles annotated regions only.

        Returns:
            A function of the tuple of inputs, as the model takes them, through which gradients flow to the model's parameters;
            and the guards, which it checks at every call.

        Raises:
            CompileError: the compiler failed; its own error is the cause.
            GuardError: raised by calls that the graph was not captured for; names the condition.

        >>> gm, _, guards, inputs = Precompile.dynamo(torch.nn.Linear(2, 3), torch.ones(1, 2))
        >>> compiled, _ = Precompile.aot_autograd(gm, guards, compiler=lambda graph, example_inputs: graph)
        >>> compiled((torch.ones(5, 2),))  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        torchspan.core.errors.GuardError: the graph of Linear is not for this call: tensor ... expected 1, actual 5; ...
        """
        if not isinstance(guards, Guards):
            raise InputError(f"guards are what Precompile.dynamo returned, not a {type(guards).__name__}")
        frame = guards.frame
        with torch.set_grad_enabled(frame.grad_mode):
            graph = naming_the_compiler(lambda: compile_graph(gm, frame.inputs, frame.context, compiler), guards.program.name)
        sizes = Sizes(portable_sizes(guards))  # what compilers assumed of dynamic sizes, after the guards were made
        if sizes.names:
            guards.require(sizes.failed_for)
        return _Checked(guards, guards.bind(graph)), guards


def naming_the_compiler(compile_it: Callable[[], Any], name: str) -> Any:
    """The result of a compiler; what it raises becomes a CompileError that names the program."""
    try:
        return compile_it()
    except TorchspanError:
        raise
    except Exception as cause:
        lines = str(cause).strip().splitlines() or [""]
        raise CompileError(f"the compiler failed on {name}: {type(cause).__name__}: {lines[0]}") from cause


class _Checked:
    """A compiled graph behind its guards; called with the tuple of inputs."""

    def __init__(self, guards: Guards, run: Callable[[tuple[Any, ...], Mapping[str, Any]], Any]) -> None:
        self.guards = guards
        self._run = run

    def __call__(self, inputs: tuple[Any, ...] | list[Any], **kwargs: Any) -> Any:
        if not isinstance(inputs, (tuple, list)):
            raise InputError(
                f"a precompiled function takes the tuple of inputs, not a {type(inputs).__name__}; write (x,) for one"
            )
        args = tuple(inputs)
        self.guards.check(args, kwargs)
        return self._run(args, kwargs)
