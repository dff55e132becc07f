"""What a call asks of CUDA, and the call to write instead."""

from __future__ import annotations

import ast
import re

from torchspan.report._editor import Editor
from torchspan.report._places import STREAMS, TAKES_TEXT, Places, index_of, is_cuda, text_of
from torchspan.report._rules import (
    ASSERTS,
    COMPILER,
    FORK,
    HERE_DEVICE,
    IS_HERE,
    KIND,
    MODULE,
    PINNED,
    REFUSES,
    STREAM_METHODS,
    VERSION,
    Rule,
)
from torchspan.report._source import Edit

_CURRENT = "torch.cuda.current_device"
_SCALER = ("init_scale", "growth_factor", "backoff_factor", "growth_interval", "enabled")


class Calls:
    """Ports the calls of one file."""

    def __init__(self, places: Places, editor: Editor) -> None:
        self._places = places
        self._editor = editor
        self._source = places.source

    def port(self, node: ast.Call) -> bool:
        name = self._places.dotted(node.func)
        method = node.func.attr if isinstance(node.func, ast.Attribute) and not name.startswith("torch.") else ""
        if name.startswith("torch.cuda."):
            self._port_cuda_call(node, name)
        elif name == "torch.device":
            return self._port_device(node)
        elif name == "torch.random.fork_rng":
            return self._port_fork(node)
        elif name == "torch.set_default_tensor_type":
            self._editor.note(
                node, "torch.set_default_device(device), and torch.set_default_dtype(…) for the type", is_work=True
            )
        elif name.startswith("torch.utils.cpp_extension.") and self._places.is_for_nvidia(node, name):
            self._editor.note(node, COMPILER, is_work=not self._places.is_guarded(node))
        elif name == "torch.backends.cudnn.version":
            self.port_version(node)
            return True
        elif method == "cuda" and isinstance(node.func, ast.Attribute):
            self._port_movement(node, node.func)
        elif method == "pin_memory" and isinstance(node.func, ast.Attribute) and not node.args:
            return self._port_pinning(node, node.func)
        elif method == "record_stream":
            self._editor.guard(node)
        elif method and isinstance(node.func, ast.Attribute) and self._places.is_stream(node.func.value):
            self._port_stream_method(node, method)
        elif method == "to" and node.args:
            self._port_number(node.args[0])
        self._port_keywords(node, name)
        return False

    def _port_cuda_call(self, node: ast.Call, name: str) -> None:
        rule = self._places.rule(name)
        self._editor.asked(node.lineno)
        if name.endswith("is_available") and self._places.guards_cuda(node):
            self._editor.note(node, "Stays as it is: what it guards is CUDA's alone")
            return
        if name.endswith("is_available") and self._places.refuses(node):
            is_assertion = isinstance(self._places.parent(node), ast.Assert)
            self._editor.note(node, ASSERTS if is_assertion else REFUSES, is_work=True)
        if rule.note:
            self._editor.note(node, rule.note, is_work=rule.shape == "none" and not self._places.is_guarded(node))
        if name in STREAMS and any(keyword.arg != "priority" for keyword in node.keywords):
            self._editor.note(node, "torch.cpu.Stream takes no device: leave it out", is_work=True)
        if rule.shape == "rename":
            self._editor.edit(node.func, self._editor.here(node, rule.to))
        elif rule.shape == "typed":
            self._port_typed(node, rule)
        elif rule.shape == "figure":
            self._port_figure(node, rule)
        elif rule.shape == "count":
            self._port_count(node, rule)
        elif rule.shape == "guard":
            self._port_guarded(node, rule)

    def _port_figure(self, node: ast.Call, rule: Rule) -> None:
        if rule.to.endswith("current_device_index") and self._places.is_device(node):
            self._editor.edit(
                node, HERE_DEVICE if self._places.assigns_device(node) else f"torch.device({self._editor.word(node)})"
            )
            return
        self._editor.edit(node.func, f"({rule.to}")
        self._editor.insert(self._source.end(node), f" if {IS_HERE} else 0)")

    def _port_count(self, node: ast.Call, rule: Rule) -> None:
        """A program divides by it and starts as many processes: the CPU is one, unless it is asked whether there is any."""
        parent = self._places.parent(node)
        numbers = [part.value for part in getattr(parent, "comparators", ()) if isinstance(part, ast.Constant)]
        is_compared = isinstance(parent, ast.Compare) and (
            0 in numbers or (1 in numbers and isinstance(parent.ops[0], (ast.GtE, ast.Lt, ast.Gt, ast.LtE)))
        )
        is_condition = isinstance(parent, (ast.BoolOp, ast.UnaryOp)) or node is getattr(parent, "test", None)
        is_guarded = any(
            isinstance(around, ast.IfExp) and part is around.body and "is_available" in self._source.code(around.test)
            for around, part in self._places.bindings.ancestors(node)
        )
        self._editor.edit(node.func, rule.to)
        if not (is_compared or is_condition or is_guarded):
            self._editor.open(node, "max(1, ")
            self._editor.insert(self._source.end(node), ")")

    def _port_typed(self, node: ast.Call, rule: Rule) -> None:
        """``autocast(True, torch.float16)`` takes its arguments by place; its portable form takes the kind of device first."""
        self._editor.edit(node.func, rule.to)
        is_decorated = rule.to.endswith(("_fwd", "_bwd"))
        names = ("enabled", "dtype", "cache_enabled") if rule.to == "torch.autocast" else _SCALER
        for argument, keyword in zip(node.args, ("fwd",) if is_decorated else names):
            if not is_decorated:
                self._editor.open(argument, f"{keyword}=")
        kind = self._editor.here(node, KIND)
        text = f"device_type={kind}" if rule.to != "torch.amp.GradScaler" else kind
        rest = ", " if node.args or node.keywords else ""
        if is_decorated and node.args:
            self._editor.insert(self._source.end(node.args[-1]), f", {text}")
        else:
            self._editor.insert(self._editor.after_paren(node), text + rest)

    def _port_guarded(self, node: ast.Call, rule: Rule) -> None:
        """A statement of its own goes under an ``if``; elsewhere what the module of the device has is called."""
        is_expression = isinstance(self._places.parent(node), ast.Expr)
        if rule.to.endswith("synchronize") and not (is_expression and self._places.is_alone(node)):
            self._editor.edit(node.func, f"{self._editor.here(node, MODULE)}.synchronize")
        else:
            self._editor.guard(node)
            self._editor.edit(node.func, rule.to)

    def _port_device(self, node: ast.Call) -> bool:
        """``torch.device("cuda")``, ``torch.device("cuda", 1)``, ``torch.device("cuda:0" if … else "cpu")``."""
        first = node.args[0] if node.args else None
        if len(node.args) + len(node.keywords) != 1 or first is None:
            return False
        is_choice = self._places.is_choice(first)
        is_first = isinstance(first, ast.Constant) and ((is_cuda(first) and index_of(first) == 0) or first.value in (0,))
        keyword = self._places.parent(node)
        if is_first and isinstance(keyword, ast.keyword) and keyword.arg == "device_id":
            self._editor.edit(
                node, f"torch.device({self._editor.here(node, KIND)}, 0)"
            )  # without an index, no group of processes takes it
            return True
        if is_first or is_choice:
            own = self._places.assigns_device(node) or is_choice or isinstance(keyword, (ast.Assign, ast.AnnAssign))
            self._editor.edit(node, self._editor.free(node, HERE_DEVICE) if own else f"torch.device({self._editor.word(node)})")
            return True
        if self._places.bindings.is_number(first):
            self._editor.open(first, f"{self._editor.here(node, KIND)}, ")
            self._editor.asked(node.lineno)
        return False

    def _port_fork(self, node: ast.Call) -> bool:
        """The CPU's generator is kept apart from those of `devices`, of which there are none without an accelerator."""
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        devices = keywords.get("devices", node.args[0] if node.args else None)
        kind = keywords.get("device_type")
        if devices is None and (kind is None or text_of(kind) == "cpu"):
            return False
        self._editor.asked(node.lineno)
        self._editor.note(node, FORK)
        is_empty = isinstance(devices, (ast.List, ast.Tuple)) and not devices.elts
        if kind is None and not is_empty:
            self._editor.insert(self._editor.before_paren(node), f", device_type={self._editor.here(node, KIND)}")
        if devices is None:
            self._editor.insert(self._editor.before_paren(node), f", devices=None if {IS_HERE} else []")
        elif not is_empty and text_of(kind) != "cpu":
            self._editor.unless_here(devices, "[]")
        return False

    def _port_movement(self, node: ast.Call, func: ast.Attribute) -> None:
        """``x.cuda()``, ``x.cuda(0)``, ``x.cuda(rank)``, ``x.cuda(non_blocking=True)``."""
        self._editor.asked(func.end_lineno or node.lineno)
        self._editor.add(Edit(self._source.end(func) - len("cuda"), self._source.end(func), "to"))
        devices = [*node.args[:1], *(keyword.value for keyword in node.keywords if keyword.arg == "device")]
        if node.args[1:]:
            self._editor.open(node.args[1], "non_blocking=")  # .to takes a type there
        name = "device=" if self._places.is_of_storage(node) else ""
        if not devices:
            rest = ", " if node.keywords else ""
            self._editor.insert(self._editor.after_paren(node), f"{name}{self._editor.word(node)}{rest}")
            return
        argument = devices[0]
        if name and node.args:
            self._editor.insert(self._editor.after_paren(node), name)
        if isinstance(argument, ast.Constant) and argument.value in (0, None):
            self._editor.edit(argument, self._editor.word(node))
        elif isinstance(argument, ast.Constant) or self._places.dotted(getattr(argument, "func", argument)) == _CURRENT:
            return
        elif self._places.bindings.is_number(argument) or not re.search("dev", self._source.code(argument)):
            self._editor.numbered(argument)

    def _port_number(self, argument: ast.expr) -> None:
        """A device that is named by its number alone, which only an accelerator has."""
        if not self._places.bindings.is_number(argument):
            return
        if isinstance(argument, ast.Constant) and argument.value == 0:
            self._editor.edit(argument, self._editor.word(argument))
        elif self._places.dotted(getattr(argument, "func", argument)) != _CURRENT:
            self._editor.numbered(argument)
            self._editor.asked(argument.lineno)

    def _port_pinning(self, node: ast.Call, func: ast.Attribute) -> bool:
        self._editor.asked(func.end_lineno or node.lineno)
        is_simple = isinstance(func.value, (ast.Name, ast.Attribute))
        self._editor.note(node, PINNED, is_work=not is_simple)
        if is_simple:
            held = self._source.code(func.value)
            self._editor.edit(node, f"({held}.pin_memory() if {IS_HERE} else {held})")
        return is_simple

    def _port_stream_method(self, node: ast.Call, method: str) -> None:
        """Streams of the CPU have but three methods, which give nothing."""
        is_used = not isinstance(self._places.parent(node), ast.Expr)
        if method not in STREAM_METHODS and not is_used:
            self._editor.guard(node)
        elif method not in STREAM_METHODS or (is_used and method == "record_event"):
            self._editor.note(node, f"A stream of the CPU has no {method}() that gives anything", is_work=True)

    def _port_keywords(self, node: ast.Call, name: str) -> None:
        is_group = name.endswith("init_process_group")
        for keyword in node.keywords:
            value = keyword.value
            is_data = name.endswith(("DistributedDataParallel", "barrier", "DataParallel"))
            if keyword.arg == "pin_memory" and isinstance(value, ast.Constant) and value.value is True:
                self._editor.edit(value, IS_HERE)
            elif keyword.arg == "device" and name != "torch.device" and getattr(node.func, "attr", "") != "cuda":
                self._port_number(value)
            elif (
                (keyword.arg == "device_ids" and (isinstance(value, ast.List) or is_data))
                or (keyword.arg == "output_device" and is_data)
                or (keyword.arg == "device_id" and (is_group or name.endswith("FullyShardedDataParallel")))
            ):
                self._editor.unless_here(value, "None")

    def port_version(self, node: ast.expr) -> None:
        """A version that is None where torch was built without CUDA: printed it may be, read it cannot."""
        parent = self._places.parent(node)
        is_read = isinstance(parent, (ast.Attribute, ast.Subscript, ast.BinOp))
        if isinstance(parent, ast.Call) and node in parent.args:
            is_read = self._source.code(parent.func).split(".")[-1] not in TAKES_TEXT | {"str", "repr", "bool"}
        if isinstance(parent, ast.Compare):
            is_read = not isinstance(parent.ops[0], (ast.Is, ast.IsNot, ast.Eq, ast.NotEq))
        self._editor.note(node, VERSION, is_work=is_read and not self._places.is_guarded(node))
