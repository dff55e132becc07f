"""What CUDA has and the device in its place lacks: emulated where that is simple, else refused.

A refusal names the line of the program, the reason, and what to do instead. What torch's own code asks for is left to torch.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from functools import partial, wraps
from typing import Any, NoReturn

import torch

from torchspan.core.errors import UnsupportedError
from torchspan.core.topics import Standing, Topic
from torchspan.devices._callers import asked_by_torch, is_torchs
from torchspan.devices._memories import DEVICE, HOST, mark
from torchspan.devices._redirect import Redirection
from torchspan.devices._wrap import Function, stand_ins
from torchspan.environment.patch import Patch, Redefinition, Replacement

_KERNEL = (
    "its source is for NVIDIA's compiler",
    "write it with torch's operators and torch.compile, which makes kernels for any",
)
_METAL = ("its source is for Apple's compiler", "write it with torch's operators; torch.compile makes kernels of them")
_SHARED = (
    "there is no memory of a GPU to share",
    "share CPU tensors: Tensor.share_memory_(), or torch.multiprocessing's queues",
)
_ALLOCATOR = (
    "there is no GPU whose memory it would give out",
    "leave it out where torch.cuda.is_available() is not to be true",
)
_STORAGE = (
    "there is no memory of a GPU to read files into",
    "torch.load(mmap=True) or UntypedStorage.from_file read into memory",
)
_GREEN = ("there are no multiprocessors to divide", "leave it out: work is done when it is asked for, on all cores")
_TUNING = ("there are no libraries of a GPU to choose kernels from", "leave it out: the CPU's library chooses by itself")
_SENSOR = ("NVIDIA's driver is what reads it", "leave it out; psutil has figures of the processor")
_BLAS = ("there is no cuBLAS here", "leave it out: it is for your own CUDA libraries")
_SOLVER = ("there is no cuSOLVER here", "leave it out: it is for your own CUDA libraries")
_NCCL = ("NCCL is for CUDA devices", "torch.distributed with the backend 'gloo' works here, and 'nccl' is given it")

REFUSED = {
    ("torch.cuda.jiterator", "_JittedFunction.__call__"): _KERNEL,
    ("torch.cuda", "_compile_kernel"): _KERNEL,
    ("torch", "UntypedStorage._share_cuda_"): _SHARED,
    ("torch", "UntypedStorage._new_shared_cuda"): _SHARED,
    ("torch.cuda.memory", "CUDAPluggableAllocator.__new__"): _ALLOCATOR,
    ("torch.cuda.memory", "change_current_allocator"): _ALLOCATOR,
    ("torch.cuda.memory", "caching_allocator_alloc"): _ALLOCATOR,
    ("torch.cuda.memory", "caching_allocator_delete"): _ALLOCATOR,
    ("torch.cuda", "current_blas_handle"): _BLAS,
    ("torch.cuda", "current_solver_handle"): _SOLVER,
    ("torch.cuda", "temperature"): _SENSOR,
    ("torch.cuda", "power_draw"): _SENSOR,
    ("torch.cuda", "clock_rate"): _SENSOR,
    ("torch.cuda.gds", "gds_register_buffer"): _STORAGE,
    ("torch.cuda.gds", "gds_deregister_buffer"): _STORAGE,
    ("torch.cuda.gds", "GdsFile.__new__"): _STORAGE,
    ("torch.cuda.green_contexts", "GreenContext.create"): _GREEN,
    ("torch.cuda.green_contexts", "SMPartition.from_device"): _GREEN,
    ("torch.cuda.tunable", "tune_gemm_in_file"): _TUNING,
    ("torch.cuda.tunable", "mgpu_tune_gemm_in_file"): _TUNING,
    ("torch.cuda.nccl", "unique_id"): _NCCL,
    ("torch.cuda.nccl", "init_rank"): _NCCL,
    ("torch.mps", "compile_shader"): _METAL,
    ("torch.mps", "load_metallib"): _METAL,
}
"""Why each has no counterpart, and what to do."""


def patches(redirection: Redirection) -> Iterable[Patch]:
    """What is refused, and what one device can do of what is for several."""
    for (module, name), (reason, remedy) in REFUSED.items():
        if module == "torch.mps" and "mps" not in redirection.kinds:
            continue
        refusing = partial(_refusing, redirection, f"{module}.{name}", reason, remedy)
        yield (Replacement if "." in name else Redefinition)("no_counterpart", module, name, refusing)
    for name in ("load", "load_inline", "CUDAExtension"):
        extension = partial(_extension, redirection, name)
        yield Replacement("no_counterpart", "torch.utils.cpp_extension", name, extension, follow=True)
    yield Replacement("no_counterpart", "triton.runtime.jit", "JITFunction.run", partial(_kernel, redirection))
    yield Replacement("no_counterpart", "torch.cuda.memory", "MemPool.__new__", partial(_new_pool, redirection))
    yield from stand_ins("no_counterpart", "torch.cuda.tunable", _tunable(redirection))
    yield from stand_ins("no_counterpart", "torch.nn.parallel.comm", _comm(redirection))
    yield from stand_ins("no_counterpart", "torch.cuda.nccl", _nccl(redirection))


# refusals


def refuse(redirection: Redirection, name: str, reason: str, remedy: str, cause: Exception | None = None) -> NoReturn:
    """Record that `name` cannot be given here, and raise.

    Raises:
        UnsupportedError: always.
    """
    site = _site()
    redirection.report.decide(Topic.DEVICE, name, "refused", reason, site, Standing.UNSUPPORTED)
    raise UnsupportedError(f"{site}: {name}: {reason}; {remedy}") from cause


def _site() -> str:
    """``file:line`` of the program: of the nearest code that is neither torch's nor Triton's nor torchspan's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and is_torchs(frame.f_globals, frame.f_code):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _refusing(redirection: Redirection, name: str, reason: str, remedy: str, old: Any) -> Any:
    subject = name.removesuffix(".__new__").removesuffix(".__call__")
    call = getattr(old, "__func__", old)

    @wraps(call)
    def refused(*args: Any, **kwargs: Any) -> Any:
        if asked_by_torch():
            return call(*args, **kwargs)
        refuse(redirection, subject, reason, remedy)

    is_of_class = isinstance(old, (staticmethod, classmethod)) or name.endswith((".__new__", ".create", ".from_device"))
    return staticmethod(refused) if is_of_class else refused


def _extension(redirection: Redirection, name: str, old: Function) -> Function:
    """CUDA sources need NVIDIA's compiler; where it is, the extension is built as torch builds it."""

    @wraps(old)
    def build(*args: Any, **kwargs: Any) -> Any:
        from torch.utils import cpp_extension

        sources = kwargs.get("sources", args[1] if name == "load" and len(args) > 1 else ())
        sources = [sources] if isinstance(sources, str) else sources
        is_cuda = name == "CUDAExtension" or kwargs.get("with_cuda") or kwargs.get("cuda_sources")
        is_cuda = is_cuda or (name == "load" and any(str(source).endswith((".cu", ".cuh")) for source in sources))
        is_cuda = is_cuda or (name == "load_inline" and len(args) > 2 and args[2])
        if is_cuda and cpp_extension.CUDA_HOME is None:
            remedy = "build its C++ sources alone (CppExtension, cpp_sources), or write it with torch's operators"
            refuse(redirection, f"torch.utils.cpp_extension.{name}", "there is no CUDA compiler here", remedy)
        return old(*args, **kwargs)

    return build


def _kernel(redirection: Redirection, old: Any) -> Function:
    @wraps(old)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _has_triton_driver():
            name = f"the Triton kernel {getattr(self, '__name__', self)}"
            remedy = "TRITON_INTERPRET=1, set before it is defined, runs it on the CPU, slowly; torch's operators run fast"
            refuse(redirection, name, "Triton has no driver for a device that is here", remedy)
        return old(self, *args, **kwargs)

    return run


def _has_triton_driver() -> bool:
    """Whether a backend of Triton says so; it asks torch.cuda, which tells it the truth."""
    from triton.backends import backends

    return any(backend.driver.is_active() for backend in backends.values())


# one device for many


class Pool:
    """A stand-in for ``torch.cuda.MemPool``, which it says it is an instance of: a number; memory is not pooled."""

    _numbers = itertools.count(1)

    def __init__(self, allocator: Any = None) -> None:
        self.allocator = allocator
        self.id = (0, next(self._numbers))

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return torch.cuda.MemPool

    def use_count(self) -> int:
        """Who holds it: its maker."""
        return 1

    def snapshot(self, include_traces: bool = True) -> list[Any]:
        """No segments."""
        return []


def _new_pool(redirection: Redirection, old: object) -> staticmethod[..., Pool]:
    def new(cls: type, allocator: Any = None, *args: Any, **kwargs: Any) -> Pool:
        redirection.simulate("torch.cuda.MemPool()", "a number: memory is not pooled")
        return Pool(allocator)

    return staticmethod(new)


def _tunable(redirection: Redirection) -> dict[str, Function]:
    switches = {
        "enable": "is_enabled",
        "tuning_enable": "tuning_is_enabled",
        "record_untuned_enable": "record_untuned_is_enabled",
        "wildcard_fallback_enable": "wildcard_fallback_is_enabled",
    }
    settings = {"max_tuning_duration": 30, "max_tuning_iterations": 100, "rotating_buffer_size": 0, "filename": ""}
    kept: dict[str, Any] = {**dict.fromkeys(switches, False), **settings, "tuning_enable": True}

    def setter(name: str, key: str) -> Function:
        def remember(value: Any = True, *args: Any, **kwargs: Any) -> None:
            redirection.simulate_for_program(f"torch.cuda.tunable.{name}()", "remembered: there is nothing to tune")
            kept[key] = next(iter(kwargs.values()), value)

        return remember

    def getter(key: str) -> Function:
        return lambda: kept[key]

    def nothing(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        return ()

    def no_file(filename: str | None = None) -> bool:
        return False

    functions = {name: setter(name, name) for name in switches} | {is_on: getter(name) for name, is_on in switches.items()}
    functions |= {f"set_{key}": setter(f"set_{key}", key) for key in settings} | {f"get_{key}": getter(key) for key in settings}
    return {**functions, "get_results": nothing, "get_validators": nothing, "read_file": no_file, "write_file": no_file}


def _comm(redirection: Redirection) -> dict[str, Function]:
    def counted(name: str) -> None:
        redirection.simulate_for_program(f"torch.cuda.comm.{name}()", "one device stands in for all: copies on it")

    def placed(tensor: torch.Tensor, destination: Any) -> torch.Tensor:
        device = redirection.lookup("cuda" if destination is None else destination)
        result: torch.Tensor = mark(tensor, HOST if device is None else DEVICE)
        return result

    def broadcast(tensor: Any, devices: Any = None, *, out: Any = None) -> tuple[torch.Tensor, ...]:
        counted("broadcast")
        if (devices is None) == (out is None):
            raise RuntimeError(f"Exactly one of 'devices' and 'out' must be specified, but got devices={devices} and out={out}")
        if out is not None:
            return tuple(each.copy_(tensor) for each in out)
        return tuple(placed(tensor.clone(), device) for device in devices)

    def broadcast_coalesced(tensors: Any, devices: Any, buffer_size: int = 10485760) -> list[list[torch.Tensor]]:
        counted("broadcast_coalesced")
        return [[placed(tensor.clone(), device) for tensor in tensors] for device in devices]

    def reduce_add(inputs: Any, destination: Any = None) -> torch.Tensor:
        counted("reduce_add")
        if any(each.shape != inputs[0].shape for each in inputs):
            raise ValueError(f"inputs are of different shapes: {[tuple(each.shape) for each in inputs]}; expected one shape")
        return placed(sum(inputs[1:], inputs[0].clone()), destination)

    def reduce_add_coalesced(inputs: Any, destination: Any = None, buffer_size: int = 10485760) -> tuple[torch.Tensor, ...]:
        return tuple(reduce_add(each, destination) for each in zip(*inputs))

    def scatter(
        tensor: Any, devices: Any = None, chunk_sizes: Any = None, dim: int = 0, streams: Any = None, *, out: Any = None
    ) -> tuple[torch.Tensor, ...]:
        counted("scatter")
        if out is not None:
            parts = tensor.split([each.shape[dim] for each in out], dim)
            return tuple(each.copy_(part) for each, part in zip(out, parts))
        parts = tensor.chunk(len(devices), dim) if chunk_sizes is None else tensor.split(list(chunk_sizes), dim)
        return tuple(placed(part.clone(), device) for part, device in zip(parts, devices))

    def gather(tensors: Any, dim: int = 0, destination: Any = None, *, out: Any = None) -> torch.Tensor:
        counted("gather")
        return torch.cat(list(tensors), dim, out=out) if out is not None else placed(torch.cat(list(tensors), dim), destination)

    local = locals()
    return {name: function for name, function in local.items() if name not in ("redirection", "counted", "placed")}


_SUM, _PRODUCT, _MAX, _MIN, _MEAN = range(5)  # as NCCL numbers them


def _reduced(tensors: Any, op: int) -> torch.Tensor:
    stacked = torch.stack(list(tensors))
    reductions = {_SUM: stacked.sum, _PRODUCT: stacked.prod, _MAX: stacked.amax, _MIN: stacked.amin, _MEAN: stacked.mean}
    return reductions[op](0)  # type: ignore[operator]


def _nccl(redirection: Redirection) -> dict[str, Function]:
    """The collectives over tensors of one process, each of which the program believes to be on a device of its own."""

    def counted(name: str) -> None:
        redirection.simulate(f"torch.cuda.nccl.{name}()", "one device stands in for all: computed on it, without NCCL")

    def all_reduce(inputs: Any, outputs: Any = None, op: int = _SUM, streams: Any = None, comms: Any = None) -> None:
        counted("all_reduce")
        total = _reduced(inputs, op)
        for each in inputs if outputs is None else outputs:
            each.copy_(total)

    def reduce(inputs: Any, output: Any = None, root: int = 0, op: int = _SUM, *args: Any, outputs: Any = None) -> None:
        counted("reduce")
        target = output if outputs is None else outputs
        target = inputs if target is None else target
        (target if isinstance(target, torch.Tensor) else target[root]).copy_(_reduced(inputs, op))

    def broadcast(inputs: Any, root: int = 0, streams: Any = None, comms: Any = None) -> None:
        counted("broadcast")
        for each in inputs:
            each.copy_(inputs[root])

    def all_gather(inputs: Any, outputs: Any, streams: Any = None, comms: Any = None) -> None:
        counted("all_gather")
        for each in outputs:
            each.copy_(torch.cat([part.flatten() for part in inputs]).view_as(each))

    def reduce_scatter(inputs: Any, outputs: Any, op: int = _SUM, streams: Any = None, comms: Any = None) -> None:
        counted("reduce_scatter")
        for each, part in zip(outputs, _reduced(inputs, op).flatten().chunk(len(outputs))):
            each.copy_(part.view_as(each))

    def is_available(tensors: Any) -> bool:
        return False

    local = locals()
    return {name: function for name, function in local.items() if name not in ("redirection", "counted")}
