"""``async_save(…, async_stager=…)``, which returns an ``AsyncSaveResponse`` where the stager copies in background."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torchspan.backports._base import Backport, Change
from torchspan.core.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_PLACE = "torch.distributed.checkpoint.state_dict_saver"


@dataclass
class AsyncSaveResponse:
    """What ``async_save`` returns where staging goes on in background.

    Attributes:
        staging_completion: done when the state is copied, so that the program may change it.
        upload_completion: done when the checkpoint is saved.
    """

    staging_completion: Future[None]
    upload_completion: Future[None]


AsyncSaveResponse.__module__ = _PLACE


@functools.cache
def _with_stager(async_save: Callable[..., Any]) -> Callable[..., Any]:
    """async_save, with `async_stager` and `no_dist`; without them it is torch's own."""
    from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

    def save_with_stager(
        state_dict: dict[str, Any],
        *,
        checkpoint_id: str | os.PathLike[str] | None = None,
        storage_writer: Any = None,
        planner: Any = None,
        process_group: ProcessGroup | None = None,
        async_checkpointer_type: AsyncCheckpointerType = AsyncCheckpointerType.THREAD,
        async_stager: Any = None,
        no_dist: bool = False,
        use_collectives: bool = True,
    ) -> Future[Any] | AsyncSaveResponse:
        options = {
            "checkpoint_id": checkpoint_id,
            "storage_writer": storage_writer,
            "planner": planner,
            "process_group": process_group,
        }
        stager = async_stager or _own_stager(storage_writer)
        if stager is None and not no_dist and use_collectives:
            future: Future[Any] = async_save(state_dict, async_checkpointer_type=async_checkpointer_type, **options)
            return future
        in_process = async_checkpointer_type == AsyncCheckpointerType.PROCESS
        _check_supported(no_dist and in_process, use_collectives, process_group)
        BACKPORT.record_use("async_save(async_stager=…)")
        return _save(state_dict, stager, in_process, {**options, "no_dist": True} if no_dist else options)

    functools.update_wrapper(save_with_stager, async_save)
    del save_with_stager.__wrapped__  # type: ignore[attr-defined] # its signature is its own
    return save_with_stager


def _own_stager(storage_writer: Any) -> Any:
    """The writer, where it stages in a way of its own; torch knows how to use one that blocks."""
    from torch.distributed.checkpoint.staging import AsyncStager, BlockingAsyncStager

    is_own = isinstance(storage_writer, AsyncStager) and not isinstance(storage_writer, BlockingAsyncStager)
    return storage_writer if is_own else None


def _check_supported(is_alone_in_process: bool, use_collectives: bool, process_group: ProcessGroup | None) -> None:
    import torch
    import torch.distributed as dist

    if is_alone_in_process:
        raise UnsupportedError(
            "async_save(no_dist=True) in a process: the process of this torch saves with all ranks; torch has it since "
            "2.9.0; use AsyncCheckpointerType.THREAD"
        )
    if not use_collectives:
        raise UnsupportedError(
            "async_save(use_collectives=False): this torch's save always plans with all ranks; torch has it since 2.9.0; "
            "leave it out, or give each rank a folder of its own and no_dist=True"
        )
    if dist.is_available() and dist.is_initialized():
        group = process_group or dist.group.WORLD
        if torch.device("cpu") not in group._device_types:  # type: ignore[union-attr]
            raise AssertionError(
                "A CPU backend must be enabled for async save; try initializing process group with 'cpu:gloo,cuda:nccl'"
            )


def _save(
    state_dict: dict[str, Any], stager: Any, in_process: bool, options: dict[str, Any]
) -> Future[Any] | AsyncSaveResponse:
    """Stage, begin to save what is staged once it is, and say when both are done."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager
    from torch.distributed.checkpoint.state_dict_saver import _stateful_to_state_dict

    stager = stager or BlockingAsyncStager()
    staged = stager.stage(_stateful_to_state_dict(state_dict))
    upload = (_upload_in_process if in_process else _upload_in_thread)(staged, options)
    if isinstance(staged, Future):
        return AsyncSaveResponse(staging_completion=_completion_of(staged), upload_completion=upload)
    if stager.should_synchronize_after_execute:
        stager.synchronize_staging()
    return upload


def _upload_in_thread(staged: Any, options: dict[str, Any]) -> Future[Any]:
    executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="AsyncCheckpointExecutor")
    upload = executor.submit(_save_staged, staged, options)
    executor.shutdown(wait=False)  # its thread ends with what it was given
    return upload


def _save_staged(staged: Any, options: dict[str, Any]) -> Any:
    from torch.distributed.checkpoint.state_dict_saver import save

    return save(_result(staged), **options)


def _upload_in_process(staged: Any, options: dict[str, Any]) -> Future[Any]:
    from torch.distributed.checkpoint._async_process_executor import _ProcessBasedAsyncCheckpointExecutor

    executor: Any = _ProcessBasedAsyncCheckpointExecutor()
    save = executor._execute_save_impl  # runs in a thread, which can wait for the copy

    def save_staged(*, staged_state_dict: Any, **others: Any) -> Any:
        return save(staged_state_dict=_result(staged_state_dict), **others)

    executor._execute_save_impl = save_staged
    upload: Future[Any] = executor.execute_save(staged, **options)
    return upload


def _result(staged: Any) -> Any:
    return staged.result() if isinstance(staged, Future) else staged


def _completion_of(staged: Future[Any]) -> Future[None]:
    """A Future that is done when `staged` is, with its error if it has one, and does not hold what it holds."""
    completion: Future[None] = Future()

    def tell(staged: Future[Any]) -> None:
        error = None if staged.cancelled() else staged.exception()
        if staged.cancelled():
            completion.cancel()
        elif error is None:
            completion.set_result(None)
        else:
            completion.set_exception(error)

    staged.add_done_callback(tell)
    return completion


_PACKAGE = "torch.distributed.checkpoint"  # whose own name for async_save is bound when it is imported: both are changed then

BACKPORT = Backport(
    name="async_save",
    summary="async_save(async_stager=…) and its AsyncSaveResponse",
    target=_PLACE,
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/156207",
    differs=(
        "no use_collectives=False, and no no_dist=True in a process; a copy that failed at once fails staging_completion; "
        "torch 2.8's process for checkpoints ends with the first one that it cannot save"
    ),
    names={"AsyncSaveResponse": lambda: AsyncSaveResponse},
    also=(
        Change(_PACKAGE, "async_save", _with_stager),
        Change(_PACKAGE, "state_dict_saver.async_save", _with_stager),
    ),
)
