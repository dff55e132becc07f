"""Capture by dynamo: a Program's forward as one FX graph, the bytecode that calls it, and its guards."""

from __future__ import annotations

import builtins
import inspect
import re
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType, SimpleNamespace
from typing import Any

import torch
from torch.fx import GraphModule

from torchspan.capture import _effects, _frame
from torchspan.core.errors import CaptureError, GuardError
from torchspan.core.program import Program
from torchspan.private import dynamo

_TORCH_ROOT = str(Path(torch.__file__).parent)
_PYTHON_ROOTS = tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib")})
_OWN_ROOT = str(Path(__file__).parents[1])


@dataclass(frozen=True)
class Guard:
    """One condition: of what (`source`, an expression over ``L`` and ``G``), of which dynamo `kind`, and what was `value` then.

    `arguments` are what the kind needs besides (such as the name of an attribute); `code` is the condition as dynamo writes it.
    """

    source: str
    kind: str
    value: Any = field(repr=False, compare=False, default=None)
    code: tuple[str, ...] = ()
    arguments: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """What dynamo made of one call, in one grad mode.

    `module` takes `inputs`, which stand at `sources`; `bytecode` runs in `scope`, where it calls the graph by `graph_name`;
    `manager` is dynamo's guard manager. `changes` are the Python objects that the call changes, `traced` the inlined code;
    `restored` are attributes that it sets and puts back, with the constants that they have before and after; `returned` is
    where those parts of its result are found that it did not make.
    """

    module: GraphModule
    bytecode: CodeType
    manager: Any
    guards: tuple[Guard, ...]
    inputs: tuple[Any, ...]
    sources: tuple[str, ...]
    scope: dict[str, Any]
    graph_name: str
    context: Any
    changes: tuple[str, ...]
    traced: tuple[CodeType, ...]
    grad_mode: bool
    restored: tuple[tuple[str, Any], ...] = ()
    returned: tuple[str, ...] = ()


class Guards:
    """The conditions under which a captured graph may be used: dynamo's, real, and checked at every call.

    Iterating gives each as a `Guard`; `check` raises; `managers` are dynamo's guard managers, by grad mode. A program that does
    the same with gradients on and off has one of each, and may be called either way; any other is held to the mode of its
    capture.

    >>> gm, bytecode, guards, inputs = capture_dynamo(Program(torch.nn.Linear(2, 3), (torch.ones(1, 2),)))
    >>> guards.holds((torch.zeros(1, 2),)), guards.holds((torch.zeros(5, 2),))
    (True, False)
    """

    def __init__(self, program: Program, frame: Frame, other: Frame | None) -> None:
        self.program = program
        self.frame = frame
        self.frames = (frame,) if other is None else (frame, other)
        self._required: list[Callable[[Mapping[str, Any]], str | None]] = []

    @property
    def managers(self) -> dict[bool, Any]:
        """dynamo's guard manager for each grad mode in which the graph may be called."""
        return {frame.grad_mode: frame.manager for frame in self.frames}

    def __iter__(self) -> Iterator[Guard]:
        return iter(self.frame.guards)

    def __len__(self) -> int:
        return len(self.frame.guards)

    def __repr__(self) -> str:
        return f"Guards({len(self)} on {self.program.name}, grad modes {sorted(self.managers)})"

    def holds(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> bool:
        """Whether the graph may be used for these inputs, now."""
        return self.failure(args, kwargs) is None

    def failure(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> str | None:
        """The first condition that does not hold, or None."""
        manager = self.managers.get(torch.is_grad_enabled())
        if manager is None:
            return f"grad mode is {torch.is_grad_enabled()}, the program was captured with {self.frame.grad_mode}"
        values = {"target": self.program.target, "args": args, "kwargs": dict(kwargs or {})}
        if manager.check(values):
            return next(filter(None, (failed(values) for failed in self._required)), None)
        parts = manager.check_verbose(values).verbose_code_parts
        reason = re.sub(r"\s+", " ", str(parts[0])) if parts else "dynamo's guard manager refuses it"
        return (
            re.sub(r" # .*/capture/dynamo\.py:\d+ in _call$", "", reason)
            .removesuffix("# return target(*args, **kwargs)")
            .strip()
        )

    def require(self, failed: Callable[[Mapping[str, Any]], str | None]) -> None:
        """Add a condition: a function of ``target``, ``args`` and ``kwargs`` that says what does not hold, or None."""
        self._required.append(failed)

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> None:
        """Raise GuardError, which names the condition, unless the graph may be used for these inputs, now."""
        failed = self.failure(args, kwargs)
        if failed is not None:
            raise GuardError(
                f"the graph of {self.program.name} is not for this call: {failed}; capture it again for such inputs"
            )

    def bind(self, graph: Callable[..., Any]) -> Callable[[tuple[Any, ...], Mapping[str, Any]], Any]:
        """A function of (args, kwargs) that runs the captured bytecode with `graph` in the place of the captured graph."""
        frame = self.frame
        run = FunctionType(frame.bytecode, {**frame.scope, frame.graph_name: graph})
        target = self.program.target
        return lambda args, kwargs: run(target, args, kwargs)


def capture_dynamo(program: Program) -> tuple[GraphModule, CodeType, Guards, tuple[Any, ...]]:
    """Capture the forward of `program` as one graph, without running it.

    Args:
        program: a module or function with example inputs; shapes are static unless marked by ``torch._dynamo.mark_dynamic``.

    Returns:
        The graph (its inputs are the parameters, buffers and tensors that it uses), the bytecode that calls it, its Guards, and
        the example inputs.

    Raises:
        CaptureError: the program is not one graph (a graph break, control flow that depends on data); names the file and line.
    """
    _refuse_arrays(program)
    frame = _trace(program, torch.is_grad_enabled())
    try:
        other = _trace(program, not torch.is_grad_enabled())
    except CaptureError:
        other = None  # it can be captured in this mode only; its Guards say so at a call in the other
    if other is not None and not same_graph(frame, other):
        other = None
    return frame.module, frame.bytecode, Guards(program, frame, other), program.args


def same_graph(first: Frame, second: Frame) -> bool:
    """Whether two captures compute the same from the same sources: node by node, with the constants that they hold."""
    if (
        first.sources != second.sources
        or first.changes != second.changes
        or _consts(first.bytecode) != _consts(second.bytecode)
    ):
        return False
    return _written(first.module) == _written(second.module)


def _consts(code: CodeType) -> tuple[Any, ...]:
    return code.co_code, repr(code.co_consts)


def _written(module: GraphModule) -> list[Any]:
    nodes: list[Any] = [
        (node.op, node.name, str(node.target), repr(node.args), repr(node.kwargs)) for node in module.graph.nodes
    ]
    for name, child in sorted(module.named_modules()):
        if name and isinstance(child, GraphModule):
            nodes.append((name, _written(child)))
        elif name and next(child.parameters(), next(child.buffers(), None)) is None and type(child) is not torch.nn.Module:
            nodes.append((name, repr(child)))
    nodes += [(name, id(tensor)) for name, tensor in (*module.named_parameters(), *module.named_buffers())]
    return nodes


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    return target(*args, **kwargs)


def _trace(program: Program, grad_mode: bool) -> Frame:
    """One dynamo capture of ``target(*args, **kwargs)``, so that hooks on the target are seen, in one grad mode."""
    seen: dict[str, Any] = {}

    def backend(module: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        sources = [node.meta["grapharg"].source for node in module.graph.nodes if node.op == "placeholder"]
        context, traced, changes, restored, returned = _effects.tracing_state()
        seen.update(module=module, inputs=tuple(inputs), sources=tuple(map(dynamo.source_name, sources)))
        seen.update(context=context, traced=traced, changes=changes, restored=restored, returned=returned)
        return module.forward

    def keep_guards(entries: Any) -> list[bool]:
        seen["guards"] = tuple(map(_guard, entries))
        return [True] * len(entries)

    noted: dict[Any, Guard] = {}

    def note(source: str, kind: str, value: Any, arguments: Mapping[str, Any]) -> None:
        noted[source, kind, str(arguments)] = Guard(source, kind, value, (), arguments)

    scope = {"__builtins__": builtins, "__name__": __name__}
    code = _call.__code__.replace()  # a code object of its own: dynamo keeps state by code
    values = {"target": program.target, "args": program.args, "kwargs": dict(program.kwargs)}
    frame = SimpleNamespace(
        f_code=code,
        f_globals=scope,
        f_locals=values,
        f_builtins=vars(builtins),
        closure=(),
        f_lasti=0,
        f_lineno=code.co_firstlineno,
    )
    with torch.set_grad_enabled(grad_mode):
        try:
            guarded = _frame.trace_frame(frame, backend, keep_guards, note)
        except dynamo.errors() as cause:
            raise _capture_error(program, cause) from cause
    if guarded is None or "module" not in seen:
        raise CaptureError(f"{program.name} does no work on tensors that could be captured; call it as it is")
    seen["guards"] += tuple(noted.values())
    graph_name = next(name for name in scope if name.startswith("__compiled_fn"))
    return Frame(
        bytecode=guarded.code, manager=guarded.guard_manager, scope=scope, graph_name=graph_name, grad_mode=grad_mode, **seen
    )


def _guard(entry: Any) -> Guard:
    guard = entry.orig_guard
    arguments = dict(getattr(guard.create_fn, "keywords", None) or {})
    arguments |= {str(index): value for index, value in enumerate(getattr(guard.create_fn, "args", None) or ())}
    if "source_b" in arguments:
        arguments["source_b"] = dynamo.source_name(arguments["source_b"])
    source = dynamo.source_name(guard.originating_source)
    return Guard(source, entry.guard_type, entry.value if entry.has_value else None, tuple(guard.code_list or ()), arguments)


# what a person is told


def _capture_error(program: Program, cause: Exception) -> CaptureError:
    """A CaptureError with the user's file and line, what stood in the way, and what to do."""
    fixed = re.search(r"You marked (\S+) as dynamic but your code specialized it to be a constant \((\d+)\)", str(cause))
    if fixed:
        return CaptureError(
            f"{program.name} cannot be captured for any {spoken(fixed[1])}: it works for {fixed[2]} only; leave that dimension "
            "unmarked, or mark those that must be equal to it, too"
        )
    reason = _said_by_eager(program, cause)
    if reason:
        return CaptureError(f"{program.name} does not take these inputs{_at(cause)}: {reason}")
    lines = [line.strip() for line in str(getattr(cause, "msg", None) or cause).strip().splitlines()]
    what = lines[0] if lines else type(cause).__name__
    hints = [line for line in lines[1:] if line.startswith(("Explanation:", "Hint:"))]
    hints = [re.sub(r"^(Explanation|Hint):\s*", "", line) for line in hints][:2]
    advice = (
        " ".join(hints)
        or "Move what Python decides on a tensor's value out of the captured part, or use torch.where or torch.cond."
    )
    return CaptureError(f"{program.name} cannot be captured as one graph{_at(cause)}: {what}. {advice}")


def _said_by_eager(program: Program, cause: Exception) -> str | None:
    """What the program would say itself, were it called: its arguments do not bind, or an operator refuses them."""
    function = getattr(program.target, "forward", program.target)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins
        return None
    try:
        signature.bind(*program.args, **program.kwargs)
    except TypeError as unbound:
        return f"{unbound}; it takes {signature}"
    refused = re.search(r"fake tensor.*: got (\w+)\((['\"])(.*?)\2\)", str(cause), re.DOTALL)
    return f"{refused[1]}: {refused[3]}" if refused else None


def _refuse_arrays(program: Program) -> None:
    """Raise for an array of numpy, which dynamo would take for a condition on a tensor."""
    from torch.utils._pytree import tree_flatten_with_path

    for name, values in (("args", program.args), ("kwargs", dict(program.kwargs))):
        for path, leaf in tree_flatten_with_path(values)[0]:
            if type(leaf).__module__ == "numpy":
                place = name + "".join(map(str, path))
                raise CaptureError(f"{place} is a numpy {type(leaf).__name__}; give a tensor, such as torch.from_numpy makes")


def spoken(source: str) -> str:
    """dynamo's expression for a part of an input as a person writes it.

    >>> spoken("L['args'][0].size()[1]")
    'args[0].size(1)'
    """
    return re.sub(r"\.(size|stride)\(\)\[(\d+)\]", r".\1(\2)", re.sub(r"L\['(\w+)'\]", r"\1", source))


def _at(cause: BaseException) -> str:
    site = _site(cause)
    return f" at {site}" if site else ""


def _site(cause: BaseException) -> str | None:
    """``file:line`` of the innermost line of the user's program: not of torch, and not of Python's own library."""
    for entry in reversed(list(getattr(cause, "real_stack", None) or ())):
        is_python = entry.filename.startswith(_PYTHON_ROOTS) and "site-packages" not in entry.filename
        if not is_python and not entry.filename.startswith((_TORCH_ROOT, _OWN_ROOT)):
            return f"{entry.filename}:{entry.lineno}"
    return None
