"""``HuggingFaceStorageWriter`` and ``HuggingFaceStorageReader``: each rank writes its shards, which are made whole after."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

import torch

from torchspan.backports import _safetensors
from torchspan.backports._base import Backport
from torchspan.environment.scope import Environment

_SHARDED_FOLDER = "sharded"  # where shards are when they are consolidated


class _BackportHere:
    """In a pickled writer, this puts the backport in force where it is loaded, such as the process that saves in background."""

    def __reduce__(self) -> tuple[Callable[[], object], tuple[()]]:
        return _put_in_force, ()


def _put_in_force() -> _BackportHere:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

    if "save_distributed" not in _parameters(HuggingFaceStorageWriter):
        Environment(BACKPORT.patches()).activate()
    return _BackportHere()


def _with_distributed(init: Callable[..., None]) -> Callable[..., None]:
    """The writer's constructor, for shards that each rank writes; it takes what this torch's own does, too."""

    def construct(
        self: Any,
        path: str,
        fqn_to_index_mapping: dict[str, int] | None = None,
        thread_count: int = 1,
        save_distributed: bool = False,
        enable_consolidation: bool = False,
        thread_count_consolidation: int = 1,
        *,
        token: str | None = None,
        save_sharded: bool = False,
    ) -> None:
        if not isinstance(thread_count, int):  # torch 2.8's third argument is the token
            token, thread_count = thread_count, 1
        init(self, path, fqn_to_index_mapping, token, save_distributed or save_sharded)
        self.thread_count = thread_count
        self.fqn_to_index_mapping = fqn_to_index_mapping
        self.save_distributed = save_distributed
        self.enable_consolidation = enable_consolidation
        self.thread_count_consolidation = thread_count_consolidation
        self.consolidated_output_path = None
        self._backport = _BackportHere()
        if enable_consolidation:
            self.consolidated_output_path = str(self.path)
            self.path = self.fs.concat_path(self.path, _SHARDED_FOLDER)
        if save_distributed:
            BACKPORT.record_use(f"HuggingFaceStorageWriter(save_distributed=True, enable_consolidation={enable_consolidation})")

    functools.update_wrapper(construct, init)
    del construct.__wrapped__  # type: ignore[attr-defined] # its signature is its own
    return construct


def _with_consolidation(finish: Callable[..., None]) -> Callable[..., None]:
    """The writer's last step, in which one rank makes the shards whole if that was asked for."""

    @functools.wraps(finish)
    def finish_and_consolidate(self: Any, metadata: Any, results: Any) -> None:
        if not getattr(self, "enable_consolidation", False) or not self.save_distributed:
            finish(self, metadata, results)
            return
        indices = self.fqn_to_index_mapping or dict.fromkeys(metadata.state_dict_metadata, 1)
        _safetensors.consolidate(str(self.path), self.consolidated_output_path, indices, self.thread_count_consolidation)

    return finish_and_consolidate


def _with_threads(init: Callable[..., None]) -> Callable[..., None]:
    """The reader's constructor, with the number of files to read at a time; it takes what this torch's own does, too."""

    def construct(self: Any, path: str, thread_count: int = 1, *, token: str | None = None) -> None:
        if not isinstance(thread_count, int):  # torch 2.8's second argument is the token
            token, thread_count = thread_count, 1
        init(self, path, token)
        self.thread_count = thread_count

    functools.update_wrapper(construct, init)
    del construct.__wrapped__  # type: ignore[attr-defined] # its signature is its own
    return construct


def _reading_slices(read_data: Callable[..., Any]) -> Callable[..., Any]:
    """The reader's way to tensors, which reads only what is asked for; remote files as this torch does."""

    @functools.wraps(read_data)
    def read(self: Any, plan: Any, planner: Any) -> Any:
        if "://" in str(self.path):
            return read_data(self, plan, planner)
        return _safetensors.read_data(self, plan, functools.partial(_read_item, planner))

    return read


def _read_item(planner: Any, file: Any, item: Any) -> None:
    _safetensors.give(planner, item, _safetensors.read_box(file, item.storage_index.fqn, item.storage_offsets, item.lengths))


def _with_all_dtypes(read_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """The reader's look at the files, which knows every dtype of safetensors (torch 2.8 takes float8 for the default one)."""

    @functools.wraps(read_metadata)
    def read(self: Any) -> Any:
        from safetensors.torch import _getdtype

        metadata = read_metadata(self)
        dtypes: dict[str, dict[str, torch.dtype]] = {}
        for file in {info.relative_path for info in metadata.storage_data.values()}:
            with self.fs.create_stream(file, "rb") as stream:
                header, _ = _safetensors.read_header(stream)
            tensors = {name: entry for name, entry in header.items() if name != _safetensors.METADATA}
            dtypes[file] = {name: _getdtype(entry["dtype"]) for name, entry in tensors.items()}
        for index, info in metadata.storage_data.items():
            info.dtype = dtypes[info.relative_path][index.fqn]
            metadata.state_dict_metadata[index.fqn].properties.dtype = info.dtype
        return metadata

    return read


def _parameters(writer: Any) -> Iterable[str]:
    return inspect.signature(writer.__init__).parameters


def _lacks(module: ModuleType | None) -> bool:
    return module is None or "token" in _parameters(
        module.HuggingFaceStorageWriter
    )  # only the first form had one; ours keeps it


BACKPORT = Backport(
    name="hf_storage",
    summary="HuggingFaceStorageWriter(save_distributed=…, enable_consolidation=…) and thread counts of writer and reader",
    target="torch.distributed.checkpoint.hf_storage",
    since="2.9.0",
    upstream="https://github.com/pytorch/pytorch/pull/159392",
    differs=(
        "both also take what torch 2.8's do (token, save_sharded, remote paths); remote files are read one at a time; a reader "
        "that fails in a thread raises that error; scalars and integer tensors are consolidated too"
    ),
    replaces={
        "HuggingFaceStorageWriter.__init__": _with_distributed,
        "HuggingFaceStorageWriter.finish": _with_consolidation,
        "HuggingFaceStorageReader.__init__": _with_threads,
        "HuggingFaceStorageReader.read_data": _reading_slices,
        "HuggingFaceStorageReader.read_metadata": _with_all_dtypes,
    },
    lacks=_lacks,
)
