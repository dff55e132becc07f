"""Context parallelism for modules: ``_ContextParallel``, ``_context_parallel_shard`` and its load balancers.

A sequence is cut over the ranks of a mesh. A load balancer says in which order its positions are cut, so that each rank has as
much to attend to as any other; attention then takes the keys and values of all ranks.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from torchspan.backports._base import Backport

# B: batch, H: heads, L: positions of the whole sequence, Q: blocks of queries, N: ranks
_PLACE = "torch.distributed.tensor.experimental._attention"


class _LoadBalancer(ABC):
    """The order in which the positions of a sequence are cut over ranks; a class of one's own gives it as indices."""

    @abstractmethod
    def _generate_indices(self, restore: bool = False) -> Tensor | None:
        """Where each position comes from, ``(1, L)`` or ``(B, L)``: ``x[indices]`` is what is cut.

        With `restore`, the inverse; None: no other order.
        """


class _HeadTailLoadBalancer(_LoadBalancer):
    """Each rank gets a piece from the head of the sequence and its mirror image: as much of a causal mask as any other."""

    def __init__(self, seq_length: int, world_size: int, device: str | torch.device) -> None:
        self.seq_length, self.world_size, self.device = seq_length, world_size, device

    def _generate_indices(self, restore: bool = False) -> Tensor:
        indices_L = _head_and_tail(self.seq_length, self.world_size, self.device)
        return (indices_L.argsort() if restore else indices_L)[None]


class _PerDocumentHeadTailLoadBalancer(_LoadBalancer):
    """The same for each of several documents in the sequence; their lengths may differ from batch to batch."""

    def __init__(self, seq_length_per_doc: list[list[int]], world_size: int, device: str | torch.device) -> None:
        self.seq_length_per_doc, self.world_size, self.device = seq_length_per_doc, world_size, device

    def _generate_indices(self, restore: bool = False) -> Tensor:
        rows = []
        for lengths in self.seq_length_per_doc:
            parts = [_head_and_tail(length, self.world_size, self.device).view(self.world_size, -1) for length in lengths]
            starts = [sum(lengths[:index]) for index in range(len(lengths))]
            # as upstream: documents one after another, each cut over all ranks
            indices_L = torch.cat([(part + start).flatten() for part, start in zip(parts, starts)])
            rows.append(indices_L.argsort() if restore else indices_L)
        return torch.stack(rows)


class _PTRRLoadBalancer(_LoadBalancer):
    """Blocks of queries, those with most to attend to first, are dealt out to the ranks to and fro; for flex_attention."""

    def __init__(self, block_mask: Any, world_size: int) -> None:
        self.block_mask, self.world_size = block_mask, world_size

    @staticmethod
    def ptrr_scheduling(process_time: Tensor, group_size: int) -> Tensor:
        """The tasks of each of `group_size` groups, ``(group_size, tasks / group_size)``, given the time of each task."""
        num_tasks = process_time.size(0)
        if num_tasks % group_size:
            raise NotImplementedError(f"num_tasks {num_tasks} must be divisible by group_size {group_size}")
        rounds = process_time.sort(descending=True, stable=True).indices.view(-1, group_size)
        is_forth = torch.arange(len(rounds), device=process_time.device)[:, None] % 2 == 0
        return torch.where(is_forth, rounds, rounds.flip(1)).T.sort(dim=1).values

    def _generate_indices(self, restore: bool = False) -> Tensor:
        mask = self.block_mask
        blocks_BHQ = mask.kv_num_blocks if mask.full_kv_num_blocks is None else mask.kv_num_blocks + mask.full_kv_num_blocks
        size, key_size = mask.BLOCK_SIZE
        assert size == key_size, f"the blocks of queries and keys must be of one size, they are of {size} and {key_size}"
        assert blocks_BHQ.size(1) == 1, f"the mask must be one for all heads, it has {blocks_BHQ.size(1)}"
        order_BQ = torch.stack([self.ptrr_scheduling(blocks_Q, self.world_size).flatten() for blocks_Q in blocks_BHQ[:, 0]])
        indices_BL = (order_BQ[..., None] * size + torch.arange(size, device=order_BQ.device)).flatten(1)
        return indices_BL.argsort(dim=1) if restore else indices_BL


for _public in (_LoadBalancer, _HeadTailLoadBalancer, _PerDocumentHeadTailLoadBalancer, _PTRRLoadBalancer):
    _public.__module__ = _PLACE


def _head_and_tail(length: int, world_size: int, device: str | torch.device) -> Tensor:
    assert length % (2 * world_size) == 0, f"a length of {length} cannot be cut into {2 * world_size} pieces"
    pieces = torch.arange(length, dtype=torch.int, device=device).view(2 * world_size, -1)
    head = torch.arange(world_size, device=device)
    return torch.stack((pieces[head], pieces[2 * world_size - 1 - head]), dim=1).flatten()


def _options() -> Any:
    from torch.distributed.tensor.experimental._attention import _cp_options

    return _cp_options


def _default_balancer(length: int, world_size: int, device: Any) -> _LoadBalancer | None:
    """What the legacy interface balances with: torch's switch for it is on, and the length fits."""
    if _options().enable_load_balance and length % (2 * world_size) == 0:
        return _HeadTailLoadBalancer(length, world_size, device)
    return None


# cutting and putting together


def _context_parallel_shard(
    mesh: Any,
    buffers: Sequence[Any] | Mapping[str, Any],
    seq_dims: Sequence[int] | Mapping[str, int],
    load_balancer: _LoadBalancer | None = None,
) -> Any:
    """This rank's part of tensors and block masks, in the structure of `buffers`.

    Args:
        mesh: over which the sequence is cut.
        buffers: tensors, on one device, whose dimension `seq_dims` is the sequence, and masks for flex_attention of all of it.
        seq_dims: for each of `buffers`; that of a mask is not used.
        load_balancer: the order in which the sequence is cut.

    Raises:
        ValueError: `buffers` and `seq_dims` do not fit, or the balancer's batch does not.
        NotImplementedError: a mask whose queries cannot be cut into whole blocks.
    """
    if len(buffers) != len(seq_dims):
        raise ValueError("`seq_dims` must have the same number of elements as `buffers`.")
    flat_buffers, spec = pytree.tree_flatten(buffers)
    flat_dims = pytree.tree_leaves(seq_dims)
    if len(flat_buffers) != len(flat_dims):
        raise ValueError("`seq_dims` must have the pytree structure as `buffers`.")
    _options().enable_load_balance = load_balancer is not None  # ring attention has to know
    indices = None if load_balancer is None else load_balancer._generate_indices()
    shards = [_shard(mesh, buffer, dim, indices) for buffer, dim in zip(flat_buffers, flat_dims)]
    return pytree.tree_unflatten(shards, spec)


def _shard(mesh: Any, buffer: Any, dim: int, indices: Tensor | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    if isinstance(buffer, BlockMask):
        return _shard_mask(mesh, buffer, indices)
    if not isinstance(buffer, Tensor):
        raise ValueError(f"Unknown buffer type: {type(buffer)}")
    size = mesh.size()
    assert buffer.size(dim) % size == 0, f"dimension {dim} of {tuple(buffer.shape)} cannot be cut over {size} ranks"
    return _rearranged(buffer, dim, indices).chunk(size, dim)[mesh.get_local_rank()].contiguous()


def _rearranged(tensor: Tensor, dim: int, indices: Tensor | None) -> Tensor:
    """`tensor` with its positions in the order of `indices`, ``(1, L)`` or one row for each of its first dimension."""
    if indices is None:
        return tensor
    if len(indices) == 1:
        return tensor.index_select(dim, indices[0])
    if dim == 0 or len(indices) != tensor.size(0):
        raise ValueError(f"load-balance indices of shape {tuple(indices.shape)} are not for a tensor of {tuple(tensor.shape)}")
    return torch.stack([part.index_select(dim - 1, row) for part, row in zip(tensor, indices)])


def _shard_mask(mesh: Any, mask: Any, indices: Tensor | None) -> Any:
    """The mask of this rank's queries over all keys, both in the order of `indices`."""
    from torch.nn.attention.flex_attention import _DEFAULT_SPARSE_BLOCK_SIZE, create_block_mask

    (num_q, num_k), block, size, device = mask.seq_lengths, _DEFAULT_SPARSE_BLOCK_SIZE, mesh.size(), mask.kv_num_blocks.device
    if num_q % (size * block):
        raise NotImplementedError(
            f"Q_LEN {num_q} is not divisible by CP mesh world size {size} * BLOCK_SIZE {block}: a rank's queries must be whole "
            "blocks; pad the sequence"
        )
    begin = mesh.get_local_rank() * (num_q // size)

    def at(batch: Tensor, place: Tensor) -> Tensor:
        """The position, in the whole sequence, of what stands at `place` after rearrangement."""
        if indices is None:
            return place
        return indices[0][place] if len(indices) == 1 else indices[batch][place]

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return mask.mask_mod(batch, head, at(batch, query + begin), at(batch, key))

    build: Callable[..., Any] = create_block_mask
    if device.type != "cpu":  # compiled, it does not hold an entry for each pair of positions
        build = torch.compile(create_block_mask, dynamic=False, fullgraph=True)
    return build(mask_mod, *mask.kv_num_blocks.shape[:2], num_q // size, num_k, device=device.type, BLOCK_SIZE=(block, block))


def _with_load_balancer(unshard: Callable[..., Any]) -> Callable[..., Any]:
    """``context_parallel_unshard``, with `load_balancer`; without one, torch's own switch decides."""

    @functools.wraps(unshard)
    @torch.no_grad()
    def context_parallel_unshard(
        mesh: Any, buffers: list[Tensor], seq_dims: list[int], load_balancer: _LoadBalancer | None = None
    ) -> list[Tensor]:
        size, results = mesh.size(), []
        length = buffers[0].size(seq_dims[0]) * size
        balancer = load_balancer or _default_balancer(length, size, buffers[0].device)
        indices = None if balancer is None else balancer._generate_indices(restore=True)
        for buffer, dim in zip(buffers, seq_dims):
            results.append(_rearranged(_gather(buffer, dim, mesh.get_group().group_name), dim, indices))
        return results

    del vars(context_parallel_unshard)["__wrapped__"]  # its signature is its own
    return context_parallel_unshard


def _gather(tensor: Tensor, dim: int, group: str) -> Tensor:
    return _waited(_collectives().all_gather_tensor(tensor.contiguous(), dim, group))


def _scatter(tensor: Tensor, dim: int, group: str) -> Tensor:
    """This rank's part of the sum of all ranks' tensors."""
    return _waited(_collectives().reduce_scatter_tensor(tensor.contiguous(), "sum", dim, group))


def _collectives() -> Any:
    import torch.distributed._functional_collectives as module

    return module


def _waited(tensor: Tensor) -> Tensor:
    return tensor.wait() if isinstance(tensor, _collectives().AsyncCollectiveTensor) else tensor


# attention over all ranks


class _AttentionType(Enum):
    FLEX = "flex_attention"
    SDPA = "scaled_dot_product_attention"


@functools.cache
def _context_parallel_style() -> type:
    """The class ``_ContextParallel``, made when it is asked for: its base is DTensor's."""
    from torch.distributed.tensor.parallel.style import ParallelStyle

    class _ContextParallel(ParallelStyle):
        """Makes a module that calls an attention with its first three arguments attend to the keys and values of all ranks."""

        AttentionType = _AttentionType

        def __init__(self, seq_dim: int, attention_type: _AttentionType) -> None:
            super().__init__()
            self.seq_dim, self.attention_type = seq_dim, attention_type

        def _apply(self, module: torch.nn.Module, mesh: Any) -> torch.nn.Module:
            if self.attention_type is _AttentionType.FLEX:
                module.register_forward_pre_hook(functools.partial(self.flex_input_fn, mesh=mesh), with_kwargs=True)
            elif self.attention_type is _AttentionType.SDPA:
                module.register_forward_pre_hook(functools.partial(self.sdpa_input_fn, mesh=mesh), with_kwargs=True)
                module.register_forward_hook(functools.partial(self.sdpa_output_fn, mesh=mesh))
            else:
                raise ValueError(f"Unknown attention type: {self.attention_type}")
            return module

        def flex_input_fn(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
            """Gather keys and values."""
            arguments = dict(zip(("query", "key", "value"), args)) | kwargs
            group = mesh.get_group().group_name
            key, value = _gathering_operator()(arguments["key"], arguments["value"], self.seq_dim, group)
            names = ("query", "key", "value")[: len(args)]
            changed = arguments | {"key": key, "value": value}
            return (
                (*(changed.pop(name) for name in names), *args[3:]),
                {name: value for name, value in changed.items() if name in kwargs},
            )

        def sdpa_input_fn(self, module: Any, args: Any, kwargs: Any, mesh: Any) -> Any:
            """Make DTensors of the tensors: those are what ring attention is dispatched on."""
            distribute = functools.partial(_as_shard, mesh=mesh, dim=self.seq_dim)
            return tuple(map(distribute, args)), {name: distribute(value) for name, value in kwargs.items()}

        def sdpa_output_fn(self, module: Any, inputs: Any, outputs: Any, mesh: Any) -> Any:
            """Make this rank's tensors of the DTensors."""
            if isinstance(outputs, Tensor):
                return _as_local(outputs)
            return tuple(map(_as_local, outputs))

    _ContextParallel.__module__, _ContextParallel.__qualname__ = _PLACE, "_ContextParallel"
    _gathering_operator()
    return _ContextParallel


def _as_shard(value: Any, mesh: Any, dim: int) -> Any:
    from torch.distributed.tensor import DTensor, Shard

    if not isinstance(value, Tensor):
        return value
    if isinstance(value, DTensor):
        assert value.placements == (Shard(dim),), f"the input is placed as {value.placements}, expected {(Shard(dim),)}"
        return value
    return DTensor.from_local(value, mesh, [Shard(dim)], run_check=False)


def _as_local(value: Any) -> Any:
    return value.to_local() if hasattr(value, "to_local") else value


@functools.cache
def _gathering_operator() -> Any:
    """Gathers keys and values, one operator that selective checkpointing can save; the dispatcher keeps it."""
    define: Any = torch.library.custom_op
    schema = "(Tensor k, Tensor v, SymInt seq_dim, str pg_name) -> (Tensor, Tensor)"

    def gather(k: Tensor, v: Tensor, seq_dim: int, pg_name: str) -> tuple[Tensor, Tensor]:
        return _gather(k, seq_dim, pg_name), _gather(v, seq_dim, pg_name)

    def scatter(k: Tensor, v: Tensor, seq_dim: int, pg_name: str) -> tuple[Tensor, Tensor]:
        return _scatter(k, seq_dim, pg_name), _scatter(v, seq_dim, pg_name)

    def shapes(scale: Callable[[int, int], int]) -> Callable[..., Any]:
        def fake(k: Tensor, v: Tensor, seq_dim: int, pg_name: str) -> tuple[Tensor, ...]:
            groups: Any = torch.distributed.distributed_c10d
            size = groups._resolve_process_group(pg_name).size()
            return tuple(
                x.new_empty([scale(length, size) if dim == seq_dim else length for dim, length in enumerate(x.shape)])
                for x in (k, v)
            )

        return fake

    forward = define("cplib::flex_cp_allgather", gather, mutates_args=(), schema=schema)
    backward = define("cplib::flex_cp_allgather_backward", scatter, mutates_args=(), schema=schema)
    forward.register_fake(shapes(lambda length, size: length * size))
    backward.register_fake(shapes(lambda length, size: length // size))

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        _, _, ctx.seq_dim, ctx.pg_name = inputs

    def gradients(ctx: Any, grad_k: Tensor, grad_v: Tensor) -> tuple[Any, ...]:
        return *backward(grad_k, grad_v, ctx.seq_dim, ctx.pg_name), None, None

    forward.register_autograd(gradients, setup_context=keep)
    return forward


_handlers_before: list[Any] = []  # DTensor's own, while the dispatcher is on


def _enable_context_parallel_dispatcher() -> None:
    """Make scaled_dot_product_attention of DTensors that are cut along the sequence ring attention, also in the backward."""
    import torch.distributed.tensor.experimental._attention as module
    from torch.distributed.tensor import DTensor

    if not _handlers_before:
        _handlers_before.append(DTensor._op_dispatcher._custom_op_handlers)
        DTensor._op_dispatcher._custom_op_handlers = {**_handlers_before[0], **vars(module)["customized_ops"]}


def _disable_context_parallel_dispatcher() -> None:
    """Take `_enable_context_parallel_dispatcher` back."""
    from torch.distributed.tensor import DTensor

    if _handlers_before:
        DTensor._op_dispatcher._custom_op_handlers = _handlers_before.pop()


for _function in (_context_parallel_shard, _enable_context_parallel_dispatcher, _disable_context_parallel_dispatcher):
    _function.__module__ = _PLACE

BACKPORT = Backport(
    name="context_parallel",
    summary="context parallelism for modules with flex_attention or SDPA: _ContextParallel and _context_parallel_shard",
    target=_PLACE,
    since="2.10.0",
    upstream="https://github.com/pytorch/pytorch/pull/161093",
    differs="the masks of context_parallel_shard are built eagerly on a CPU; ring attention is torch 2.8's own: it needs a GPU",
    names={
        "_ContextParallel": _context_parallel_style,
        "_HeadTailLoadBalancer": lambda: _HeadTailLoadBalancer,
        "_PTRRLoadBalancer": lambda: _PTRRLoadBalancer,
        "_PerDocumentHeadTailLoadBalancer": lambda: _PerDocumentHeadTailLoadBalancer,
        "_context_parallel_shard": lambda: _context_parallel_shard,
        "_enable_context_parallel_dispatcher": lambda: _enable_context_parallel_dispatcher,
        "_disable_context_parallel_dispatcher": lambda: _disable_context_parallel_dispatcher,
    },
    # 2.8's class of this name is another, which nothing but its own file uses
    replaces={"_LoadBalancer": lambda old: _LoadBalancer, "context_parallel_unshard": _with_load_balancer},
)
