"""``torch.distributed.checkpoint.staging.DefaultStager`` and ``StagingOptions``: a copy of the state, made in background."""

from __future__ import annotations

import copy
import warnings
import weakref
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import WeakIdKeyDictionary

from torchspan.backports._base import Backport

_PLACE = "torch.distributed.checkpoint.staging"


@dataclass
class StagingOptions:
    """How a state is staged.

    Attributes:
        use_pinned_memory: copy to pinned memory, which a GPU copies to faster; ignored, with a warning, without CUDA.
        use_shared_memory: copy to memory that another process can use without a copy of its own.
        use_async_staging: copy in a background thread (and, on an accelerator, on a stream of its own).
        use_non_blocking_copy: give all copies to the accelerator and wait once; an AssertionError without one.
    """

    use_pinned_memory: bool = True
    use_shared_memory: bool = True
    use_async_staging: bool = True
    use_non_blocking_copy: bool = True


class DefaultStager:
    """Copies a state dict to the CPU, in the background if asked, to memory that the next copy uses again.

    A copy is valid until the next one is made. It is one thread's: calls from several at once need a lock of their own.

    Args:
        config: how it is done.
    """

    _synchronize_after_execute = True

    def __init__(self, config: StagingOptions = StagingOptions()) -> None:  # noqa: B008 # upstream's signature
        self._config = config
        self._state_dict_stager = _Copies(config.use_pinned_memory, config.use_shared_memory)
        self._staging_executor: ThreadPoolExecutor | None = None
        self._staging_stream: torch.Stream | None = None
        self._staging_future: Future[dict[str, Any]] | None = None
        has_accelerator = torch.accelerator.is_available()
        if config.use_async_staging:
            self._staging_executor = ThreadPoolExecutor(max_workers=1)
            if has_accelerator:
                self._staging_stream = torch.Stream()
        if config.use_non_blocking_copy and not has_accelerator:
            raise AssertionError("Non-blocking copy requires that the current accelerator is available.")

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Whether ``async_save`` waits for the copy, where it is not a Future, before it returns."""
        return self._synchronize_after_execute

    def stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any] | Future[dict[str, Any]]:
        """Copy `state_dict`: the copy, or with `use_async_staging` its Future; until that is done, change no tensor in it."""
        if self._staging_executor is None:
            return self._stage(state_dict, **kwargs)
        if self._staging_stream is not None:  # what the caller's stream has still to compute comes first
            self._staging_stream.wait_stream(torch.accelerator.current_stream())
        self._staging_future = self._staging_executor.submit(self._stage, state_dict, **kwargs)
        return self._staging_future

    def _stage(self, state_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        non_blocking = self._config.use_non_blocking_copy
        with self._staging_stream or nullcontext():
            copied = self._state_dict_stager.copy(state_dict, non_blocking)
        if non_blocking:
            (self._staging_stream or torch.accelerator).synchronize()
        return copied

    def synchronize_staging(self) -> None:
        """Wait for the copy that was begun last."""
        if self._staging_future is not None:
            self._staging_future.result()

    def close(self) -> None:
        """Wait for the copy that is being made, end the thread, and let the memory go; for after the last one."""
        if self._staging_executor is not None:
            self._staging_executor.shutdown(wait=True)
        self._state_dict_stager.forget()


class _Copies:
    """Copies of nested values with their tensors on the CPU; a storage that was copied before is copied to the same place."""

    def __init__(self, pin_memory: bool, share_memory: bool) -> None:
        if pin_memory and not torch.cuda.is_available():
            warnings.warn("pinned memory needs CUDA, which is not available: staging without it", stacklevel=3)
        self._pin_memory = pin_memory and torch.cuda.is_available()
        self._share_memory = share_memory
        self._places = WeakIdKeyDictionary()  # the CPU storage for each storage, as long as that is there

    def forget(self) -> None:
        """Let go of the places, so that their memory is freed with the last copy that lies there."""
        self._places.clear()

    @torch.no_grad()
    def copy(self, value: Any, non_blocking: bool) -> Any:
        """A copy of `value`, in which what was one object (or storage) is one again."""
        return _Copy(self, non_blocking).copy(value)

    def place_for(self, storage: UntypedStorage) -> UntypedStorage:
        """The CPU storage to copy `storage` to."""
        place: UntypedStorage | None = self._places.get(storage)
        if place is None or place.nbytes() != storage.nbytes():
            place = self._places[storage] = self._new_storage(storage.nbytes())
        return place

    def _new_storage(self, num_bytes: int) -> UntypedStorage:
        if not self._share_memory:
            pin = self._pin_memory and num_bytes > 0
            return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=pin).untyped_storage()
        place: UntypedStorage = UntypedStorage._new_shared(num_bytes, device="cpu")
        if self._pin_memory and num_bytes:
            from torch.cuda._pin_memory_utils import pin_memory, unpin_memory

            pin_memory(place.data_ptr(), num_bytes)
            # at exit CUDA's context is gone, and with it the registration
            weakref.finalize(place, unpin_memory, place.data_ptr()).atexit = False  # type: ignore[misc]
        return place


class _Copy:
    """One copy that is being made. `memo` is as `copy.deepcopy` keeps it, which copies what is no container and no tensor."""

    def __init__(self, copies: _Copies, non_blocking: bool) -> None:
        self._copies = copies
        self._non_blocking = non_blocking
        self._memo: dict[int, Any] = {}
        self._alive: list[Any] = []  # so that no id is used twice

    def copy(self, value: Any) -> Any:
        """The copy of `value`: that which was made before, if there is one."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, Tensor):
            return self._remember(value, self._copy_tensor(value))
        if isinstance(value, dict):
            copied = self._remember(value, copy.copy(value))
            for key, item in tuple(copied.items()):
                copied[key] = self.copy(item)
            return copied
        if isinstance(value, list):
            copied = self._remember(value, copy.copy(value))
            copied[:] = [self.copy(item) for item in value]
            return copied
        if isinstance(value, tuple):
            return self._copy_tuple(value)
        return copy.deepcopy(value, self._memo)

    def _remember(self, value: Any, copied: Any) -> Any:
        self._memo[id(value)] = copied
        self._alive.append(value)
        return copied

    def _copy_tuple(self, value: tuple[Any, ...]) -> tuple[Any, ...]:
        items = [self.copy(item) for item in value]
        if all(item is before for item, before in zip(items, value, strict=True)):
            return value
        make = getattr(value, "_make", type(value))  # a named tuple's constructor takes the items one by one
        return self._memo.get(id(value)) or self._remember(value, make(items))

    def _copy_tensor(self, tensor: Tensor) -> Tensor:
        from torch.distributed._functional_collectives import AsyncCollectiveTensor
        from torch.distributed._shard.sharded_tensor.api import ShardedTensor

        if isinstance(tensor, ShardedTensor):
            return self._copy_sharded(tensor)
        if isinstance(tensor, AsyncCollectiveTensor):
            return self._copy_tensor(tensor.trigger_wait())
        tensor = tensor.detach()
        if hasattr(tensor, "__tensor_flatten__"):  # a DTensor, or another that is made of tensors
            names, context = tensor.__tensor_flatten__()
            parts = {name: self.copy(getattr(tensor, name)) for name in names}
            return type(tensor).__tensor_unflatten__(parts, context, tensor.size(), tensor.stride())  # type: ignore[attr-defined]
        if tensor.layout is not torch.strided or tensor.is_quantized:  # it has no storage of its own
            return tensor.to("cpu", copy=True)
        return self._copy_strided(tensor.resolve_conj().resolve_neg())

    def _copy_strided(self, tensor: Tensor) -> Tensor:
        copied = tensor.new_empty(0, device="cpu")
        storage = self._copy_storage(tensor.untyped_storage())
        copied.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
        if type(tensor) is not Tensor:
            vars(copied).update({name: self.copy(value) for name, value in vars(tensor).items()})
        return copied

    def _copy_storage(self, storage: UntypedStorage) -> UntypedStorage:
        if id(storage) not in self._memo:
            place = self._remember(storage, self._copies.place_for(storage))
            place.copy_(storage, non_blocking=self._non_blocking)
        place = self._memo[id(storage)]
        assert isinstance(place, UntypedStorage)
        return place

    def _copy_sharded(self, tensor: Tensor) -> Tensor:
        from torch.distributed._state_dict_utils import _copy_state_dict, _create_cpu_state_dict

        copied = _copy_state_dict({"it": tensor}, _create_cpu_state_dict({"it": tensor}))["it"]
        assert isinstance(copied, Tensor)
        return copied


for _public in (StagingOptions, DefaultStager):
    _public.__module__ = _PLACE

BACKPORT = Backport(
    name="checkpoint_staging",
    summary="DefaultStager and StagingOptions: a checkpoint's copy of the state, made in background",
    target=_PLACE,
    since="2.9.0",
    first_forms={"2.11, 2.12": "cannot copy a class whose metaclass is not type"},
    upstream="https://github.com/pytorch/pytorch/pull/156207",
    differs=(
        "the stream of an asynchronous copy waits for what the caller's stream has still to do; tensors inside other objects "
        "than dicts, lists, tuples and tensors are copied on their own device"
    ),
    names={"StagingOptions": lambda: StagingOptions, "DefaultStager": lambda: DefaultStager},
)
