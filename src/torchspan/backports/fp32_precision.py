"""``fp32_precision``: how exactly float32 matmuls, convolutions and recurrent layers compute.

A setting is a permission: "tf32" and "bf16" allow less exact products, "ieee" allows none, "none" leaves it to what is above
(an operator's to its backend's, that to the one of all). This torch has two switches, one for matmuls of every device, and one
for cuDNN's convolutions and recurrent layers together. They are set to the most that every setting in question allows.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import ModuleType
from typing import Any

import torch

from torchspan.backports._base import Backport, Change
from torchspan.core.errors import UnsupportedError
from torchspan.core.report import current_report, user_site

_LINK = "https://docs.pytorch.org/docs/2.9/notes/cuda.html#tensorfloat-32-tf32-on-ampere-and-later-devices"
_VALUES = {
    "generic": ("none", "ieee", "tf32", "bf16"),
    "cuda": ("none", "ieee", "tf32"),
    "mkldnn": ("none", "ieee", "tf32", "bf16"),
}
_NAMES = {
    ("generic", "all"): "torch.backends",
    ("cuda", "all"): "torch.backends.cudnn",
    ("cuda", "matmul"): "torch.backends.cuda.matmul",
    ("cuda", "conv"): "torch.backends.cudnn.conv",
    ("cuda", "rnn"): "torch.backends.cudnn.rnn",
    ("mkldnn", "all"): "torch.backends.mkldnn",
    ("mkldnn", "matmul"): "torch.backends.mkldnn.matmul",
    ("mkldnn", "conv"): "torch.backends.mkldnn.conv",
    ("mkldnn", "rnn"): "torch.backends.mkldnn.rnn",
}
_OF_LEVEL = {
    "highest": ("ieee", "ieee"),
    "high": ("tf32", "tf32"),
    "medium": ("tf32", "bf16"),
}  # of CUDA's and oneDNN's matmuls

_Place = tuple[str, str]
_given: dict[_Place, str] = {}  # what was set, by backend and operator
_seen: dict[str, Any] = {}  # the two switches when they were last looked at, so that a change by others is noticed


def resolve(given: dict[_Place, str], backend: str, operator: str) -> str:
    """The precision in force: the operator's own, else its backend's, else that of all.

    >>> resolve({("generic", "all"): "tf32", ("cuda", "matmul"): "ieee"}, "cuda", "matmul")
    'ieee'
    >>> resolve({("generic", "all"): "bf16"}, "cuda", "matmul")  # CUDA knows no such precision
    'none'
    >>> resolve({}, "cuda", "conv")  # as it always was
    'tf32'
    """
    places = ((backend, operator), (backend, "all"), ("generic", "all"))
    found = next((value for place in places if (value := given.get(place, "none")) != "none"), None)
    if found is None:
        is_default = backend == "cuda" and operator in ("conv", "rnn") and (backend, operator) not in given
        return "tf32" if is_default else "none"
    return found if found in _VALUES[backend] else "none"


def _level(given: dict[_Place, str], has_cuda: bool) -> str:
    """The precision of all matmuls that allows what was asked for; raises UnsupportedError where one switch cannot say it."""
    cuda, mkldnn = (resolve(given, backend, "matmul") for backend in ("cuda", "mkldnn"))
    if cuda != "tf32" and has_cuda and mkldnn in ("tf32", "bf16"):
        if given.get(("mkldnn", "matmul"), "none") == "none":
            return "highest"  # it was said of all operators: what is more exact than it has to be is as allowed
        raise UnsupportedError(
            f"torch.backends.mkldnn.matmul.fp32_precision = {mkldnn!r} with torch.backends.cuda.matmul.fp32_precision = "
            f"{cuda!r}: this torch has one switch for the matmuls of all devices, and it would allow TF32 on CUDA; "
            f"{BACKPORT.reason}; set torch.backends.cuda.matmul.fp32_precision = 'tf32' first"
        )
    if mkldnn == "bf16":
        return "medium"
    return "high" if "tf32" in (cuda, mkldnn) else "highest"


def _get(backend: str, operator: str) -> str:
    _notice()
    return resolve(_given, backend, operator)


def _set(backend: str, operator: str, precision: str) -> None:
    if not isinstance(precision, str):
        raise TypeError(f"fp32_precision is the name of a precision, got {precision!r}; expected one of {_VALUES[backend]}")
    if precision not in _VALUES["generic"]:
        raise RuntimeError(f"Unknown precision: {precision}; expected one of {_VALUES[backend]}")
    if precision not in _VALUES[backend]:
        raise RuntimeError(f"backend {backend!r} does not support precision {precision!r}; it has {_VALUES[backend]}")
    name = f"{_NAMES[backend, operator]}.fp32_precision"
    if backend == "mkldnn" and operator in ("conv", "rnn") and precision in ("tf32", "bf16"):
        raise UnsupportedError(
            f"{name} = {precision!r}: this torch's oneDNN computes float32 {operator} on a CPU in float32 only; "
            f"{BACKPORT.reason}; leave it at 'ieee' or 'none'"
        )
    _notice()
    given = {**_given, (backend, operator): precision}
    level = _level(given, torch.version.cuda is not None)
    _given.update(given)
    torch.set_float32_matmul_precision(level)
    kinds = [resolve(_given, "cuda", kind) for kind in ("conv", "rnn")]
    torch._C._set_cudnn_allow_tf32(kinds == ["tf32", "tf32"])
    _remember()
    _report(name, precision, kinds)


def _report(name: str, precision: str, kinds: list[str]) -> None:
    report = current_report()
    if report is None:
        return
    report.decide("backport", name, f"torchspan's {BACKPORT.name}: {precision}", BACKPORT.reason, user_site())
    if kinds.count("tf32") == 1:
        one = ("torch.backends.cudnn.conv", "torch.backends.cudnn.rnn")[kinds.index("tf32")]
        reason = "this torch has one switch for cuDNN's convolutions and recurrent layers, and the other one allows no TF32"
        report.decide("backport", f"{one}.fp32_precision", "float32, though 'tf32' is allowed", reason, user_site())


def _notice() -> None:
    """Take over what ``allow_tf32`` or ``set_float32_matmul_precision`` was set to since, as newer torch does."""
    now = _switches()
    if now["level"] != _seen.get("level", "highest"):
        _given["cuda", "matmul"], _given["mkldnn", "matmul"] = _OF_LEVEL[now["level"]]
    if now["cudnn"] != _seen.get("cudnn", True):
        _given["cuda", "conv"] = _given["cuda", "rnn"] = "tf32" if now["cudnn"] else "none"
    _seen.update(now)


def _remember() -> None:
    _seen.update(_switches())


def _switches() -> dict[str, Any]:
    return {"level": torch.get_float32_matmul_precision(), "cudnn": torch._C._get_cudnn_allow_tf32()}


class _FP32Precision:
    """What stands for an operator of a backend: it has one attribute."""

    def __init__(self, backend: str, op: str) -> None:
        vars(self).update(backend=backend, op=op)

    def __setattr__(self, name: str, value: str) -> None:
        if name != "fp32_precision":
            raise AttributeError("Unknown attribute " + name)
        _set(self.backend, self.op, value)

    def __getattr__(self, name: str) -> str:
        if name != "fp32_precision":
            raise AttributeError("Unknown attribute " + name)
        return _get(self.backend, self.op)


def _attribute(backend: str, operator: str, set_backend: str = "") -> property:
    """The attribute of a module's class; like torch's own, it cannot be set once torch's flags are frozen."""

    def assign(self: Any, value: str) -> None:
        if torch.backends.flags_frozen():
            raise RuntimeError(
                f"not allowed to set {self.__name__} flags after disable_global_flags; "
                "please use flags() context manager instead"
            )
        _set(set_backend or backend, operator, value)

    return property(lambda self: _get(backend, operator), assign)


class _Imported:
    """A module of a package whose class holds this: it is imported when it is first looked up."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, instance: object, owner: type) -> ModuleType:
        return importlib.import_module(self.name)


def _class_of_backends(module_class: type) -> type:
    return type("GenericModule", (module_class,), {"fp32_precision": _attribute("generic", "all")})


def _class_of_rnn(module_class: type) -> type:
    """The class of ``torch.backends.cudnn.rnn`` with the attribute, which torch 2.9 and 2.10 lose when it is imported."""
    if module_class is not ModuleType:
        return module_class
    if _lacks(None):
        attribute = _attribute("cuda", "rnn")
    else:
        read: Any = lambda self: torch._C._get_fp32_precision_getter("cuda", "rnn")  # noqa: E731
        write: Any = lambda self, value: torch._C._set_fp32_precision_setter("cuda", "rnn", value)  # noqa: E731
        attribute = property(read, write)
    return type("CudnnRNNModule", (module_class,), {"fp32_precision": attribute})


def _reading(getter: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    @functools.wraps(getter)
    def read(self: Any, name: str) -> Any:
        return _get("cuda", "matmul") if name == "fp32_precision" else getter(self, name)

    return read


def _writing(setter: Callable[[Any, str, Any], None]) -> Callable[[Any, str, Any], None]:
    @functools.wraps(setter)
    def write(self: Any, name: str, value: Any) -> None:
        if name == "fp32_precision":
            _set("cuda", "matmul", value)
        else:
            setter(self, name, value)

    return write


def _flags(backend: str) -> Callable[[Callable[..., Any] | None], Callable[..., Any]]:
    """``flags``, with `fp32_precision`; all that it sets is as it was afterwards."""

    def with_precision(own: Callable[..., Any] | None) -> Callable[..., Any]:
        @contextmanager
        def flags(*args: Any, fp32_precision: str = "none", **kwargs: Any) -> Iterator[None]:
            with nullcontext() if own is None else own(*args, **kwargs):
                before = dict(_given)
                _set(backend, "all", fp32_precision)
                try:
                    yield
                finally:
                    _given.clear()
                    _given.update(before)
                    _set(backend, "all", before.get((backend, "all"), "none"))

        return flags

    return with_precision


def _lacks(module: ModuleType | None) -> bool:
    return not hasattr(torch._C, "_get_fp32_precision_getter")


BACKPORT = Backport(
    name="fp32_precision",
    summary="the precision of float32 matmuls, convolutions and recurrent layers: fp32_precision of torch.backends and below",
    target="torch.backends",
    since="2.9.0",
    first_forms={"2.9, 2.10": "torch.backends.cudnn.rnn keeps what is assigned to it, and nothing else learns of it"},
    upstream="https://github.com/pytorch/pytorch/blob/v2.9.0/torch/backends/__init__.py",
    differs=(
        "one switch for the matmuls of all devices, so CUDA's 'tf32' allows it on a CPU that has it; cuDNN's convolutions and "
        "recurrent layers compute in TF32 only where both allow it; oneDNN's on a CPU never do, and are refused; the older "
        "allow_tf32 and set_float32_matmul_precision can still be read after this is set; on torch 2.9 and 2.10, whose "
        "torch.backends.cudnn.rnn keeps what is assigned to itself, that alone is mended"
    ),
    replaces={"__class__": _class_of_backends},
    names={"flags": lambda: _flags("generic")(None), "_FP32Precision": lambda: _FP32Precision},
    also=(
        Change("torch.backends.cuda", "cuBLASModule.__getattr__", _reading),
        Change("torch.backends.cuda", "cuBLASModule.__setattr__", _writing),
        Change("torch.backends.cudnn", "__class__.fp32_precision", lambda old: _attribute("cuda", "all"), create=True),
        Change("torch.backends.cudnn", "__class__.conv", lambda old: _FP32Precision("cuda", "conv"), create=True),
        Change("torch.backends.cudnn", "__class__.rnn", lambda old: old or _Imported("torch.backends.cudnn.rnn"), create=True),
        Change("torch.backends.cudnn", "m.flags", _flags("cuda")),
        Change("torch.backends.cudnn.rnn", "__class__", _class_of_rnn, always=True),
        Change(
            "torch.backends.mkldnn", "__class__.fp32_precision", lambda old: _attribute("mkldnn", "all", "generic"), create=True
        ),
        Change("torch.backends.mkldnn", "__class__.matmul", lambda old: _FP32Precision("mkldnn", "matmul"), create=True),
        Change("torch.backends.mkldnn", "__class__.conv", lambda old: _FP32Precision("mkldnn", "conv"), create=True),
        Change("torch.backends.mkldnn", "__class__.rnn", lambda old: _FP32Precision("mkldnn", "rnn"), create=True),
        Change("torch.backends.mkldnn", "m.flags", _flags("mkldnn")),
    ),
    lacks=_lacks,
)
