"""What a file asks of CUDA, place by place: what to write there instead, and what can only be said."""

from __future__ import annotations

import ast
import re

from torchspan.report._calls import Calls
from torchspan.report._editor import Editor
from torchspan.report._places import CUDA, TAKES_TEXT, Places, index_of
from torchspan.report._rules import (
    ASKS,
    BACKEND,
    DRIVER,
    HANDED_ON,
    HERE,
    HERE_DEVICE,
    IMPORT,
    IN_A_LIST,
    KIND,
    LEGACY,
    REFUSES,
    STAYS,
)
from torchspan.report._source import Edit, Source

_CUDA_BEGINS = re.compile(r"cuda:(?:%[dis]|\{\w*\})?")
_FOREIGN = ("triton", "pynvml", "cupy", "pycuda")
"""Packages that are of use with NVIDIA's driver alone."""


class Rewriter:
    """Goes through one file; what it finds is in `editor.changes`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.places = Places(source)
        self.editor = Editor(self.places)
        self._calls = Calls(self.places, self.editor)
        waiting: list[ast.AST] = [source.tree] if source.tree is not None else []
        while waiting:
            node = waiting.pop()
            if not self._port_node(node):
                waiting += reversed(list(ast.iter_child_nodes(node)))

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
            return self._calls.port(node)
        if isinstance(node, ast.Attribute):
            return self._port_attribute(node)
        if isinstance(node, ast.JoinedStr):
            self._port_f_string(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            self._port_text(node, node.value)
        if isinstance(node, ast.List) and any(self.places.dotted(part).endswith("ProfilerActivity.CUDA") for part in node.elts):
            self.editor.edit(node, "torch.profiler.supported_activities()")
            return True
        return False

    def _port_import(self, node: ast.Import | ast.ImportFrom) -> None:
        names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names if isinstance(node, ast.Import))]
        if names[0].startswith("torch.cuda"):
            self.editor.note(node, "Not needed once the lines that use it are portable")
            self.editor.asked(node.lineno)
        elif package := next((name for name in names if name.partition(".")[0] in _FOREIGN), ""):
            self.editor.note(node, IMPORT.format(package=package.partition(".")[0]), is_work=not self.places.is_guarded(node))

    def _port_comparison(self, node: ast.Compare) -> bool:
        parts = [node.left, *node.comparators]
        parts += [part for each in parts if isinstance(each, (ast.Tuple, ast.List, ast.Set)) for part in each.elts]
        if any(isinstance(part, ast.Constant) and isinstance(part.value, str) and CUDA.match(part.value) for part in parts):
            self.editor.note(node, ASKS, is_work=self.places.refuses(node))
            self.editor.asked(node.lineno)
            return True
        return False

    def _port_choice(self, node: ast.IfExp) -> bool:
        """``"cuda" if … else "cpu"``, in either order, and the same of backends."""
        if self.places.is_choice(node):
            is_kind = self.places.takes_kind(node)
            self.editor.edit(node, self.editor.free(node, self.editor.here(node, KIND) if is_kind else HERE))
            return True
        if self.places.is_backend_choice(node):
            self.editor.edit(node, self.editor.here(node, BACKEND))
            return True
        code = self.places.asked_whether_cuda(node)
        if code:
            self.editor.edit(node, code)
        return bool(code)

    def _port_attribute(self, node: ast.Attribute) -> bool:
        """What is named and not called: a function handed on, a class, a setting, ``x.is_cuda``."""
        if node.attr == "is_cuda" and isinstance(node.ctx, ast.Load):
            text = f'{self._source.code(node.value)}.device.type != "cpu"'
            self.editor.edit(node, text if isinstance(self.places.parent(node), ast.BoolOp) else self.editor.free(node, text))
            if self.places.refuses(node):
                self.editor.note(node, REFUSES, is_work=True)
            return True
        name = self.places.dotted(node)
        if name == "torch.version.cuda":
            self._calls.port_version(node)
            return True
        if name.startswith(("torch.backends.cuda.", "torch.backends.cudnn.")):
            self.editor.note(node, STAYS)
            return True
        parent = self.places.parent(node)
        if not name.startswith("torch.cuda.") or isinstance(parent, ast.Attribute) or self.places.is_called(node):
            return False
        rule = self.places.rule(name)
        self.editor.asked(node.lineno)
        if isinstance(node.ctx, ast.Store):
            self.editor.note(node, "Changes torch.cuda itself: nothing takes its place", is_work=True)
        elif rule.shape == "rename":
            self.editor.edit(node, self.editor.here(node, rule.to))
        elif rule.shape != "none":
            self.editor.note(node, HANDED_ON, is_work=True)
        if rule.note and not isinstance(node.ctx, ast.Store):
            is_error = any(isinstance(around, ast.ExceptHandler) for around, _ in self.places.bindings.ancestors(node))
            self.editor.note(
                node, rule.note, is_work=rule.shape == "none" and not is_error and not self.places.is_guarded(node)
            )
        return True

    def _port_f_string(self, node: ast.JoinedStr) -> None:
        """``f"cuda:{rank}"``."""
        first = node.values[0] if node.values else None
        if not (isinstance(first, ast.Constant) and str(first.value).startswith("cuda:")):
            return
        if isinstance(self.places.parent(node), ast.Compare):
            return
        kind = f"({HERE_DEVICE}).type".replace('"', "'") if self.places.assigns_device(node) else self.editor.here(node, KIND)
        begin = self._source.data.index(b"cuda:", self._source.begin(node))
        if "'" in kind and "'" in self._source.code(node)[:3]:
            kind = kind.replace("'", '"')
        self.editor.add(Edit(begin, begin + len("cuda"), "{" + kind + "}"))
        self.editor.asked(node.lineno)

    def _port_text(self, node: ast.Constant, text: str) -> None:
        """A device or a backend that is named by text, by what it is text for."""
        parent = self.places.parent(node)
        if text.split(" ")[0] == "nvidia-smi" and not self.places.only_looks(node):
            self.editor.note(node, DRIVER, is_work=not self.places.is_guarded(node))
        if "nccl" in text and self.places.is_backend(node):
            self._port_backend(node, text)
            return
        if text.startswith("torch.cuda.") and text.endswith("Tensor"):
            self.editor.note(node, LEGACY, is_work=True)
        if not CUDA.fullmatch(text) or isinstance(parent, (ast.Expr, ast.JoinedStr, ast.Subscript)):
            if _CUDA_BEGINS.fullmatch(text) and isinstance(parent, (ast.BinOp, ast.Attribute)):
                self.editor.edit(
                    node, f'f"{{{self.editor.here_in_text(node)}}}{text[4:].replace("{", "{{").replace("}", "}}")}"'
                )
            return
        if isinstance(parent, (ast.List, ast.Tuple, ast.Set)):
            self.editor.note(node, IN_A_LIST, is_work=not self.places.is_among_choices(parent))
            return
        if isinstance(parent, ast.Dict) and node in parent.keys:
            return
        if isinstance(parent, ast.Call) and node in parent.args and self._source.code(parent.func).split(".")[-1] in TAKES_TEXT:
            return
        self._port_named(node, text)

    def _port_named(self, node: ast.Constant, text: str) -> None:
        place = self.places.standing(node)
        index = index_of(node)
        is_value = isinstance(self.places.parent(place), (ast.Assign, ast.AnnAssign, ast.NamedExpr))
        if self.places.takes_kind(node):
            self.editor.edit(node, self.editor.here(node, KIND))
        elif index:
            self.editor.edit(node, f'f"{{{self.editor.here_in_text(node)}}}:{index}"')
            self.editor.note(node, f"Names device {index}: there must be as many")
        elif is_value:
            self.editor.edit(node, HERE if place is node else f"({HERE})")
        else:
            self.editor.edit(node, f"({HERE})" if self.places.assigns_device(node) else self.editor.word(node))

    def _port_backend(self, node: ast.Constant, text: str) -> None:
        if text == "nccl":
            self.editor.edit(node, self.editor.here(node, BACKEND))
        else:
            self.editor.note(node, "NCCL is for CUDA: leave the backend out, and torch takes one for each device", is_work=True)
