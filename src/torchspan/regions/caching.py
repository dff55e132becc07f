"""Have torch keep in its caches what it compiles, and have it load from there without compiling."""

from __future__ import annotations

import copyreg
import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from torchspan.core.replaced import entries_replaced, replaced
from torchspan.jobs.groups import portable_groups
from torchspan.private import aot, dynamo, fx, inductor

_loading = threading.RLock()


class CacheMiss(BaseException):
    """Inductor was about to work where it may only load; no Exception, so that torch does not take it for a bad entry."""


def counters() -> dict[str, int]:
    """How many graphs were compiled, and what the caches did, since this process began."""
    names = {
        "graphs": ("stats", "unique_graphs"),
        "saved": ("aot_autograd", "autograd_cache_saved"),
        "hits": ("aot_autograd", "autograd_cache_hit"),
        "bypassed": ("aot_autograd", "autograd_cache_bypass"),
        "codegen_bypassed": ("inductor", "fxgraph_cache_bypass"),
    }
    return {name: dynamo.counters[group][key] for name, (group, key) in names.items()}


@contextmanager
def keeping_buffers() -> Iterator[None]:
    """Keep AOTAutograd's backward from reusing the memory of saved tensors: autograd may run it again."""
    with aot.config.patch(donated_buffer=False):
        yield


def note_kept_buffers(node: Any) -> None:
    """Mark a backward compiled under :func:`keeping_buffers` as reusing no memory: torch reads "unknown" as "some"."""
    metadata = type(node)._forward_cls.metadata
    if metadata.bw_donated_idxs is None:
        metadata.bw_donated_idxs = []


@contextmanager
def caching() -> Iterator[None]:
    """Have torch keep what it compiles in its caches on disk, whatever the settings say."""
    with (
        _portable_keys(),
        _checkpoint_is_cacheable(),
        inductor.config.patch(fx_graph_cache=True, compile_threads=1),
        aot.config.patch(enable_autograd_cache=True),
        keeping_buffers(),
    ):
        yield


@contextmanager
def _portable_keys() -> Iterator[None]:
    """Write memory formats and process groups by name into cache keys, and groups into cache entries too.

    Pickle names a format by the first module in ``sys.modules`` that has a global ``torch``, so that a key depends on what a
    program imported before torch, and two processes disagree about the same graph. A group cannot be pickled at all, so torch
    (2.13) caches no graph of DTensors.
    """
    portable = dict.fromkeys((torch.memory_format, torch.layout), _reduce_by_name)
    with entries_replaced(copyreg.dispatch_table, portable), portable_groups():
        yield


@contextmanager
def _checkpoint_is_cacheable() -> Iterator[None]:
    """Let a graph with activation checkpointing into AOTAutograd's cache, where torch (2.8) does not.

    The cache key holds the checkpointed graph, but not which values a `context_fn` keeps: a graph with one is not cached.
    """
    autograd_cache, tag_activation_checkpoint = aot.autograd_cache, fx.tag_activation_checkpoint
    if tag_activation_checkpoint.cacheable():
        yield
        return
    check = autograd_cache.check_node_safe

    def check_node_safe(node: Any) -> None:
        if node.target is tag_activation_checkpoint:
            body = node.graph.owning_module.get_submodule(node.args[0].target)
            if "_checkpoint_context_fn" in body.meta:
                raise autograd_cache.BypassAOTAutogradCache("a context_fn is not in the key")
            return
        check(node)

    with (
        replaced(tag_activation_checkpoint, "_cacheable", True),
        replaced(autograd_cache, "check_node_safe", check_node_safe),
    ):
        yield


@contextmanager
def noting_refusals(reasons: list[str]) -> Iterator[None]:
    """Gather in `reasons` why torch's caches did not take a graph, which torch says in its log only."""
    names = ("torch._inductor.codecache", "torch._functorch._aot_autograd.autograd_cache")

    def note(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if "unable to" in message or message.startswith("Bypassing"):
            error = record.exc_info[1] if record.exc_info else None
            reasons.append(f"{message}: {type(error).__name__}: {error}" if error else message)
        return record.levelno >= levels[record.name][1]

    loggers = [logging.getLogger(name) for name in names]
    levels = {logger.name: (logger.level, logger.getEffectiveLevel()) for logger in loggers}
    for logger in loggers:
        logger.addFilter(note)
        logger.setLevel(min(logging.INFO, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(note)
            logger.setLevel(levels[logger.name][0])


def _reduce_by_name(value: Any) -> tuple[Callable[..., Any], tuple[str]]:
    return _torch_name, (str(value).removeprefix("torch."),)


def _torch_name(name: str) -> Any:
    return getattr(torch, name)


@contextmanager
def only_loading() -> Iterator[None]:
    """Let inductor load in this thread, and raise CacheMiss where it would trace, generate or build."""
    cache, builder = aot.AOTAutogradCache, inductor.CppBuilder
    codecache, compile_fx = inductor.codecache, inductor.compile_fx
    mine = threading.get_ident()

    def refuse(original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def refused(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == mine:
                raise CacheMiss(f"inductor asked for {original.__qualname__}")
            return original(*args, **kwargs)

        return refused

    lookup = cache._lookup

    def look_up(*args: Any, **kwargs: Any) -> Any:
        entry = lookup(*args, **kwargs)
        if entry is None and threading.get_ident() == mine:
            raise CacheMiss("the graph is not in the cache of the compile process")
        return entry

    prepare_header = codecache._precompile_header

    def no_header(*args: Any, **kwargs: Any) -> str:
        # a header is of use for building only, but asked for (by a process each time) before it is known whether to build
        return "" if threading.get_ident() == mine else prepare_header(*args, **kwargs)

    with _loading, ExitStack() as stack:
        stack.enter_context(caching())
        stack.enter_context(replaced(compile_fx, "fx_codegen_and_compile", refuse(compile_fx.fx_codegen_and_compile)))
        stack.enter_context(replaced(codecache, "_precompile_header", no_header))
        stack.enter_context(replaced(builder, "build", refuse(builder.build)))
        stack.enter_context(replaced(cache, "_lookup", staticmethod(look_up)))
        before = counters()["bypassed"]
        yield
        if counters()["bypassed"] != before:
            raise CacheMiss("torch cannot cache this graph, so it cannot load it either")
