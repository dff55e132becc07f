"""What to write instead of a call that only CUDA has: by name, and honest where there is nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

HERE = 'str(torch.accelerator.current_accelerator(check_available=True) or "cpu")'
"""The best device here, as text: it stands where ``"cuda"`` stood, and works wherever that did."""
HERE_DEVICE = 'torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")'
KIND = "torch.device(device).type"
MODULE = "torch.get_device_module(device)"
IS_HERE = "torch.accelerator.is_available()"
BACKEND = "torch.distributed.get_default_backend_for_device(device)"
"""These name `device`; a file in which that is something else is given another word for it."""
WORDS = ("device", "device_here", "torch_device_here")
"""What the device is called in portable lines: the first that holds one, or is free."""

Shape = Literal["rename", "guard", "figure", "count", "typed", "none"]


@dataclass(frozen=True)
class Rule:
    """How a call is made portable.

    `shape` is ``rename``: the same call by the name `to`; ``guard``: the same, as a statement, where there is an accelerator;
    ``figure``: the same, and 0 where there is none; ``count``: the same, and 1 where there is none; ``typed``: the same by the
    name `to`, given the kind of device; ``none``: there is no line that works everywhere. `note` says what is to be known.
    """

    shape: Shape
    to: str = ""
    note: str = ""


SINCE_29 = "torch.accelerator has it since torch 2.9"
STREAM = "torch.get_device_module gives torch.cuda, torch.xpu or torch.cpu; torch.mps has no streams"
ONLY_CUDA = "No counterpart on every device: keep it under 'if torch.cuda.is_available():'"
SEED = "torch.manual_seed seeds every device: where it was called with this seed, this line can go"
RANDOM = "torch.get_rng_state is the CPU's; torch.random.fork_rng(device_type=…) keeps those of both, whichever device it is"
EVENT = (
    "The CPU has no events: torch.Event(enable_timing=True) is every accelerator's; "
    "or measure time.perf_counter() after torch.accelerator.synchronize()"
)
GRAPH = "No counterpart on the CPU: torch.compile(mode='reduce-overhead') records graphs where there are graphs"
RANGES = "torch.profiler.record_function('name') marks a range for every device"
STAYS = "May stay: it sets what only CUDA reads, and changes nothing elsewhere"
LEGACY = "An old type: give dtype=… and device=device to torch.tensor, torch.empty or .to"
ASKS = f'Asks for CUDA by name: where any accelerator will do, compare with "cpu" or ask {IS_HERE}'
ASSERTS = "Refuses to run without an accelerator: leave the line out where the CPU will do"
REFUSES = "Ends the program without an accelerator: leave it out where the CPU will do"
PINNED = "Pinned memory needs an accelerator: without one, pin_memory() is an error"
HANDED_ON = "Handed on, not called here: port the place that calls it"
IN_A_LIST = "Names CUDA in a list: name what is there, such as device, in its place"
FORK = "Without an accelerator, fork_rng keeps the state of the CPU's generator alone"
VERSION = "None where torch was built without CUDA: ask for that before it is read"
DRIVER = "nvidia-smi is of NVIDIA's driver: run it where shutil.which('nvidia-smi') finds it"
COMPILER = "Its source is for NVIDIA's compiler: build its C++ sources alone, or write it with torch's operators"
IMPORT = (
    "{package} is of use with NVIDIA's driver alone: import it under 'if torch.cuda.is_available():', with another way beside"
)
UNREADABLE = "The portable form would be no Python here: port it by hand"

STREAM_METHODS = ("wait_stream", "wait_event", "record_event")
"""What ``torch.cpu.Stream`` has."""

CALLS: dict[str, Rule] = {
    "is_available": Rule("rename", "torch.accelerator.is_available"),
    "device_count": Rule("count", "torch.accelerator.device_count"),
    "synchronize": Rule("guard", "torch.accelerator.synchronize"),
    "set_device": Rule("guard", "torch.accelerator.set_device_index"),
    "current_device": Rule("figure", "torch.accelerator.current_device_index"),
    "current_stream": Rule("rename", f"{MODULE}.current_stream", STREAM),
    "Stream": Rule("rename", f"{MODULE}.Stream", STREAM),
    "stream": Rule("rename", f"{MODULE}.stream", STREAM),
    "manual_seed": Rule("rename", "torch.manual_seed", SEED),
    "manual_seed_all": Rule("rename", "torch.manual_seed", SEED),
    "empty_cache": Rule("guard", "torch.accelerator.empty_cache", SINCE_29),
    "reset_peak_memory_stats": Rule("guard", "torch.accelerator.reset_peak_memory_stats", SINCE_29),
    "reset_max_memory_allocated": Rule("guard", "torch.accelerator.reset_peak_memory_stats", SINCE_29),
    "memory_allocated": Rule("figure", "torch.accelerator.memory_allocated", SINCE_29),
    "max_memory_allocated": Rule("figure", "torch.accelerator.max_memory_allocated", SINCE_29),
    "memory_reserved": Rule("figure", "torch.accelerator.memory_reserved", SINCE_29),
    "max_memory_reserved": Rule("figure", "torch.accelerator.max_memory_reserved", SINCE_29),
    "amp.autocast": Rule("typed", "torch.autocast"),
    "amp.GradScaler": Rule("typed", "torch.amp.GradScaler"),
    "amp.custom_fwd": Rule("typed", "torch.amp.custom_fwd"),
    "amp.custom_bwd": Rule("typed", "torch.amp.custom_bwd"),
    "nvtx.range": Rule("rename", "torch.profiler.record_function"),
    "Event": Rule("none", note=EVENT),
    "CUDAGraph": Rule("none", note=GRAPH),
    "graph": Rule("none", note=GRAPH),
    "make_graphed_callables": Rule("none", note=GRAPH),
    "nvtx": Rule("none", note=RANGES),
    "get_rng_state": Rule("none", note=RANDOM),
    "set_rng_state": Rule("none", note=RANDOM),
    "get_rng_state_all": Rule("none", note=RANDOM),
    "set_rng_state_all": Rule("none", note=RANDOM),
    "get_device_name": Rule("none", note=f"{ONLY_CUDA} (torch.xpu has it too)"),
    "device": Rule(
        "none", note="torch.accelerator.device_index(…) is every accelerator's; the CPU has one device: leave it out there"
    ),
    "mem_get_info": Rule(
        "none", note="torch.accelerator.get_memory_info is every accelerator's in newer torch; the CPU has none"
    ),
}
"""By the name in ``torch.cuda``. A name that is not here has no counterpart."""

_TYPES = ("Float", "Double", "Half", "BFloat16", "Byte", "Char", "Short", "Int", "Long", "Bool")
CALLS |= {f"{name}Tensor": Rule("none", note=LEGACY) for name in _TYPES}

SAME = {
    "torch.amp.autocast": "torch.autocast",
    "torch.amp.autocast_mode.autocast": "torch.autocast",
    "torch.cuda.amp.autocast_mode.autocast": "torch.cuda.amp.autocast",
    "torch.cuda.amp.grad_scaler.GradScaler": "torch.cuda.amp.GradScaler",
    "torch.amp.grad_scaler.GradScaler": "torch.amp.GradScaler",
    "torch.cuda.streams.Stream": "torch.cuda.Stream",
    "torch.cuda.streams.Event": "torch.cuda.Event",
    "torch.cuda.random.manual_seed_all": "torch.cuda.manual_seed_all",
}
"""Other names of the same."""

TAKES_KIND = frozenset(
    (
        "torch.autocast",
        "torch.amp.GradScaler",
        "torch.amp.custom_fwd",
        "torch.amp.custom_bwd",
        "torch.amp.is_autocast_available",
        "torch.set_autocast_dtype",
        "torch.set_autocast_enabled",
        "torch.distributed.init_device_mesh",
        "torch.distributed.device_mesh.init_device_mesh",
        "torch.distributed.device_mesh.DeviceMesh",
        "torch.distributed.DeviceMesh",
        "torch.distributed.tensor.DeviceMesh",
        "torch.get_autocast_dtype",
        "torch.is_autocast_enabled",
        "torch.random.fork_rng",
    )
)
"""What takes the kind of a device (``"cuda"``), and no device."""

SUBJECT_NOTES = (
    ("sdpa_kernel(", "Name MATH beside it: sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]) takes what is there"),
    ("torch.jit.load", "Give map_location=device"),
    ("the kernel of ", "A CUDA kernel: give the operator one for the CPU, or call a torch operation in its place"),
    (
        "torch.cuda.get_device_capability",
        "Ask for what the answer is used for: torch.get_autocast_dtype(device_type) for a dtype",
    ),
    ("torch.distributed.barrier(device_ids)", "Leave device_ids out: init_process_group(device_id=…) says it once"),
    ("torch.distributed.", "Leave the device out where there is none: gloo takes none"),
    ("nvidia-smi", DRIVER),
    ("torch.utils.cpp_extension.", COMPILER),
)
"""By the beginning of what was asked for: a word to those lines for which no other note says it, each of them work by hand."""
