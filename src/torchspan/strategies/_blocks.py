"""The blocks of a model: what it repeats, found by structure and not by name, in the order in which the model holds them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def repeated_blocks(model: nn.Module) -> list[list[nn.Module]]:
    """The blocks of `model` by kind: those of one kind are of the same structure.

    >>> block = lambda width: nn.TransformerEncoderLayer(width, 2, 8)
    >>> [len(kind) for kind in repeated_blocks(nn.Sequential(nn.Linear(4, 4), block(4), block(4), block(8)))]
    [2]
    """
    return kinds_of(blocks_of(model))


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that occur at least twice with the same structure; a block's place in this list is its number.

    A module in the same ModuleList as such a block is a block too, even if its structure differs. So the blocks of a model
    whose first layers differ are numbered as in its list.

    >>> block = lambda width: nn.TransformerEncoderLayer(4, 2, width)
    >>> [layer.linear1.out_features for layer in blocks_of(nn.ModuleList([block(16), block(8), block(8)]))]
    [16, 8, 8]
    """
    occurrences: dict[Hashable, int] = {}
    for module in model.modules():
        if module is not model and may_be_block(module):
            occurrences[structure(module)] = occurrences.get(structure(module), 0) + 1
    outermost = {id(module): (module, container) for module, container in _outermost(model, occurrences)}.values()
    counts = Counter(structure(module) for module, _ in outermost)
    lists = {id(container) for module, container in outermost if container is not None and counts[structure(module)] > 1}
    return [module for module, container in outermost if counts[structure(module)] > 1 or id(container) in lists]


def kinds_of(modules: Iterable[Module]) -> list[list[Module]]:
    """`modules` by structure, in the order of their first."""
    kinds: dict[Hashable, list[Module]] = {}
    for module in modules:
        kinds.setdefault(structure(module), []).append(module)
    return list(kinds.values())


def kind_name(kind: Sequence[nn.Module], names: Mapping[int, str]) -> str:
    """What a Report calls modules of one kind: the name of one, from `names` by id; the class and the number of several."""
    return names[id(kind[0])] if len(kind) == 1 else f"{type(kind[0]).__name__} ×{len(kind)}"


def distinct(modules: Iterable[Module]) -> list[Module]:
    """Each module once: a model may hold the same one in several places."""
    return list({id(module): module for module in modules}.values())


def may_be_block(module: nn.Module) -> bool:
    """Whether it computes (a container of modules does not) and holds more than one operation's weights."""
    return not is_container(module) and any(True for _ in module.children()) and any(True for _ in module.parameters())


def is_container(module: nn.Module) -> bool:
    """Whether it only holds others, and cannot be called."""
    return isinstance(module, (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict))


def structure(module: nn.Module) -> Hashable:
    """What is equal for modules that one compile may serve: class, and names, shapes, dtypes and devices of tensors."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return type(module), tuple((name, tuple(tensor.shape), tensor.dtype, tensor.device) for name, tensor in tensors)


def _outermost(module: nn.Module, occurrences: dict[Hashable, int]) -> Iterator[tuple[nn.Module, nn.ModuleList | None]]:
    """The outermost blocks inside `module`, each with the ModuleList that holds it."""
    children = list(module.children())
    is_block = [may_be_block(child) and occurrences[structure(child)] > 1 for child in children]
    container = module if isinstance(module, nn.ModuleList) and any(is_block) else None
    for child, is_repeated in zip(children, is_block, strict=True):
        if is_repeated or (container is not None and may_be_block(child)):
            yield child, container
        else:
            yield from _outermost(child, occurrences)
