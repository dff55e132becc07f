"""What a place in a file is, and what stands around it: the questions that porting asks. Nothing is changed here."""

from __future__ import annotations

import ast
import re

from torchspan.report._bindings import Bindings
from torchspan.report._rules import CALLS, ONLY_CUDA, SAME, TAKES_KIND, WORDS, Rule
from torchspan.report._source import Source

CUDA = re.compile(r"cuda(?::(\d+))?")
TAKES_TEXT = frozenset(
    ("print", "debug", "info", "warning", "error", "startswith", "endswith", "split", "replace", "join", "getattr", "hasattr")
)
"""Functions to which text is just text."""
STREAMS = ("torch.cuda.Stream", "torch.cuda.current_stream", "torch.cuda.ExternalStream")
_ENDS = ("exit", "quit", "_exit", "error")


def is_cuda(node: ast.AST) -> bool:
    """Whether it is the text ``cuda``, with or without an index."""
    return CUDA.fullmatch(text_of(node) or "") is not None


def text_of(node: ast.AST | None) -> str | None:
    """The text that a constant is; None for all else."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def index_of(node: ast.Constant) -> int:
    """The index in ``cuda:1``; 0 where there is none."""
    match = CUDA.fullmatch(str(node.value))
    return int(match[1] or 0) if match else 0


def _is_end(node: ast.stmt) -> bool:
    """Whether a statement ends the program."""
    if isinstance(node, ast.Raise):
        return True
    call = node.value if isinstance(node, ast.Expr) else None
    function = call.func if isinstance(call, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", "")) in _ENDS


class Places:
    """Answers questions about the expressions of one file."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.bindings = Bindings(source)

    def parent(self, node: ast.AST) -> ast.AST | None:
        """What `node` is a part of."""
        return self.bindings.parents.get(node)

    def dotted(self, node: ast.AST) -> str:
        """What an expression names of what was imported; "" where that is nothing."""
        name = self.source.dotted(node) or ""
        return SAME.get(name, name)

    def rule(self, name: str) -> Rule:
        """How the call of torch.cuda that `name` names is made portable."""
        short = name.removeprefix("torch.cuda.")
        return CALLS.get(short) or CALLS.get(short.partition(".")[0]) or Rule("none", note=ONLY_CUDA)

    def is_choice(self, node: ast.AST) -> bool:
        """Whether it is exactly this choice: the accelerator where there is one, else the CPU."""
        if not (isinstance(node, ast.IfExp) and isinstance(node.test, ast.Call) and is_cuda(node.body)):
            return False
        is_other = isinstance(node.orelse, ast.Constant) and isinstance(node.orelse.value, str)
        return (is_other or self._is_choice_of_another(node.orelse)) and self.dotted(
            node.test.func
        ) == "torch.cuda.is_available"

    def _is_choice_of_another(self, node: ast.AST) -> bool:
        """``"mps" if torch.backends.mps.is_available() else "cpu"``."""
        if not isinstance(node, ast.IfExp):
            return text_of(node) == "cpu"
        is_asked = isinstance(node.test, ast.Call) and self.dotted(node.test.func).endswith((".is_available", ".is_built"))
        return is_asked and text_of(node.body) in ("mps", "xpu") and self._is_choice_of_another(node.orelse)

    def is_backend_choice(self, node: ast.IfExp) -> bool:
        """``"nccl" if … else "gloo"``, by what is here."""
        is_asked = isinstance(node.test, ast.Call) and self.dotted(node.test.func).endswith(
            ("cuda.is_available", "is_nccl_available")
        )
        return is_asked and (text_of(node.body), text_of(node.orelse)) == ("nccl", "gloo")

    def asked_whether_cuda(self, node: ast.IfExp) -> str:
        """The kind of the device X, of ``"cuda" if X.startswith("cuda") else "cpu"`` and all that means the same."""
        test, body, orelse = node.test, text_of(node.body), text_of(node.orelse)
        is_inverted = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test = test.operand
        kinds = ("cpu", "cuda") if is_inverted else ("cuda", "cpu")
        device, kind = self.asked_of(test)
        return device if (body, orelse) == (kinds if kind == "cuda" else kinds[::-1]) else ""

    def asked_of(self, test: ast.expr) -> tuple[str, str]:
        """The kind of the device that a condition asks about, as code, and the kind that it asks for; "" where it does not."""
        if isinstance(test, ast.Attribute) and test.attr in ("is_cuda", "is_cpu"):
            return f"{self.source.code(test.value)}.device.type", test.attr.removeprefix("is_")
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and test.func.attr == "startswith" and test.args:
            return self.asked(test.func.value, text_of(test.args[0]))
        if not isinstance(test, ast.Compare) or len(test.ops) != 1:
            return "", ""
        left, right, op = test.left, test.comparators[0], test.ops[0]
        is_reversed = isinstance(op, (ast.In, ast.NotIn)) or text_of(left) is not None
        device, kind = self.asked(right, text_of(left)) if is_reversed else self.asked(left, text_of(right))
        if isinstance(op, (ast.NotEq, ast.NotIn)):
            return device, {"cuda": "cpu", "cpu": "cuda", "": ""}[kind]
        return (device, kind) if isinstance(op, (ast.Eq, ast.In)) else ("", "")

    def asked(self, device: ast.expr, kind: str | None) -> tuple[str, str]:
        """The code of the kind of `device`, which is compared with `kind`, if that is the CPU or CUDA."""
        kind = (kind or "").rstrip(":")
        if kind not in ("cuda", "cpu"):
            return "", ""
        if isinstance(device, ast.Subscript):  # text.split(":")[0], text[:4]
            device = device.value
            if isinstance(device, ast.Call) and isinstance(device.func, ast.Attribute) and device.func.attr == "split":
                device = device.func.value
        text = self.source.code(device)
        return text if isinstance(device, ast.Attribute) and device.attr == "type" else f"torch.device({text}).type", kind

    def standing(self, node: ast.expr) -> ast.expr:
        """The whole expression of which `node` is one of several values: ``x or "cuda"``, ``"cuda" if x else y``."""
        parent = self.parent(node)
        while isinstance(parent, ast.BoolOp) or (isinstance(parent, ast.IfExp) and node is not parent.test):
            node, parent = parent, self.parent(parent)
        return node

    def guards_cuda(self, node: ast.AST) -> bool:
        """Whether what runs only where `node` is true calls what CUDA alone has."""
        guarded: ast.AST | None = None
        while node in self.bindings.parents and not isinstance(node, ast.stmt):
            node = self.bindings.parents[node]
            guarded = node if isinstance(node, (ast.If, ast.IfExp, ast.BoolOp)) else guarded
        calls = (inner for inner in ast.walk(guarded) if isinstance(inner, ast.Call)) if guarded is not None else ()
        names = (self.dotted(call.func) for call in calls)
        return any(name.startswith("torch.cuda.") and self.rule(name).shape == "none" for name in names)

    def is_guarded(self, node: ast.AST) -> bool:
        """Whether `node` runs only where there is CUDA, or where its failure is caught."""
        for around, part in self.bindings.ancestors(node):
            is_caught = isinstance(around, ast.Try) and part in around.body and bool(around.handlers)
            is_inside = isinstance(around, ast.If) and part in around.body
            is_inside = is_inside or (isinstance(around, ast.IfExp) and part is around.body)
            is_later = isinstance(around, ast.BoolOp) and isinstance(around.op, ast.And) and part is not around.values[0]
            test = around.test if isinstance(around, (ast.If, ast.IfExp)) else around.values[0] if is_later else None  # type: ignore[attr-defined]
            if is_caught or (test is not None and (is_inside or is_later) and self.asks_for_cuda(test)):
                return True
        return False

    def asks_for_cuda(self, test: ast.expr) -> bool:
        """Whether a condition holds on a machine with CUDA alone."""
        if isinstance(test, ast.BoolOp):
            return isinstance(test.op, ast.And) and any(map(self.asks_for_cuda, test.values))
        if isinstance(test, ast.Call):
            is_found = self.dotted(test.func) == "shutil.which"
            return is_found or self.dotted(test.func) in ("torch.cuda.is_available", "torch.cuda.is_initialized")
        if isinstance(test, ast.Attribute):
            return test.attr == "is_cuda" or self.dotted(test) == "torch.version.cuda"
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot):
            return self.dotted(test.left) == "torch.version.cuda"
        return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq) and self.asked_of(test)[1] == "cuda"

    def refuses(self, node: ast.AST) -> bool:
        """Whether the program ends where a condition that `node` is in does not hold, or does."""
        for around, part in self.bindings.ancestors(node):
            if isinstance(around, ast.Assert):
                return part is around.test
            if isinstance(around, ast.If):
                return part is around.test and any(_is_end(inner) for inner in [*around.body, *around.orelse])
        return False

    def takes_kind(self, node: ast.expr) -> bool:
        """Whether text stands where a kind of device is expected: ``device_type=``, or the first of torch.device's two."""
        node = self.standing(node)
        parent = self.parent(node)
        call = self.parent(parent) if isinstance(parent, ast.keyword) else parent
        if not isinstance(call, ast.Call):
            return False
        if isinstance(parent, ast.keyword) and parent.arg in ("device_type", "type"):
            return True
        name = self.dotted(call.func)
        return name in TAKES_KIND or (name == "torch.device" and len(call.args) + len(call.keywords) > 1)

    def is_device(self, node: ast.expr) -> bool:
        """Whether the number of a device stands where a device is expected, which a CPU's number is not."""
        node = self.standing(node)
        parent = self.parent(node)
        if isinstance(parent, ast.keyword):
            return parent.arg in ("device", "map_location")
        if isinstance(parent, (ast.Assign, ast.AnnAssign)):
            return self.assigns_device(node)
        is_first = isinstance(parent, ast.Call) and parent.args[:1] == [node]
        return is_first and isinstance(parent, ast.Call) and getattr(parent.func, "attr", "") in ("to", "cuda")

    def is_backend(self, node: ast.expr) -> bool:
        """Whether text names a backend of torch.distributed."""
        node = self.standing(node)
        parent = self.parent(node)
        if isinstance(parent, ast.keyword):
            return parent.arg == "backend"
        if isinstance(parent, ast.Call):
            return parent.args[:1] == [node] and self.dotted(parent.func).endswith("init_process_group")
        return isinstance(parent, ast.Assign) and parent.value is node

    def is_stream(self, node: ast.expr) -> bool:
        """Whether an expression is a stream of torch.cuda, by what its name is given."""
        values = [binding.value for binding in self.bindings.of_expression(node)]
        calls = [value for value in [node, *values] if isinstance(value, ast.Call)]
        return any(self.dotted(call.func) in STREAMS for call in calls)

    def is_of_storage(self, node: ast.AST) -> bool:
        """Whether it is in a function that moves storages, whose ``.to`` takes its device by name."""
        return any(
            isinstance(around, ast.keyword) and around.arg == "map_location" for around, _ in self.bindings.ancestors(node)
        )

    def is_for_nvidia(self, node: ast.Call, name: str) -> bool:
        """Whether an extension is built by NVIDIA's compiler."""
        texts = (str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))
        is_asked = any(keyword.arg in ("cuda_sources", "with_cuda") for keyword in node.keywords)
        return is_asked or name.endswith("CUDAExtension") or any(text.endswith((".cu", ".cuh")) for text in texts)

    def is_among_choices(self, node: ast.AST) -> bool:
        """Whether a list is what an argument of a command line may be."""
        parent = self.parent(node)
        return isinstance(parent, ast.keyword) and parent.arg == "choices"

    def only_looks(self, node: ast.AST) -> bool:
        """Whether a program is named without being run."""
        parent = self.parent(node)
        return not isinstance(parent, (ast.Call, ast.List, ast.Tuple, ast.Assign)) or (
            isinstance(parent, ast.Call) and self.source.code(parent.func).split(".")[-1] in TAKES_TEXT | {"which"}
        )

    def is_called(self, node: ast.expr) -> bool:
        """Whether it is what a call calls."""
        parent = self.parent(node)
        return isinstance(parent, ast.Call) and parent.func is node

    def is_alone(self, node: ast.expr) -> bool:
        """Whether nothing else is on the lines of `node`."""
        first, last = self.source.lines[node.lineno - 1], self.source.lines[(node.end_lineno or node.lineno) - 1]
        before = first.encode("utf-8", "surrogatepass")[: node.col_offset]
        after = last.encode("utf-8", "surrogatepass")[node.end_col_offset or 0 :].strip()
        return not before.strip() and (not after or after.startswith(b"#"))

    def assigns_device(self, node: ast.AST) -> bool:
        """Whether the statement around `node` is what gives `device` its value."""
        statement = self.bindings.statement(node)
        targets = [*getattr(statement, "targets", ()), getattr(statement, "target", None)]
        names = [inner for target in targets if isinstance(target, ast.AST) for inner in ast.walk(target)]
        return any(isinstance(name, ast.Name) and name.id == WORDS[0] for name in names)
