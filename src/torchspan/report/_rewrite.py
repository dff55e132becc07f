"""What a file asks of CUDA, place by place: what to write there instead, and what can only be said."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, field

from torchspan.report._bindings import Bindings
from torchspan.report._rules import (
    ASKS,
    ASSERTS,
    BACKEND,
    CALLS,
    COMPILER,
    DRIVER,
    FORK,
    HANDED_ON,
    HERE,
    HERE_DEVICE,
    IMPORT,
    IN_A_LIST,
    IS_HERE,
    KIND,
    LEGACY,
    MODULE,
    ONLY_CUDA,
    PINNED,
    REFUSES,
    SAME,
    STAYS,
    STREAM_METHODS,
    TAKES_KIND,
    VERSION,
    WORDS,
    Rule,
)
from torchspan.report._source import Edit, Source

_CUDA = re.compile(r"cuda(?::(\d+))?")
_CUDA_BEGINS = re.compile(r"cuda:(?:%[dis]|\{\w*\})?")
_TAKES_TEXT = frozenset(
    ("print", "debug", "info", "warning", "error", "startswith", "endswith", "split", "replace", "join", "getattr", "hasattr")
)
"""Functions to which text is just text."""
_STREAMS = ("torch.cuda.Stream", "torch.cuda.current_stream", "torch.cuda.ExternalStream")
_CURRENT = "torch.cuda.current_device"
_ENDS = ("exit", "quit", "_exit", "error")
_FOREIGN = ("triton", "pynvml", "cupy", "pycuda")
"""Packages that are of use with NVIDIA's driver alone."""


@dataclass(frozen=True)
class Note:
    """What is to be known of a place; `is_work` where it has to be done by hand."""

    text: str
    is_work: bool = False


@dataclass
class Found:
    """What was found in one file. `words` are the names that its portable lines need at its top."""

    edits: list[Edit] = field(default_factory=list)
    notes: dict[int, list[Note]] = field(default_factory=dict)
    lines: set[int] = field(default_factory=set)
    words: set[str] = field(default_factory=set)


class Rewriter:
    """Goes through one file and keeps what it found in `found`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.found = Found()
        self.bindings = Bindings(source)
        self._parents = self.bindings.parents
        waiting: list[ast.AST] = [source.tree] if source.tree is not None else []
        while waiting:
            node = waiting.pop()
            if not self._port_node(node):
                waiting += reversed(list(ast.iter_child_nodes(node)))

    def word(self, node: ast.AST) -> str:
        """What the device is called where `node` is; the top of the file has to say so where nothing there does."""
        usable = {word: self.bindings.is_usable(word, node) for word in WORDS}
        word = next((word for word, is_usable in usable.items() if is_usable is not False), WORDS[0])
        if usable[word] is None:
            self.found.words.add(word)
        return word

    def dotted(self, node: ast.AST) -> str:
        """What an expression names of what was imported; "" where that is nothing."""
        name = self.source.dotted(node) or ""
        return SAME.get(name, name)

    def _port_node(self, node: ast.AST) -> bool:
        """Port a node as a whole; False where its parts are to be looked at."""
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            self._port_import(node)
            return True
        if isinstance(node, ast.Compare):
            return self._port_comparison(node)
        if isinstance(node, ast.IfExp):
            return self._port_choice(node)
        if isinstance(node, ast.Call):
            return self._port_call(node)
        if isinstance(node, ast.Attribute):
            return self._port_attribute(node)
        if isinstance(node, ast.JoinedStr):
            self._port_f_string(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self._port_text(node, node.value)
        if isinstance(node, ast.List) and any(self.dotted(part).endswith("ProfilerActivity.CUDA") for part in node.elts):
            self._edit(node, "torch.profiler.supported_activities()")
            return True
        return False

    # statements and conditions

    def _port_import(self, node: ast.Import | ast.ImportFrom) -> None:
        names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names if isinstance(node, ast.Import))]
        if names[0].startswith("torch.cuda"):
            self._note(node, "Not needed once the lines that use it are portable")
            self.found.lines.add(node.lineno)
        elif package := next((name for name in names if name.partition(".")[0] in _FOREIGN), ""):
            self._note(node, IMPORT.format(package=package.partition(".")[0]), is_work=not self._is_guarded(node))

    def _port_comparison(self, node: ast.Compare) -> bool:
        parts = [node.left, *node.comparators]
        parts += [part for each in parts if isinstance(each, (ast.Tuple, ast.List, ast.Set)) for part in each.elts]
        if any(isinstance(part, ast.Constant) and isinstance(part.value, str) and _CUDA.match(part.value) for part in parts):
            self._note(node, ASKS, is_work=self._refuses(node))
            self.found.lines.add(node.lineno)
            return True
        return False

    def _port_choice(self, node: ast.IfExp) -> bool:
        """``"cuda" if … else "cpu"``, in either order, and the same of backends."""
        if self._is_choice(node):
            is_kind = self._takes_kind(node)
            self._edit(node, self._free(node, self._here(node, KIND) if is_kind else HERE))
            return True
        if self._is_backend_choice(node):
            self._edit(node, self._here(node, BACKEND))
            return True
        asked = self._asked_whether_cuda(node)
        if asked:
            self._edit(node, asked)
        return bool(asked)

    def _is_choice(self, node: ast.AST) -> bool:
        """Whether it is the accelerator where there is one, and the CPU elsewhere: no more and no less."""
        if not (isinstance(node, ast.IfExp) and isinstance(node.test, ast.Call) and _is_cuda(node.body)):
            return False
        is_other = isinstance(node.orelse, ast.Constant) and isinstance(node.orelse.value, str)
        return (is_other or self._is_choice_of_another(node.orelse)) and self.dotted(
            node.test.func
        ) == "torch.cuda.is_available"

    def _is_choice_of_another(self, node: ast.AST) -> bool:
        """``"mps" if torch.backends.mps.is_available() else "cpu"``."""
        if not isinstance(node, ast.IfExp):
            return _text_of(node) == "cpu"
        is_asked = isinstance(node.test, ast.Call) and self.dotted(node.test.func).endswith((".is_available", ".is_built"))
        return is_asked and _text_of(node.body) in ("mps", "xpu") and self._is_choice_of_another(node.orelse)

    def _is_backend_choice(self, node: ast.IfExp) -> bool:
        is_asked = isinstance(node.test, ast.Call) and self.dotted(node.test.func).endswith(
            ("cuda.is_available", "is_nccl_available")
        )
        return is_asked and (_text_of(node.body), _text_of(node.orelse)) == ("nccl", "gloo")

    def _asked_whether_cuda(self, node: ast.IfExp) -> str:
        """The kind of the device X, of ``"cuda" if X.startswith("cuda") else "cpu"`` and all that means the same."""
        test, body, orelse = node.test, _text_of(node.body), _text_of(node.orelse)
        is_inverted = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        while isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            test = test.operand
        wanted = ("cpu", "cuda") if is_inverted else ("cuda", "cpu")
        asked, kind = self._asked_of(test)
        return asked if (body, orelse) == (wanted if kind == "cuda" else wanted[::-1]) else ""

    def _asked_of(self, test: ast.expr) -> tuple[str, str]:
        """The kind of the device that a condition asks about, as code, and the kind that it asks for; "" where it does not."""
        if isinstance(test, ast.Attribute) and test.attr in ("is_cuda", "is_cpu"):
            return f"{self.source.code(test.value)}.device.type", test.attr.removeprefix("is_")
        if isinstance(test, ast.Call) and isinstance(test.func, ast.Attribute) and test.func.attr == "startswith" and test.args:
            return self._asked(test.func.value, _text_of(test.args[0]))
        if not isinstance(test, ast.Compare) or len(test.ops) != 1:
            return "", ""
        left, right, op = test.left, test.comparators[0], test.ops[0]
        is_reversed = isinstance(op, (ast.In, ast.NotIn)) or _text_of(left) is not None
        asked, kind = self._asked(right, _text_of(left)) if is_reversed else self._asked(left, _text_of(right))
        if isinstance(op, (ast.NotEq, ast.NotIn)):
            return asked, {"cuda": "cpu", "cpu": "cuda", "": ""}[kind]
        return (asked, kind) if isinstance(op, (ast.Eq, ast.In)) else ("", "")

    def _asked(self, device: ast.expr, kind: str | None) -> tuple[str, str]:
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

    # calls

    def _port_call(self, node: ast.Call) -> bool:
        name = self.dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) and not name.startswith("torch.") else ""
        if name.startswith("torch.cuda."):
            self._port_cuda_call(node, name)
        elif name == "torch.device":
            return self._port_device(node)
        elif name == "torch.random.fork_rng":
            return self._port_fork(node)
        elif name == "torch.set_default_tensor_type":
            self._note(node, "torch.set_default_device(device), and torch.set_default_dtype(…) for the type", is_work=True)
        elif name.startswith("torch.utils.cpp_extension.") and self._is_for_nvidia(node, name):
            self._note(node, COMPILER, is_work=not self._is_guarded(node))
        elif name == "torch.backends.cudnn.version":
            self._port_version(node)
            return True
        elif method == "cuda" and isinstance(node.func, ast.Attribute):
            self._port_movement(node, node.func)
        elif method == "pin_memory" and isinstance(node.func, ast.Attribute) and not node.args:
            return self._port_pinning(node, node.func)
        elif method == "record_stream":
            self._guard(node)
        elif method and isinstance(node.func, ast.Attribute) and self._is_stream(node.func.value):
            self._port_stream_method(node, method)
        elif method == "to" and node.args:
            self._port_number(node.args[0])
        self._port_keywords(node, name)
        return False

    def _port_cuda_call(self, node: ast.Call, name: str) -> None:
        rule = self._rule(name)
        self.found.lines.add(node.lineno)
        if name.endswith("is_available") and self._guards_cuda(node):
            self._note(node, "Stays as it is: what it guards is CUDA's alone")
            return
        if name.endswith("is_available") and self._refuses(node):
            is_assertion = isinstance(self._parents.get(node), ast.Assert)
            self._note(node, ASSERTS if is_assertion else REFUSES, is_work=True)
        if rule.note:
            self._note(node, rule.note, is_work=rule.shape == "none" and not self._is_guarded(node))
        if name in _STREAMS and any(keyword.arg != "priority" for keyword in node.keywords):
            self._note(node, "torch.cpu.Stream takes no device: leave it out", is_work=True)
        if rule.shape == "rename":
            self._edit(node.func, self._here(node, rule.to))
        elif rule.shape == "typed":
            self._port_typed(node, rule)
        elif rule.shape == "figure":
            self._port_figure(node, rule)
        elif rule.shape == "count":
            self._port_count(node, rule)
        elif rule.shape == "guard":
            self._port_guarded(node, rule)

    def _port_figure(self, node: ast.Call, rule: Rule) -> None:
        if rule.to.endswith("current_device_index") and self._is_device(node):
            self._edit(node, HERE_DEVICE if self._assigns_device(node) else f"torch.device({self.word(node)})")
            return
        self._edit(node.func, f"({rule.to}")
        self._insert(self.source.end(node), f" if {IS_HERE} else 0)")

    def _port_count(self, node: ast.Call, rule: Rule) -> None:
        """A program divides by it and starts as many processes: the CPU is one, unless it is asked whether there is any."""
        parent = self._parents.get(node)
        numbers = [part.value for part in getattr(parent, "comparators", ()) if isinstance(part, ast.Constant)]
        is_compared = isinstance(parent, ast.Compare) and (
            0 in numbers or (1 in numbers and isinstance(parent.ops[0], (ast.GtE, ast.Lt, ast.Gt, ast.LtE)))
        )
        is_condition = isinstance(parent, (ast.BoolOp, ast.UnaryOp)) or node is getattr(parent, "test", None)
        is_guarded = any(
            isinstance(around, ast.IfExp) and part is around.body and "is_available" in self.source.code(around.test)
            for around, part in self.bindings.ancestors(node)
        )
        self._edit(node.func, rule.to)
        if not (is_compared or is_condition or is_guarded):
            self._open(node, "max(1, ")
            self._insert(self.source.end(node), ")")

    def _port_typed(self, node: ast.Call, rule: Rule) -> None:
        """``autocast(True, torch.float16)`` takes its arguments by place; its portable form takes the kind of device first."""
        self._edit(node.func, rule.to)
        is_decorated = rule.to.endswith(("_fwd", "_bwd"))
        names = ("enabled", "dtype", "cache_enabled") if rule.to == "torch.autocast" else _SCALER
        for argument, keyword in zip(node.args, ("fwd",) if is_decorated else names):
            if not is_decorated:
                self._open(argument, f"{keyword}=")
        kind = self._here(node, KIND)
        text = f"device_type={kind}" if rule.to != "torch.amp.GradScaler" else kind
        rest = ", " if node.args or node.keywords else ""
        if is_decorated and node.args:
            self._insert(self.source.end(node.args[-1]), f", {text}")
        else:
            self._insert(self._after_paren(node), text + rest)

    def _port_guarded(self, node: ast.Call, rule: Rule) -> None:
        """A statement of its own goes under an ``if``; elsewhere what the module of the device has is called."""
        is_expression = isinstance(self._parents.get(node), ast.Expr)
        if rule.to.endswith("synchronize") and not (is_expression and self._is_alone(node)):
            self._edit(node.func, f"{self._here(node, MODULE)}.synchronize")
        else:
            self._guard(node)
            self._edit(node.func, rule.to)

    def _port_device(self, node: ast.Call) -> bool:
        """``torch.device("cuda")``, ``torch.device("cuda", 1)``, ``torch.device("cuda:0" if … else "cpu")``."""
        first = node.args[0] if node.args else None
        if len(node.args) + len(node.keywords) != 1 or first is None:
            return False
        is_choice = self._is_choice(first)
        is_first = isinstance(first, ast.Constant) and ((_is_cuda(first) and _index(first) == 0) or first.value in (0,))
        keyword = self._parents.get(node)
        if is_first and isinstance(keyword, ast.keyword) and keyword.arg == "device_id":
            self._edit(node, f"torch.device({self._here(node, KIND)}, 0)")  # without an index, no group of processes takes it
            return True
        if is_first or is_choice:
            own = self._assigns_device(node) or is_choice or isinstance(keyword, (ast.Assign, ast.AnnAssign))
            self._edit(node, self._free(node, HERE_DEVICE) if own else f"torch.device({self.word(node)})")
            return True
        if self.bindings.is_number(first):
            self._open(first, f"{self._here(node, KIND)}, ")
            self.found.lines.add(node.lineno)
        return False

    def _port_fork(self, node: ast.Call) -> bool:
        """The CPU's generator is kept apart from those of `devices`, of which there are none without an accelerator."""
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        devices = keywords.get("devices", node.args[0] if node.args else None)
        kind = keywords.get("device_type")
        if devices is None and (kind is None or _text_of(kind) == "cpu"):
            return False
        self.found.lines.add(node.lineno)
        self._note(node, FORK)
        is_empty = isinstance(devices, (ast.List, ast.Tuple)) and not devices.elts
        if kind is None and not is_empty:
            self._insert(self._before_paren(node), f", device_type={self._here(node, KIND)}")
        if devices is None:
            self._insert(self._before_paren(node), f", devices=None if {IS_HERE} else []")
        elif not is_empty and _text_of(kind) != "cpu":
            self._unless_here(devices, "[]")
        return False

    def _port_movement(self, node: ast.Call, func: ast.Attribute) -> None:
        """``x.cuda()``, ``x.cuda(0)``, ``x.cuda(rank)``, ``x.cuda(non_blocking=True)``."""
        self.found.lines.add(func.end_lineno or node.lineno)
        self.found.edits.append(Edit(self.source.end(func) - len("cuda"), self.source.end(func), "to"))
        given = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "device")]
        if node.args[1:]:
            self._open(node.args[1], "non_blocking=")  # .to takes a type there
        name = "device=" if self._is_of_storage(node) else ""
        if not given:
            rest = ", " if node.keywords else ""
            self._insert(self._after_paren(node), f"{name}{self.word(node)}{rest}")
            return
        argument = given[0]
        if name and node.args:
            self._insert(self._after_paren(node), name)
        if isinstance(argument, ast.Constant) and argument.value in (0, None):
            self._edit(argument, self.word(node))
        elif isinstance(argument, ast.Constant) or self.dotted(getattr(argument, "func", argument)) == _CURRENT:
            return
        elif self.bindings.is_number(argument) or not re.search("dev", self.source.code(argument)):
            self._numbered(argument)

    def _port_number(self, argument: ast.expr) -> None:
        """A device that is named by its number alone, which only an accelerator has."""
        if not self.bindings.is_number(argument):
            return
        if isinstance(argument, ast.Constant) and argument.value == 0:
            self._edit(argument, self.word(argument))
        elif self.dotted(getattr(argument, "func", argument)) != _CURRENT:
            self._numbered(argument)
            self.found.lines.add(argument.lineno)

    def _numbered(self, argument: ast.expr) -> None:
        self._open(argument, f"torch.device({self._here(argument, KIND)}, ")
        self._insert(self.source.end(argument), ")")

    def _port_pinning(self, node: ast.Call, func: ast.Attribute) -> bool:
        self.found.lines.add(func.end_lineno or node.lineno)
        is_simple = isinstance(func.value, (ast.Name, ast.Attribute))
        self._note(node, PINNED, is_work=not is_simple)
        if is_simple:
            held = self.source.code(func.value)
            self._edit(node, f"({held}.pin_memory() if {IS_HERE} else {held})")
        return is_simple

    def _port_stream_method(self, node: ast.Call, method: str) -> None:
        """Streams of the CPU have but three methods, which give nothing."""
        is_used = not isinstance(self._parents.get(node), ast.Expr)
        if method not in STREAM_METHODS and not is_used:
            self._guard(node)
        elif method not in STREAM_METHODS or (is_used and method == "record_event"):
            self._note(node, f"A stream of the CPU has no {method}() that gives anything", is_work=True)

    def _port_keywords(self, node: ast.Call, name: str) -> None:
        is_group = name.endswith("init_process_group")
        for keyword in node.keywords:
            value = keyword.value
            is_data = name.endswith(("DistributedDataParallel", "barrier", "DataParallel"))
            if keyword.arg == "pin_memory" and isinstance(value, ast.Constant) and value.value is True:
                self._edit(value, IS_HERE)
            elif keyword.arg == "device" and name != "torch.device" and getattr(node.func, "attr", "") != "cuda":
                self._port_number(value)
            elif (
                (keyword.arg == "device_ids" and (isinstance(value, ast.List) or is_data))
                or (keyword.arg == "output_device" and is_data)
                or (keyword.arg == "device_id" and (is_group or name.endswith("FullyShardedDataParallel")))
            ):
                self._unless_here(value, "None")

    def _unless_here(self, value: ast.expr, other: str) -> None:
        """`value` where there is an accelerator, `other` where there is none."""
        if isinstance(value, ast.Constant) and value.value is None:
            return
        if isinstance(value, ast.IfExp) and "is_available" in self.source.code(value.test):
            return
        is_loose = isinstance(value, (ast.IfExp, ast.Lambda, ast.NamedExpr))
        self.found.lines.add(value.lineno)
        if is_loose:
            self._open(value, "(")
        self._insert(self.source.end(value), f"{')' if is_loose else ''} if {IS_HERE} else {other}")

    # names and text

    def _port_attribute(self, node: ast.Attribute) -> bool:
        """What is named and not called: a function handed on, a class, a setting, ``x.is_cuda``."""
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            text = f'{self.source.code(node.value)}.device.type != "cpu"'
            self._edit(node, text if isinstance(self._parents.get(node), ast.BoolOp) else self._free(node, text))
            if self._refuses(node):
                self._note(node, REFUSES, is_work=True)
            return True
        name = self.dotted(node)
        if name == "torch.version.cuda":
            self._port_version(node)
            return True
        if name.startswith(("torch.backends.cuda.", "torch.backends.cudnn.")):
            self._note(node, STAYS)
            return True
        parent = self._parents.get(node)
        if not name.startswith("torch.cuda.") or isinstance(parent, ast.Attribute) or self._is_called(node):
            return False
        rule = self._rule(name)
        self.found.lines.add(node.lineno)
        if isinstance(node.ctx, ast.Store):
            self._note(node, "Changes torch.cuda itself: nothing takes its place", is_work=True)
        elif rule.shape == "rename":
            self._edit(node, self._here(node, rule.to))
        elif rule.shape != "none":
            self._note(node, HANDED_ON, is_work=True)
        if rule.note and not isinstance(node.ctx, ast.Store):
            is_error = any(isinstance(around, ast.ExceptHandler) for around, _ in self.bindings.ancestors(node))
            self._note(node, rule.note, is_work=rule.shape == "none" and not is_error and not self._is_guarded(node))
        return True

    def _port_version(self, node: ast.expr) -> None:
        """A version that is None where torch was built without CUDA: printed it may be, read it cannot."""
        parent = self._parents.get(node)
        is_read = isinstance(parent, (ast.Attribute, ast.Subscript, ast.BinOp))
        if isinstance(parent, ast.Call) and node in parent.args:
            is_read = self.source.code(parent.func).split(".")[-1] not in _TAKES_TEXT | {"str", "repr", "bool"}
        if isinstance(parent, ast.Compare):
            is_read = not isinstance(parent.ops[0], (ast.Is, ast.IsNot, ast.Eq, ast.NotEq))
        self._note(node, VERSION, is_work=is_read and not self._is_guarded(node))

    def _port_f_string(self, node: ast.JoinedStr) -> None:
        """``f"cuda:{rank}"``."""
        first = node.values[0] if node.values else None
        if not (isinstance(first, ast.Constant) and str(first.value).startswith("cuda:")):
            return
        if isinstance(self._parents.get(node), ast.Compare):
            return
        kind = f"({HERE_DEVICE}).type".replace('"', "'") if self._assigns_device(node) else self._here(node, KIND)
        begin = self.source.data.index(b"cuda:", self.source.begin(node))
        if "'" in kind and "'" in self.source.code(node)[:3]:
            kind = kind.replace("'", '"')
        self.found.edits.append(Edit(begin, begin + len("cuda"), "{" + kind + "}"))
        self.found.lines.add(node.lineno)

    def _port_text(self, node: ast.Constant, text: str) -> None:
        """A device or a backend that is named by text, by what it is text for."""
        parent = self._parents.get(node)
        if text.split(" ")[0] == "nvidia-smi" and not self._only_looks(node):
            self._note(node, DRIVER, is_work=not self._is_guarded(node))
        if "nccl" in text and self._is_backend(node):
            self._port_backend(node, text)
            return
        if text.startswith("torch.cuda.") and text.endswith("Tensor"):
            self._note(node, LEGACY, is_work=True)
        if not _CUDA.fullmatch(text) or isinstance(parent, (ast.Expr, ast.JoinedStr, ast.Subscript)):
            if _CUDA_BEGINS.fullmatch(text) and isinstance(parent, (ast.BinOp, ast.Attribute)):
                self._edit(node, f'f"{{{self._here_in_text(node)}}}{text[4:].replace("{", "{{").replace("}", "}}")}"')
            return
        if isinstance(parent, (ast.List, ast.Tuple, ast.Set)):
            self._note(node, IN_A_LIST, is_work=not self._is_among_choices(parent))
            return
        if isinstance(parent, ast.Dict) and node in parent.keys:
            return
        if isinstance(parent, ast.Call) and node in parent.args and self.source.code(parent.func).split(".")[-1] in _TAKES_TEXT:
            return
        self._port_named(node, text)

    def _port_named(self, node: ast.Constant, text: str) -> None:
        place = self._standing(node)
        index = _index(node)
        is_value = isinstance(self._parents.get(place), (ast.Assign, ast.AnnAssign, ast.NamedExpr))
        if self._takes_kind(node):
            self._edit(node, self._here(node, KIND))
        elif index:
            self._edit(node, f'f"{{{self._here_in_text(node)}}}:{index}"')
            self._note(node, f"Names device {index}: there must be as many")
        elif is_value:
            self._edit(node, HERE if place is node else f"({HERE})")
        else:
            self._edit(node, f"({HERE})" if self._assigns_device(node) else self.word(node))

    def _port_backend(self, node: ast.Constant, text: str) -> None:
        if text == "nccl":
            self._edit(node, self._here(node, BACKEND))
        else:
            self._note(node, "NCCL is for CUDA: leave the backend out, and torch takes one for each device", is_work=True)

    # small questions

    def _here(self, node: ast.AST, text: str) -> str:
        """`text`, which names ``device``, with what the device is called where `node` is."""
        if "(device)" not in text:
            return text
        if self._assigns_device(node):  # it has no value yet
            return HERE if text == KIND else text.replace("(device)", f"({HERE})")
        return text.replace("(device)", f"({self.word(node)})")

    def _here_in_text(self, node: ast.AST) -> str:
        return self._here(node, KIND).replace('"', "'")

    def _rule(self, name: str) -> Rule:
        short = name.removeprefix("torch.cuda.")
        return CALLS.get(short) or CALLS.get(short.partition(".")[0]) or Rule("none", note=ONLY_CUDA)

    def _standing(self, node: ast.expr) -> ast.expr:
        """The whole expression of which `node` is one of several values: ``x or "cuda"``, ``"cuda" if x else y``."""
        parent = self._parents.get(node)
        while isinstance(parent, ast.BoolOp) or (isinstance(parent, ast.IfExp) and node is not parent.test):
            node, parent = parent, self._parents.get(parent)
        return node

    def _guards_cuda(self, node: ast.AST) -> bool:
        """Whether what runs only where `node` is true calls what CUDA alone has."""
        guarded: ast.AST | None = None
        while node in self._parents and not isinstance(node, ast.stmt):
            node = self._parents[node]
            guarded = node if isinstance(node, (ast.If, ast.IfExp, ast.BoolOp)) else guarded
        calls = (inner for inner in ast.walk(guarded) if isinstance(inner, ast.Call)) if guarded is not None else ()
        names = (self.dotted(call.func) for call in calls)
        return any(name.startswith("torch.cuda.") and self._rule(name).shape == "none" for name in names)

    def _is_guarded(self, node: ast.AST) -> bool:
        """Whether `node` runs only where there is CUDA, or where its failure is caught."""
        for around, part in self.bindings.ancestors(node):
            is_caught = isinstance(around, ast.Try) and part in around.body and bool(around.handlers)
            is_inside = isinstance(around, ast.If) and part in around.body
            is_inside = is_inside or (isinstance(around, ast.IfExp) and part is around.body)
            is_later = isinstance(around, ast.BoolOp) and isinstance(around.op, ast.And) and part is not around.values[0]
            test = around.test if isinstance(around, (ast.If, ast.IfExp)) else around.values[0] if is_later else None  # type: ignore[attr-defined]
            if is_caught or (test is not None and (is_inside or is_later) and self._asks_for_cuda(test)):
                return True
        return False

    def _asks_for_cuda(self, test: ast.expr) -> bool:
        """Whether a condition holds on a machine with CUDA alone."""
        if isinstance(test, ast.BoolOp):
            return isinstance(test.op, ast.And) and any(map(self._asks_for_cuda, test.values))
        if isinstance(test, ast.Call):
            is_found = self.dotted(test.func) == "shutil.which"
            return is_found or self.dotted(test.func) in ("torch.cuda.is_available", "torch.cuda.is_initialized")
        if isinstance(test, ast.Attribute):
            return test.attr == "is_cuda" or self.dotted(test) == "torch.version.cuda"
        if isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.IsNot):
            return self.dotted(test.left) == "torch.version.cuda"
        return isinstance(test, ast.Compare) and isinstance(test.ops[0], ast.Eq) and self._asked_of(test)[1] == "cuda"

    def _refuses(self, node: ast.AST) -> bool:
        """Whether the program ends where a condition that `node` is in does not hold, or does."""
        for around, part in self.bindings.ancestors(node):
            if isinstance(around, ast.Assert):
                return part is around.test
            if isinstance(around, ast.If):
                return part is around.test and any(_is_end(inner) for inner in [*around.body, *around.orelse])
        return False

    def _takes_kind(self, node: ast.expr) -> bool:
        """Whether text stands where a kind of device is expected: ``device_type=``, or the first of torch.device's two."""
        node = self._standing(node)
        parent = self._parents.get(node)
        call = self._parents.get(parent) if isinstance(parent, ast.keyword) else parent
        if not isinstance(call, ast.Call):
            return False
        if isinstance(parent, ast.keyword) and parent.arg in ("device_type", "type"):
            return True
        name = self.dotted(call.func)
        return name in TAKES_KIND or (name == "torch.device" and len(call.args) + len(call.keywords) > 1)

    def _is_device(self, node: ast.expr) -> bool:
        """Whether the number of a device stands where a device is expected, which a CPU's number is not."""
        node = self._standing(node)
        parent = self._parents.get(node)
        if isinstance(parent, ast.keyword):
            return parent.arg in ("device", "map_location")
        if isinstance(parent, (ast.Assign, ast.AnnAssign)):
            return self._assigns_device(node)
        is_first = isinstance(parent, ast.Call) and parent.args[:1] == [node]
        return is_first and isinstance(parent, ast.Call) and getattr(parent.func, "attr", "") in ("to", "cuda")

    def _is_backend(self, node: ast.expr) -> bool:
        node = self._standing(node)
        parent = self._parents.get(node)
        if isinstance(parent, ast.keyword):
            return parent.arg == "backend"
        if isinstance(parent, ast.Call):
            return parent.args[:1] == [node] and self.dotted(parent.func).endswith("init_process_group")
        return isinstance(parent, ast.Assign) and parent.value is node

    def _is_stream(self, node: ast.expr) -> bool:
        values = [binding.value for binding in self.bindings.of_expression(node)]
        calls = [value for value in [node, *values] if isinstance(value, ast.Call)]
        return any(self.dotted(call.func) in _STREAMS for call in calls)

    def _is_of_storage(self, node: ast.AST) -> bool:
        """Whether it is in a function that moves storages, whose ``.to`` takes its device by name."""
        return any(
            isinstance(around, ast.keyword) and around.arg == "map_location" for around, _ in self.bindings.ancestors(node)
        )

    def _is_for_nvidia(self, node: ast.Call, name: str) -> bool:
        texts = (str(part.value) for part in ast.walk(node) if isinstance(part, ast.Constant))
        is_asked = any(keyword.arg in ("cuda_sources", "with_cuda") for keyword in node.keywords)
        return is_asked or name.endswith("CUDAExtension") or any(text.endswith((".cu", ".cuh")) for text in texts)

    def _is_among_choices(self, node: ast.AST) -> bool:
        parent = self._parents.get(node)
        return isinstance(parent, ast.keyword) and parent.arg == "choices"

    def _only_looks(self, node: ast.AST) -> bool:
        parent = self._parents.get(node)
        return not isinstance(parent, (ast.Call, ast.List, ast.Tuple, ast.Assign)) or (
            isinstance(parent, ast.Call) and self.source.code(parent.func).split(".")[-1] in _TAKES_TEXT | {"which"}
        )

    def _is_called(self, node: ast.expr) -> bool:
        parent = self._parents.get(node)
        return isinstance(parent, ast.Call) and parent.func is node

    def _is_alone(self, node: ast.expr) -> bool:
        """Whether nothing else is on the lines of `node`."""
        first, last = self.source.lines[node.lineno - 1], self.source.lines[(node.end_lineno or node.lineno) - 1]
        before = first.encode("utf-8", "surrogatepass")[: node.col_offset]
        after = last.encode("utf-8", "surrogatepass")[node.end_col_offset or 0 :].strip()
        return not before.strip() and (not after or after.startswith(b"#"))

    def _assigns_device(self, node: ast.AST) -> bool:
        """Whether the statement around `node` is what gives `device` its value."""
        statement = self.bindings.statement(node)
        targets = [*getattr(statement, "targets", ()), getattr(statement, "target", None)]
        names = [inner for target in targets if isinstance(target, ast.AST) for inner in ast.walk(target)]
        return any(isinstance(name, ast.Name) and name.id == WORDS[0] for name in names)

    def _free(self, node: ast.AST, text: str) -> str:
        """`text` in the place of `node`, in brackets where they are needed."""
        parent = self._parents.get(node)
        free = (ast.Assign, ast.AnnAssign, ast.Return, ast.keyword, ast.If, ast.While, ast.Assert, ast.Expr)
        is_argument = isinstance(parent, ast.Call) and node in parent.args
        is_test = isinstance(parent, ast.IfExp) and parent.test is node
        return text if isinstance(parent, free) or is_argument or is_test or text == HERE else f"({text})"

    def _after_paren(self, node: ast.Call) -> int:
        return self.source.data.index(b"(", self.source.end(node.func)) + 1

    def _before_paren(self, node: ast.Call) -> int:
        """The end of the last argument of a call."""
        return max(self.source.end(part) for part in [*node.args, *(keyword.value for keyword in node.keywords)])

    # what is kept

    def _guard(self, node: ast.Call) -> None:
        """Make the call only where there is an accelerator."""
        self.found.lines.add(node.lineno)
        line = self.source.lines[node.lineno - 1]
        if isinstance(self._parents.get(node), ast.Expr) and self._is_alone(node):
            indent = line[: len(line) - len(line.lstrip())]
            self._open(node, f"if {IS_HERE}:\n{indent}    ")
        else:
            self._open(node, "(")
            self._insert(self.source.end(node), f" if {IS_HERE} else None)")

    def _edit(self, node: ast.expr, text: str) -> None:
        edit = Edit(self.source.begin(node), self.source.end(node), text)
        if edit not in self.found.edits:
            self.found.edits.append(edit)
        self.found.lines.add(node.lineno)

    def _insert(self, place: int, text: str) -> None:
        self.found.edits.append(Edit(place, place, text))

    def _open(self, node: ast.expr, text: str) -> None:
        """Put `text` before an expression."""
        self.found.edits.append(Edit(self.source.begin(node), self.source.begin(node), text, opens=True))

    def _note(self, node: ast.expr | ast.stmt, text: str, *, is_work: bool = False) -> None:
        self.found.notes.setdefault(node.lineno, []).append(Note(text, is_work))
        if is_work:
            self.found.lines.add(node.lineno)


_SCALER = ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled")


def _is_cuda(node: ast.AST) -> bool:
    return _CUDA.fullmatch(_text_of(node) or "") is not None


def _text_of(node: ast.AST | None) -> str | None:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _index(node: ast.Constant) -> int:
    match = _CUDA.fullmatch(str(node.value))
    return int(match[1] or 0) if match else 0


def _is_end(node: ast.stmt) -> bool:
    """Whether a statement ends the program."""
    if isinstance(node, ast.Raise):
        return True
    call = node.value if isinstance(node, ast.Expr) else None
    function = call.func if isinstance(call, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", "")) in _ENDS
