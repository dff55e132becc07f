"""``ScheduleDualPipeV``, ``OVERLAP_F_B`` and functions of the user's own for a pipeline's actions (``_PipelineContext``)."""

from __future__ import annotations

import csv
import functools
import types
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from torchspan.backports._base import Backport, Change

_PACKAGE = "torch.distributed.pipelining"
_PLACE = f"{_PACKAGE}.schedules"
_OVERLAP = "OVERLAP_F_B"

# An action is torch's ``_Action``: stage, computation type, microbatch, and for an overlapped pair its two parts.
_Action = Any
_Order = Mapping[int, Sequence[_Action]]  # by rank


def _schedules() -> Any:
    """torch's module of schedules."""
    import torch.distributed.pipelining.schedules as module

    return module


def _native(cls: type) -> Any:
    """torch's own class, given that or what stands in its place."""
    return vars(cls).get("_native", cls)


def _derive(name: str, mixin: type, native: Any) -> type:
    """torch's class `native` with what `mixin` adds, under the `name` and in the place where torch has it."""
    content = {"__module__": _PLACE, "__doc__": mixin.__doc__, "_native": native}
    return types.new_class(name, (mixin, native), exec_body=lambda names: names.update(content))


# the computation type


@functools.cache
def _overlap() -> Any:
    """The member ``OVERLAP_F_B`` of torch's ``_ComputationType``: torch's own, or one like it."""
    kinds = _schedules()._ComputationType
    if _OVERLAP in kinds.__members__:
        return kinds[_OVERLAP]
    member = object.__new__(kinds)
    member._name_, member._value_, member._sort_order_, member.__objclass__ = _OVERLAP, 11, len(kinds), kinds
    return member


def _with_overlap_shown(show: Callable[[Any], str]) -> Callable[[Any], str]:
    return functools.wraps(show)(lambda kind: _OVERLAP if kind is _overlap() else show(kind))


def _with_overlap_read(read: Any) -> Any:
    return staticmethod(functools.wraps(read.__func__)(lambda text: _overlap() if text == _OVERLAP else read(text)))


# actions that have parts


class _PartedAction:
    """One entry of a pipeline's schedule; ``sub_actions`` are the parts of an overlapped pair."""

    def __new__(
        cls, stage_index: int, computation_type: Any, microbatch_index: int | None = None, sub_actions: Any = None
    ) -> Any:
        self: Any = super().__new__(cls, stage_index, computation_type, microbatch_index)  # type: ignore[call-arg]
        self.__dict__["_parts"] = sub_actions
        return self

    @property
    def sub_actions(self) -> tuple[_Action, ...] | None:
        return self.__dict__.get("_parts")

    @property
    def is_compute_op(self) -> bool:
        return _is_computation(self)

    def __getnewargs__(self) -> tuple[Any, ...]:
        own: Any = self
        return (*own, self.sub_actions)

    def __deepcopy__(self, memo: Any) -> Any:
        return self

    def __eq__(self, other: object) -> bool:
        same = tuple.__eq__(self, other)  # type: ignore[operator]
        return same if same is NotImplemented else same and self.sub_actions == getattr(other, "sub_actions", None)

    def __ne__(self, other: object) -> bool:
        same = self.__eq__(other)
        return same if same is NotImplemented else not same

    def __hash__(self) -> int:
        own = tuple.__hash__(self)  # type: ignore[arg-type]
        return own if self.sub_actions is None else hash((own, self.sub_actions))

    def __repr__(self) -> str:
        if self.sub_actions is None:
            return _native(type(self)).__repr__(self)
        return f"({';'.join(map(repr, self.sub_actions))}){_OVERLAP}"

    __str__ = __repr__

    @staticmethod
    def from_str(action_string: str) -> Any:
        """The action that is written ``2F0``, or ``(0F4;3B1)OVERLAP_F_B``; None for an empty string."""
        text = action_string.strip()
        if not text.startswith("(") or ")" not in text:
            return _native(_schedules()._Action).from_str(text)
        parts, _, kind = text[1:].partition(")")
        read = tuple(_PartedAction.from_str(part) for part in parts.split(";") if part.strip())
        return _action(-1, _schedules()._ComputationType.from_str(kind), None, read or None)


@functools.cache
def _action_over(native: Any) -> Any:
    return native if "sub_actions" in native._fields else _derive("_Action", _PartedAction, native)


def _action(*fields: Any) -> _Action:
    return _action_over(_native(_schedules()._Action))(*fields)


def _parts(action: _Action) -> tuple[_Action, ...]:
    """What an action consists of: itself, or the parts of a pair."""
    return getattr(action, "sub_actions", None) or (action,)


def _is_computation(action: Any) -> bool:
    return action.computation_type.name in ("FORWARD", "FULL_BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT", _OVERLAP)


# lowering: from the computations of each rank to all that it does


def _with_unshard(actions: Iterable[_Action | None], max_active_stages: int = 3) -> list[_Action]:
    """One rank's computations, with the FSDP parameters of the next `max_active_stages` stages gathered ahead."""
    kinds = _schedules()._ComputationType
    computations = [action for action in actions if action is not None]
    lowered: list[_Action] = []
    active: list[int] = []
    for position, action in enumerate(computations):
        next_stages = _next_stages(computations[position:], max_active_stages)
        lowered += [_action(stage, kinds.RESHARD) for stage in active if stage not in next_stages]
        lowered += [_action(stage, kinds.UNSHARD) for stage in next_stages if stage not in active]
        lowered.append(action)
        active = [stage for stage in active if stage in next_stages] + [stage for stage in next_stages if stage not in active]
    return lowered + [_action(stage, kinds.RESHARD) for stage in active]


def _next_stages(actions: Iterable[_Action], count: int) -> list[int]:
    """The first `count` stages that are computed on; the stages of a pair are never parted."""
    stages: dict[int, None] = {}
    for action in actions:
        stages.update({part.stage_index: None for part in _parts(action)})
        if len(stages) >= count:
            break
    return list(stages)


def _with_transfers(actions: _Order, rank_of: Mapping[int, int], num_stages: int) -> dict[int, list[_Action]]:
    """Each rank's actions with sends and receives; every pair of ranks has them in the same order, so that none waits forever.

    A receive stands where its send is issued, and an action waits for what it needs: a pair, for what both parts need.
    """
    waiting = {rank: deque(actions[rank]) for rank in sorted(actions)}
    lowered: dict[int, list[_Action]] = {rank: [] for rank in actions}
    done: dict[int, set[_Action]] = {rank: set() for rank in actions}
    while any(waiting.values()):
        ready = [rank for rank in waiting if waiting[rank]]
        progress = False
        for rank in ready:
            if not all(_is_ready(part, done[rank], num_stages) for part in _parts(waiting[rank][0])):
                continue
            progress = True
            action = waiting[rank].popleft()
            lowered[rank].append(action)
            for part in _parts(action):
                done[rank].add(part)
                for where, transfer in _transfers(part, rank_of, num_stages):
                    lowered[where].append(transfer)
                    done[where].add(transfer)
        if not progress:
            raise AssertionError(
                f"Malformed compute schedule, can't schedule sends/recvs; ranks wait at {[waiting[rank][0] for rank in ready]}"
            )
    return lowered


def _is_ready(action: _Action, done: set[_Action], num_stages: int) -> bool:
    """Whether its rank has what `action` needs, received or computed there."""
    kinds, stage, microbatch = _schedules()._ComputationType, action.stage_index, action.microbatch_index
    if action.computation_type is kinds.FORWARD and stage > 0:
        needs = [(stage, kinds.RECV_F), (stage - 1, kinds.FORWARD)]
    elif action.computation_type in (kinds.BACKWARD_INPUT, kinds.FULL_BACKWARD) and stage < num_stages - 1:
        needs = [(stage, kinds.RECV_B), (stage + 1, kinds.BACKWARD_INPUT), (stage + 1, kinds.FULL_BACKWARD)]
    else:
        return True
    return any(_action(stage, kind, microbatch) in done for stage, kind in needs)


def _transfers(action: _Action, rank_of: Mapping[int, int], num_stages: int) -> Iterator[tuple[int, _Action]]:
    """The send of what `action` computes and its receive, each with its rank; none within a rank."""
    kinds, stage = _schedules()._ComputationType, action.stage_index
    if action.computation_type is kinds.FORWARD:
        other, send, receive = stage + 1, kinds.SEND_F, kinds.RECV_F
    elif action.computation_type in (kinds.BACKWARD_INPUT, kinds.FULL_BACKWARD):
        other, send, receive = stage - 1, kinds.SEND_B, kinds.RECV_B
    else:
        return
    if 0 <= other < num_stages and rank_of[other] != rank_of[stage]:
        yield rank_of[stage], _action(stage, send, action.microbatch_index)
        yield rank_of[other], _action(other, receive, action.microbatch_index)


class _Lowered(list[Any]):
    """A rank's actions as this runtime lowers them, which puts no REDUCE_GRAD in: the last backward scales gradients."""


def _is_reduction(action: _Action | None) -> bool:
    return action is not None and action.computation_type.name == "REDUCE_GRAD"


def _last_backwards(actions: Sequence[_Action]) -> dict[int, list[int]]:
    """The stages whose gradients are complete after the action at a position."""
    position_of: dict[int, int] = {}
    for position, action in enumerate(actions):
        for part in _parts(action):
            if part.computation_type.name in ("FULL_BACKWARD", "BACKWARD_WEIGHT"):
                position_of[part.stage_index] = position
    complete: dict[int, list[int]] = defaultdict(list)
    for stage, position in position_of.items():
        complete[position].append(stage)
    return complete


# the backward for weights, put off


def _backward_weight(
    weights: Iterable[Any], param_groups: Iterable[dict[str, Any]], retain_graph: bool = False
) -> tuple[Any, ...]:
    """Add to the gradients of a stage's `weights`, from what its backward for inputs has saved.

    Where a stage uses a weight twice, torch's own counts some of it twice until 2.10 or later; its later ones do not.
    """
    from torch.distributed.pipelining._backward import _get_grad_fn_or_grad_acc

    weight_of = {_get_grad_fn_or_grad_acc(weight): weight for weight in weights}
    for group in param_groups:
        for node, gradient in _weight_gradients(group, retain_graph):
            weight = weight_of[node]
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
    return tuple(weight.grad for weight in weight_of.values())


def _weight_gradients(group: dict[str, Any], retain_graph: bool) -> list[tuple[Any, Any]]:
    """The gradients of the weights in one group, by their autograd node: those that share nodes where gradients were saved."""
    from torch.autograd.graph import GradientEdge

    nodes, saved = list(group.pop("intermediates")), group.pop("grads", None) or ()
    reached = [(node, grads) for node, grads in zip(nodes, saved, strict=False) if grads is not None]
    starts = [(GradientEdge(node, i), grad) for node, grads in reached for i, grad in enumerate(grads) if grad is not None]
    if not starts:
        return []
    # a node that follows another is given what was saved, and no more: that has what comes through the other
    hooks = [node.register_prehook(lambda _, saved=grads: saved) for node, grads in reached]
    edges, grads = zip(*starts, strict=True)
    targets = [GradientEdge(node, 0) for node in group["params"]]
    try:
        gradients = torch.autograd.grad(edges, targets, grads, retain_graph=retain_graph, allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    return list(zip(group["params"], gradients, strict=True))


# the runtime


@dataclass
class _PipelineContext:
    """What a function for a computation type is given next to the action: the schedule, and the microbatches of this step."""

    schedule_ref: Any
    arg_mbs: list[Any] | None = None
    kwarg_mbs: list[Any] | None = None
    target_mbs: list[Any] | None = None
    losses: list[Any] | None = None


class _CustomFunctionProtocol(Protocol):
    """A function that does an action in place of the runtime."""

    def __call__(self, action: Any, ctx: _PipelineContext) -> None: ...


for _public in (_PipelineContext, _CustomFunctionProtocol):
    _public.__module__ = _PLACE

_CUSTOM = ("FORWARD", "FULL_BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT", _OVERLAP, "UNSHARD", "RESHARD")
_BACKWARD = ("FULL_BACKWARD", "BACKWARD_INPUT", "BACKWARD_WEIGHT", "SEND_B", "RECV_B", "REDUCE_GRAD")
_OF_ALL_MICROBATCHES = ("UNSHARD", "RESHARD", "REDUCE_GRAD")


class _Runtime:
    """Runs a schedule that says in full what each rank does; functions of the user's can do actions in its place."""

    _stages: list[Any]
    _n_microbatches: int
    _num_stages: int
    _has_backward: bool
    _loss_fn: Callable[..., Any] | None
    _internal_losses: list[Any]
    _stages_initialized: bool
    scale_grads: bool
    rank: int
    stage_index_to_group_rank: dict[int, int]
    pipeline_order: dict[int, list[Any]]
    pipeline_order_with_comms: dict[int, list[Any]]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._backward_requires_autograd = kwargs.pop("backward_requires_autograd", True)
        super().__init__(*args, **kwargs)
        self._comp_type_to_function_map: dict[Any, Any] = {}
        self.backward_counter: Counter[int] = Counter()
        self.fwd_recv_ops: dict[tuple[int, int], list[Any]] = {}
        self.bwd_recv_ops: dict[tuple[int, int], list[Any]] = {}
        self.unshard_ops: dict[int, list[Any]] = {}
        self.unsharded_stages: set[int] = set()
        self._sends: list[Any] = []
        self._is_ready_for_backward = False
        self._return_outputs = True
        self._scales_where_said = False

    def register_custom_function(self, computation_type: Any, custom_function: _CustomFunctionProtocol) -> None:
        """Have `custom_function` do all actions of `computation_type`; it is called with the action and a context.

        It does what the runtime would: waits for ``fwd_recv_ops`` and ``bwd_recv_ops``, counts ``backward_counter``.
        """
        if getattr(computation_type, "name", None) not in _CUSTOM:
            raise ValueError(f"Invalid computation type {computation_type}; supported are {', '.join(_CUSTOM)}")
        if computation_type in self._comp_type_to_function_map:
            _schedules().logger.warning("%s had a custom function already; the new one is used", computation_type)
        self._comp_type_to_function_map[computation_type] = custom_function

    # from a schedule to all that is done

    def _validate_and_set_stage_mapping(self, actions: _Order) -> None:
        plain = _schedules()._Action
        parts = {
            rank: [plain(*part[:3]) for action in listed if action is not None for part in _parts(action)]
            for rank, listed in actions.items()
        }
        super()._validate_and_set_stage_mapping(parts)  # type: ignore[misc]

    def _prepare_schedule_with_comms(self, actions: _Order, format: str = "compute_only") -> None:
        """A schedule of the program's that says all that is done says where gradients are scaled, too: by REDUCE_GRAD."""
        self._load_actions(actions, format)
        self._scales_where_said |= format == "compute_comms" and not any(isinstance(_, _Lowered) for _ in actions.values())

    def _load_actions(self, actions: _Order, format: str = "compute_only") -> None:
        """Its name on torch 2.8, where gradients are scaled with the last backward, whatever a schedule says."""
        self._scales_where_said = any(_is_reduction(action) for listed in actions.values() for action in listed)
        self._validate_and_set_stage_mapping(actions)
        if format == "compute_comms":
            self.pipeline_order_with_comms = {rank: list(listed) for rank, listed in actions.items()}
        elif format == "compute_only":
            _check_computations(actions)
            unsharded = {rank: _with_unshard(listed) for rank, listed in actions.items()}
            lowered = _with_transfers(unsharded, self.stage_index_to_group_rank, self._num_stages)
            self.pipeline_order_with_comms = {rank: _Lowered(listed) for rank, listed in lowered.items()}
        else:
            raise NotImplementedError(f"{format=} is not implemented")

    def _dump_csv(self, filename: str, format: str = "compute_comms") -> None:
        orders = {"compute_only": self.pipeline_order, "compute_comms": self.pipeline_order_with_comms}
        with open(filename, "w", newline="") as file:
            csv.writer(file).writerows(orders[format].values())

    # a step

    def step(
        self, *args: Any, target: Any = None, losses: list[Any] | None = None, return_outputs: bool = True, **kwargs: Any
    ) -> Any:
        """Run the whole batch through the pipeline, in microbatches, forward and backward.

        `args` and `kwargs` are the model's (positional ones on the first stage's rank), `target` is the loss function's, and
        `losses` a list that receives the loss of each microbatch. Returns the outputs where the last stage is, unless
        `return_outputs` is false.
        """
        if self._has_backward and self._backward_requires_autograd and not torch.is_grad_enabled():
            raise RuntimeError(
                "step() requires gradients to be enabled for backward computation; it was called under torch.no_grad(). "
                "Please call eval() instead."
            )
        for stage in self._stages:
            stage.has_backward = self._has_backward
            stage.clear_runtime_states()
        args_split, kwargs_split = self._split_inputs(args, kwargs)  # type: ignore[attr-defined]
        targets = None if target is None else list(torch.tensor_split(target, self._n_microbatches))
        self._step_microbatches(args_split, kwargs_split, targets, losses, return_outputs)
        last = next((stage for stage in self._stages if stage.is_last), None)
        return self._merge_outputs(last.output_chunks) if last is not None and return_outputs else None  # type: ignore[attr-defined]

    def eval(self, *args: Any, target: Any = None, losses: list[Any] | None = None, **kwargs: Any) -> Any:
        """Run the whole batch forward only; losses are computed."""
        had_backward = self._has_backward
        self._has_backward = False
        try:
            return self.step(*args, target=target, losses=losses, **kwargs)
        finally:
            self._has_backward = had_backward

    def _step_microbatches(
        self,
        arg_mbs: Any = None,
        kwarg_mbs: Any = None,
        target_mbs: Any = None,
        losses: Any = None,
        return_outputs: bool = True,
    ) -> None:
        schedules = _schedules()
        arg_mbs, kwarg_mbs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)  # type: ignore[attr-defined]
        self._prepare_stages(arg_mbs[0], kwarg_mbs[0])
        self._return_outputs = return_outputs
        self.backward_counter.clear()
        context = _PipelineContext(self, arg_mbs, kwarg_mbs, target_mbs, losses)
        actions = self.pipeline_order_with_comms[self.rank]
        complete = _last_backwards(actions) if self._has_backward and not self._scales_where_said else {}
        for position, action in enumerate(actions):
            try:
                with torch.profiler.record_function(f"PP:{action}"):
                    self._run(action, context)
                    self._scale_gradients(complete.get(position, ()))
            except Exception:
                order = schedules._format_pipeline_order(self.pipeline_order_with_comms, error_step_number=position)
                schedules.logger.error("Step %s, action %s of this schedule failed:\n%s", position, action, order)
                raise
        while self._sends:
            schedules._wait_batch_p2p(self._sends.pop())
        assert not self.unshard_ops, f"parameters gathered and not used: stages {list(self.unshard_ops)}"
        self._update_losses(self._stages, losses)  # type: ignore[attr-defined]

    def _prepare_stages(self, args: Any, kwargs: Any) -> None:
        """Allocate what transfers need; again for the first backward, since receive buffers of an eval() have no gradients."""
        if not self._stages_initialized or (self._has_backward and not self._is_ready_for_backward):
            self._initialize_stages(args, kwargs)
            self._is_ready_for_backward = self._has_backward

    def _initialize_stages(self, args: Any, kwargs: Any) -> None:
        schedules, inputs = _schedules(), args
        schedules._wait_batch_p2p(schedules._batch_p2p(_first_transfers(self._stages)))
        for stage in self._stages:
            inputs = stage._prepare_forward_infra(self._n_microbatches, args if stage.is_first else inputs, kwargs)
            if self._has_backward:
                stage._prepare_backward_infra(self._n_microbatches)
        self._stages_initialized = True

    def _run(self, action: _Action, context: _PipelineContext) -> None:
        """Do an action, or have the user's function do it; without a backward, the forward of a pair is what is done."""
        function = self._comp_type_to_function_map.get(action.computation_type)
        if function is not None and (self._has_backward or action.computation_type.name not in (*_BACKWARD, _OVERLAP)):
            function(action, context)
            return
        for part in _parts(action):
            if self._has_backward or part.computation_type.name not in _BACKWARD:
                self._perform(part, context)

    def _perform(self, action: _Action, context: _PipelineContext) -> None:
        name, microbatch = action.computation_type.name, action.microbatch_index
        perform = getattr(self, f"_do_{name.lower()}", None)
        if perform is None:
            raise ValueError(f"{action=} is unknown or unsupported")
        assert microbatch is not None or name in _OF_ALL_MICROBATCHES, f"{action=} missing mb_index"
        perform(self._stage(action.stage_index), microbatch, context)

    def _stage(self, index: int) -> Any:
        """The stage of this index, if it is on this rank."""
        return next((stage for stage in self._stages if stage.stage_index == index), None)

    def _do_send_f(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        self._sends.append(_schedules()._batch_p2p(stage.get_fwd_send_ops(microbatch)))

    def _do_send_b(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        self._sends.append(_schedules()._batch_p2p(stage.get_bwd_send_ops(microbatch)))

    def _do_recv_f(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        self._receive(self.fwd_recv_ops, stage, microbatch, stage.get_fwd_recv_ops)

    def _do_recv_b(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        self._receive(self.bwd_recv_ops, stage, microbatch, stage.get_bwd_recv_ops)

    def _receive(self, pending: dict[Any, Any], stage: Any, microbatch: int, operations: Callable[[int], Any]) -> None:
        key = (stage.stage_index, microbatch)
        assert key not in pending, f"Recv twice for stage {key[0]}, microbatch {microbatch}, without a use between"
        pending[key] = _schedules()._batch_p2p(operations(microbatch))

    def _wait(self, pending: dict[Any, Any], stage: Any, microbatch: int) -> None:
        key = (stage.stage_index, microbatch)
        assert key in pending, f"stage {key[0]} computes on microbatch {microbatch} before receiving input"
        _schedules()._wait_batch_p2p(pending.pop(key))

    def _do_forward(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        assert context.arg_mbs is not None and context.kwarg_mbs is not None
        before, after = self._stage(stage.stage_index - 1), self._stage(stage.stage_index + 1)
        self._assert_unsharded(stage)
        if not stage.is_first and before is None:
            self._wait(self.fwd_recv_ops, stage, microbatch)
        output = stage.forward_one_chunk(microbatch, context.arg_mbs[microbatch], context.kwarg_mbs[microbatch])
        self._maybe_compute_loss(stage, output, context.target_mbs, microbatch)
        if stage.is_last and not self._return_outputs:
            stage.output_chunks.clear()
        if after is not None:
            after.set_local_fwd_input(output, microbatch)

    def _maybe_compute_loss(self, stage: Any, output: Any, target_mbs: Any, mb_index: int) -> None:
        if stage.is_last and self._loss_fn is not None:  # in an eval() too
            self._internal_losses.append(self._compute_loss(output, target_mbs[mb_index]))  # type: ignore[attr-defined]

    def _do_full_backward(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        self._backward(stage, microbatch, full=True)

    def _do_backward_input(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        self._backward(stage, microbatch, full=False)

    def _backward(self, stage: Any, microbatch: int, full: bool) -> None:
        before, after = self._stage(stage.stage_index - 1), self._stage(stage.stage_index + 1)
        self._assert_unsharded(stage)
        if not stage.is_last and after is None:
            self._wait(self.bwd_recv_ops, stage, microbatch)
        loss = self._maybe_get_loss(stage, microbatch)  # type: ignore[attr-defined]
        is_last = full and self._count_backward(stage)
        stage.backward_one_chunk(microbatch, loss=loss, full_backward=full, last_backward=is_last)
        if before is not None:
            before.set_local_bwd_input(stage.get_local_bwd_output(microbatch), microbatch)

    def _do_backward_weight(self, stage: Any, microbatch: int, context: _PipelineContext) -> None:
        self._assert_unsharded(stage)
        stage.backward_weight_one_chunk(microbatch, last_backward=self._count_backward(stage))

    def _count_backward(self, stage: Any) -> bool:
        """Count a backward that gives parameters their gradients; says whether it is the stage's last."""
        self.backward_counter[stage.stage_index] += 1
        return self.backward_counter[stage.stage_index] == self._n_microbatches

    def _do_reduce_grad(self, stage: Any, microbatch: int | None, context: _PipelineContext) -> None:
        self._scale_gradients((stage.stage_index,))  # FSDP has reduced them with the stage's last backward

    def _scale_gradients(self, stages: Iterable[int]) -> None:
        for index in stages:
            self._stage(index).scale_grads(self._n_microbatches if self.scale_grads else 1)

    def _do_unshard(self, stage: Any, microbatch: int | None, context: _PipelineContext) -> None:
        index, modules = stage.stage_index, _fsdp_modules(stage)
        if modules:
            assert index not in self.unshard_ops and index not in self.unsharded_stages, f"stage {index} is unsharded twice"
            self.unshard_ops[index] = [module.unshard(async_op=True) for module in modules]

    def _do_reshard(self, stage: Any, microbatch: int | None, context: _PipelineContext) -> None:
        index, modules = stage.stage_index, _fsdp_modules(stage)
        if modules:
            assert index in self.unsharded_stages and index not in self.unshard_ops, f"stage {index} is not unsharded"
            for module in modules:
                module.reshard()
            self.unsharded_stages.remove(index)

    def _assert_unsharded(self, stage: Any) -> None:
        """Wait until the parameters of `stage` are gathered, if FSDP shards them."""
        index = stage.stage_index
        if _fsdp_modules(stage):
            for operation in self.unshard_ops.pop(index, ()):
                operation.wait()
                self.unsharded_stages.add(index)
            assert index in self.unsharded_stages, f"Attempted to compute on sharded stage {index}"


def _first_transfers(stages: Iterable[Any]) -> list[Any]:
    """What torch 2.9 sends first so that NCCL connects neighbours; gloo does not need it, nor can it send to its own rank."""
    ask = "_get_init_p2p_neighbors_ops"
    senders = [stage for stage in stages if hasattr(stage, ask) and torch.device(stage.device).type != "cpu"]
    return [transfer for stage in senders for transfer in getattr(stage, ask)()]


def _check_computations(actions: _Order) -> None:
    for rank, listed in actions.items():
        for position, action in enumerate(listed):
            if action is not None and not _is_computation(action):
                raise ValueError(
                    f"Expected compute-only schedule but found communication action '{action}' at rank {rank}, "
                    f"position {position}; sends and receives are added"
                )


def _fsdp_modules(stage: Any) -> list[Any]:
    """The modules of a stage whose parameters FSDP shards; none where the stage as a whole is not FSDP's."""
    sharded = _schedules().FSDPModule
    return (
        [module for module in stage.submod.modules() if isinstance(module, sharded)]
        if isinstance(stage.submod, sharded)
        else []
    )


@functools.cache
def _runtime_over(native: Any) -> Any:
    return _derive("_PipelineScheduleRuntime", _Runtime, native)


# the schedule


class _RankOrder:
    """One rank's order of computations; hands out microbatches in turn and remembers which weight gradients are due."""

    def __init__(self) -> None:
        self.actions: list[_Action] = []
        self._kinds = _schedules()._ComputationType
        self._num_started: Counter[tuple[int, bool]] = Counter()
        self._due: deque[tuple[int, int]] = deque()

    def forward(self, stage: int) -> None:
        self.actions.append(self._next(stage, self._kinds.FORWARD))

    def backward(self, stage: int, split: bool = False) -> None:
        """A backward; if `split`, only for the stage's inputs: its `weight` comes later."""
        action = self._next(stage, self._kinds.BACKWARD_INPUT if split else self._kinds.FULL_BACKWARD)
        self.actions.append(action)
        if split:
            self._due.append((stage, action.microbatch_index))

    def weight(self) -> None:
        stage, microbatch = self._due.popleft()
        self.actions.append(_action(stage, self._kinds.BACKWARD_WEIGHT, microbatch))

    def overlap(self, forward: int, backward: int) -> None:
        parts = (self._next(forward, self._kinds.FORWARD), self._next(backward, self._kinds.FULL_BACKWARD))
        self.actions.append(_action(-1, _overlap(), None, parts))

    def _next(self, stage: int, kind: Any) -> _Action:
        counter = (stage, kind is self._kinds.FORWARD)
        self._num_started[counter] += 1
        return _action(stage, kind, self._num_started[counter] - 1)


def _dual_pipe_order(rank: int, num_ranks: int, num_microbatches: int) -> list[_Action]:
    """What `rank` computes, in order. It has two stages: `down` on the way to the end of the V, `up` on the way back."""
    down, up = rank, 2 * num_ranks - 1 - rank
    num_below = num_ranks - 1 - rank
    order = _RankOrder()
    for _ in range(2 * num_below):  # fill the pipeline
        order.forward(down)
    for _ in range(rank + 1):
        order.forward(down)
        order.forward(up)
    for _ in range(num_below):  # the first backwards arrive
        order.backward(up, split=True)
        order.weight()
        order.forward(up)
    for turn in range(num_microbatches - 2 * num_ranks + rank + 1):  # the steady state: pairs, and no rank waits
        if turn == 0 and num_below == 0:  # this one waits for its own forward: a pair would make the bubble larger
            order.forward(down)
            order.backward(up)
        else:
            order.overlap(forward=down, backward=up)
        order.overlap(forward=up, backward=down)
    for _ in range(num_below):
        order.backward(up)
        order.overlap(forward=up, backward=down)
    for turn in range(2 * (rank + 1)):  # drain: weight gradients are put off from half way, to fill what would be idle
        order.backward(up if turn % 2 == 0 else down, split=turn > rank)
    for _ in range(num_below):
        order.weight()
        order.backward(down, split=True)
    for _ in range(rank + 1):
        order.weight()
    return order.actions


class _DualPipeV:
    """The DualPipeV schedule: two stages a rank in a V, with the forward of one microbatch next to the backward of another.

    DualPipe is of the DeepSeek-V3 report (https://arxiv.org/abs/2412.19437), its V form of
    https://github.com/deepseek-ai/DualPipe. `stages` are this rank's two; there are at least as many microbatches as stages.
    """

    def __init__(
        self,
        stages: list[Any],
        n_microbatches: int,
        loss_fn: Callable[..., Any] | None = None,
        args_chunk_spec: tuple[Any, ...] | None = None,
        kwargs_chunk_spec: dict[str, Any] | None = None,
        output_merge_spec: dict[str, Any] | tuple[Any] | None = None,
        scale_grads: bool = True,
        backward_requires_autograd: bool = True,
    ) -> None:
        _refuse_compiled(stages, type(self).__name__)
        options: dict[str, Any] = {
            "args_chunk_spec": args_chunk_spec,
            "kwargs_chunk_spec": kwargs_chunk_spec,
            "output_merge_spec": output_merge_spec,
            "scale_grads": scale_grads,
            "backward_requires_autograd": backward_requires_autograd,
        }
        super().__init__(stages=stages, n_microbatches=n_microbatches, loss_fn=loss_fn, **options)  # type: ignore[call-arg]
        self.pp_group_size, self.rank = stages[0].group_size, stages[0].group_rank
        self.num_stages, self.n_local_stages = stages[0].num_stages, len(stages)
        _schedules().generate_stage_to_rank_mapping(self.pp_group_size, self.num_stages, style="v")  # refuses what is no V
        _check_sizes(self.n_local_stages, self.num_stages, n_microbatches)
        self.pipeline_order = {rank: self._calculate_single_rank_operations(rank) for rank in range(self.pp_group_size)}
        self._prepare_schedule_with_comms(self.pipeline_order)  # type: ignore[attr-defined]
        BACKPORT.record_use("ScheduleDualPipeV")

    def _calculate_single_rank_operations(self, rank: int) -> list[_Action]:
        return _dual_pipe_order(rank, self.pp_group_size, self._n_microbatches)  # type: ignore[attr-defined]


def _check_sizes(num_local: int, num_stages: int, num_microbatches: int) -> None:
    if num_local != 2:
        raise ValueError(f"DualPipeV requires exactly 2 stages per rank, but got {num_local}.")
    if num_microbatches < num_stages:
        raise ValueError(
            "DualPipeV requires at least as many microbatches as stages, but got "
            f"{num_microbatches} microbatches and {num_stages} stages."
        )


def _refuse_compiled(stages: Iterable[Any], schedule: str) -> None:
    """A backward that is split into its inputs' and its weights' needs autograd nodes that a compiled module does not have."""
    compiled = _schedules().OptimizedModule
    for stage in stages:
        if isinstance(stage.submod, torch.nn.Module) and any(isinstance(part, compiled) for part in stage.submod.modules()):
            raise RuntimeError(
                f"The {schedule} schedule is not supported with stage modules that have used torch.compile; "
                f"stage {stage.stage_index} has one"
            )


@functools.cache
def _dual_pipe_v_over(runtime: Any) -> Any:
    return _derive("ScheduleDualPipeV", _DualPipeV, runtime)


def _dual_pipe_v(_: Any = None) -> Any:
    return _dual_pipe_v_over(_runtime_over(_native(_schedules()._PipelineScheduleRuntime)))


# the places


def _with_dual_pipe_v(get_schedule_class: Callable[[str], Any]) -> Callable[[str], Any]:
    """The look-up of a schedule by its name, with DualPipeV."""

    @functools.wraps(get_schedule_class)
    def get(schedule_name: str) -> Any:
        if schedule_name.lower() == "dualpipev":
            return _dual_pipe_v()
        try:
            return get_schedule_class(schedule_name)
        except ValueError as error:
            if "DualPipeV" in str(error):
                raise
            raise ValueError(f"{str(error).removesuffix(']')}, 'DualPipeV']") from None

    return get


def _with_export(names: list[str]) -> list[str]:
    return names if "ScheduleDualPipeV" in names else [*names, "ScheduleDualPipeV"]


def _rank_to_stages(native: Any) -> Any:
    """``generate_rank_to_stage_mapping``: torch's own or ours."""
    if native is not None:
        return native

    def generate_rank_to_stage_mapping(pp_size: int, num_stages: int, style: str = "loop") -> dict[int, list[int]]:
        """The stages of each rank, in rising order, where ranks take stages in a loop or in a V."""
        from torch.distributed.pipelining._utils import generate_stage_to_rank_mapping

        stages: dict[int, list[int]] = {rank: [] for rank in range(pp_size)}
        for stage, rank in generate_stage_to_rank_mapping(pp_size, num_stages, style).items():
            stages[rank].append(stage)
        return stages

    return generate_rank_to_stage_mapping


def _lacks(module: types.ModuleType | None) -> bool:
    return not hasattr(_native(getattr(module, "_PipelineScheduleRuntime", object)), "register_custom_function")


_KIND = "_ComputationType"


def _if_no_overlap(build: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda old: old if _OVERLAP in _schedules()._ComputationType.__members__ else build(old)


BACKPORT = Backport(
    name="dual_pipe_v",
    summary="ScheduleDualPipeV, OVERLAP_F_B, and custom functions for the actions of a pipeline's schedule",
    target=_PLACE,
    since="2.10.0",
    came={"2.9.0": ("OVERLAP_F_B",)},
    upstream="https://github.com/pytorch/pytorch/pull/162016",  # the schedule itself, since 2.9: pull/159591
    differs=(
        "schedules put no REDUCE_GRAD in: FSDP reduces a stage's gradients with its last backward, and they are scaled there, "
        "or where a schedule of compute_comms says REDUCE_GRAD; an action's sub_actions are an attribute and no fourth entry; "
        "options of later releases are not taken (defer_pp_recv, max_active_stages, loss_kwargs, ...); eval() works, where "
        "torch's own fails for stages that follow each other on one rank, and does not call a custom function of a backward or "
        "of a pair"
    ),
    names={
        _OVERLAP: _overlap,
        "_PipelineContext": lambda: _PipelineContext,
        "_CustomFunctionProtocol": lambda: _CustomFunctionProtocol,
    },
    replaces={
        "_PipelineScheduleRuntime": lambda old: _runtime_over(_native(old)),
        "_Action": lambda old: _action_over(_native(old)),
        "get_schedule_class": _with_dual_pipe_v,
        "__all__": _with_export,
    },
    also=(
        # the enumeration gets its member in place: torch compares members by identity. First the attribute and what asks
        # whether the member is there; a class refuses to set or delete an attribute that its map of members has
        Change(_PLACE, f"{_KIND}.__str__", _if_no_overlap(_with_overlap_shown)),
        Change(_PLACE, f"{_KIND}.from_str", _if_no_overlap(_with_overlap_read)),
        Change(_PLACE, f"{_KIND}.{_OVERLAP}", lambda old: old or _overlap(), create=True),
        Change(_PLACE, f"{_KIND}._member_names_", lambda old: old if _OVERLAP in old else [*old, _OVERLAP]),
        Change(_PLACE, f"{_KIND}._value2member_map_", lambda old: old if 11 in old else {**old, 11: _overlap()}),
        Change(_PLACE, f"{_KIND}._member_map_", lambda old: old if _OVERLAP in old else {**old, _OVERLAP: _overlap()}),
        # where there is no name to be looked up late: the classes that torch 2.9 has are without custom functions
        Change(_PLACE, "ScheduleDualPipeV", _dual_pipe_v, create=True),
        Change(_PACKAGE, "ScheduleDualPipeV", _dual_pipe_v, create=True),
        Change(_PACKAGE, "__all__", _with_export),
        Change(f"{_PACKAGE}._backward", "stage_backward_weight", lambda _: _backward_weight),
        Change(f"{_PACKAGE}.stage", "stage_backward_weight", lambda _: _backward_weight),
        Change(f"{_PACKAGE}._utils", "generate_rank_to_stage_mapping", _rank_to_stages, create=True),
    ),
    lacks=_lacks,
)
