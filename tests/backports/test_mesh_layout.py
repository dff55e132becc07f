"""Layouts of meshes: sizes and strides in one form, and the ranks that they give."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.usefixtures("environment")


@pytest.fixture
def layouts(environment: Any) -> Any:
    """The module; from torch 2.10 to 2.12 it had one class, of another form."""
    from torch.distributed import _mesh_layout

    if not hasattr(_mesh_layout, "_FlatLayout"):
        pytest.skip("this torch has the module in its first form")
    return _mesh_layout


@pytest.mark.parametrize(
    ("shape", "stride", "expected"),
    [
        (8, None, ((8,), (1,))),
        ((2, 4), None, ((8,), (1,))),
        ((2, 4), (1, 2), ((2, 4), (1, 2))),
        ((2, (3, 1)), (12, (4, 7)), ((6,), (4,))),
        ((2, 2), (8, 1), ((2, 2), (8, 1))),
        (1, 5, ((), ())),
    ],
)
def test_equal_layouts_have_one_form(layouts: Any, shape: Any, stride: Any, expected: Any) -> None:
    layout = layouts._FlatLayout(shape, stride)
    assert (layout.shape, layout.stride) == expected
    assert layout == layouts._FlatLayout(*expected) and hash(layout) == hash(layouts._FlatLayout(*expected))
    assert list(layout.sizes_and_strides) == list(zip(*expected))
    with pytest.raises(RuntimeError):
        len(layout)
    with pytest.raises(RuntimeError):
        layout[0]


def test_what_is_no_layout_is_an_error(layouts: Any) -> None:
    with pytest.raises(TypeError, match="shape must be a tuple or int"):
        layouts._FlatLayout([2, 3])
    with pytest.raises(TypeError, match="stride must be a tuple or int"):
        layouts._FlatLayout((2, 3), 1.5)
    with pytest.raises(ValueError, match="don't match"):
        layouts._FlatLayout((2, 3), (1, (2,)))
    with pytest.raises(ValueError, match="same length"):
        layouts._MeshLayout.from_sizes_strides((2, 3), (1,))


@pytest.mark.parametrize(("shape", "stride"), [((4,), (1,)), ((2, 3), (12, 1)), ((2, 2), (2, 8)), ((), ())])
def test_an_axis_and_its_complement_make_up_all_ranks(layouts: Any, shape: Any, stride: Any) -> None:
    layout = layouts._FlatLayout(shape, stride)
    places = itertools.product(*map(range, shape))
    ranks = [sum(place * step for place, step in zip(row, stride)) for row in places]
    assert layout.all_ranks_from_zero() == ranks and layout.numel() == len(ranks)
    copies = layout.global_ranks(48)
    assert copies[0] == ranks and sorted(itertools.chain.from_iterable(copies)) == list(range(48))
    assert len(copies) == layout.complement(48).numel()


@pytest.mark.parametrize(
    ("shape", "stride", "is_sorted", "is_orthogonal"),
    [((2, 3), (6, 1), True, True), ((2, 3), (2, 1), True, False), ((4, 2), (1, 1), True, False), ((2, 3), (1, 4), False, True)],
)
def test_layouts_tell_whether_a_rank_comes_twice(
    layouts: Any, shape: Any, stride: Any, is_sorted: bool, is_orthogonal: bool
) -> None:
    layout = layouts._FlatLayout(shape, stride)
    assert (layout.check_sorted(), layout.check_orthogonal()) == (is_sorted, is_orthogonal)


def test_a_layout_takes_ranks_out_of_another(layouts: Any) -> None:
    whole = layouts._FlatLayout((6, 2), (4, 1))
    for sizes, strides in [((12,), (1,)), ((3,), (2,)), ((3, 2), (4, 2)), ((6, 2), (2, 1)), ((2, 3), (6, 2))]:
        selection = layouts._MeshLayout.from_sizes_strides(sizes, strides)
        result = whole.composition(selection)
        assert result.top_level_sizes == sizes and len(result) == len(sizes)
        ranks = whole.all_ranks_from_zero()
        for axis, chosen in zip(result, selection):
            assert axis.all_ranks_from_zero() == [ranks[position] for position in chosen.all_ranks_from_zero()]


def test_a_mesh_is_a_sequence_of_axes(layouts: Any) -> None:
    mesh = layouts._MeshLayout.from_sizes_strides((2, 3, 4))
    assert (len(mesh), mesh.top_level_sizes, mesh.numel(), mesh.cosize()) == (3, (2, 3, 4), 24, 24)
    assert mesh[1] == layouts._FlatLayout(3, 4) and list(mesh[1:]) == list(mesh)[1:]
    assert isinstance(mesh[1:], layouts._MeshLayout)
    assert mesh.collapse() == layouts._FlatLayout(24)
    cut = mesh.splice(2, 3, layouts._MeshLayout.from_sizes_strides((2, 2)))
    assert cut.top_level_sizes == (2, 3, 2, 2) and cut.collapse() == mesh.collapse()
    assert layouts._MeshLayout.from_sizes_strides((2, 2), (8, 1)).cosize() == 10


def test_a_mesh_gives_the_ranks_of_every_copy_of_it(layouts: Any) -> None:
    ranks = torch.arange(100, 108)
    rows = layouts._MeshLayout.from_sizes_strides((2, 2), (4, 1)).remap_to_tensor(ranks)
    assert rows.tolist() == [[[100, 101], [104, 105]], [[102, 103], [106, 107]]]
    with pytest.raises(AssertionError):
        layouts._MeshLayout.from_sizes_strides((2, 8)).remap_to_tensor(ranks)
