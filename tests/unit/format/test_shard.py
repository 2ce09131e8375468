"""Boxes against sets of items, which are slow and surely right."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.format.shard import Box, missing_boxes

SHAPES = st.lists(st.integers(0, 4), max_size=3).map(tuple)


def items(box: Box) -> set[tuple[int, ...]]:
    sides = zip(box.offsets, box.lengths, strict=True)
    return set(itertools.product(*(range(offset, offset + length) for offset, length in sides)))


@st.composite
def boxes_of(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    offsets = tuple(draw(st.integers(0, size)) for size in shape)
    lengths = tuple(draw(st.integers(0, size - offset)) for size, offset in zip(shape, offsets, strict=True))
    return Box(offsets, lengths)


@st.composite
def shape_and_boxes(draw: st.DrawFn, num: int) -> tuple[tuple[int, ...], list[Box]]:
    shape = draw(SHAPES)
    return shape, [draw(boxes_of(shape)) for _ in range(num)]


@given(shape_and_boxes(2))
def test_intersect_any_boxes_is_the_common_items(case: tuple[tuple[int, ...], list[Box]]) -> None:
    _, (a, b) = case
    common = a.intersect(b)
    assert (items(common) if common else set()) == items(a) & items(b)


@given(shape_and_boxes(2))
def test_subtract_any_boxes_is_the_other_items_each_once(case: tuple[tuple[int, ...], list[Box]]) -> None:
    _, (a, b) = case
    rest = a.subtract(b)
    assert set().union(*map(items, rest)) == items(a) - items(b)
    assert sum(box.numel for box in rest) == len(items(a) - items(b))
    assert all(box.numel for box in rest)


def test_subtract_every_pair_of_boxes_in_a_square_leaves_each_other_item_once() -> None:
    sides = [(offset, length) for offset in range(3) for length in range(1, 4 - offset)]
    boxes = [Box((a, b), (m, n)) for (a, m), (b, n) in itertools.product(sides, sides)]
    for a, b in itertools.product(boxes, boxes):
        rest = [item for box in a.subtract(b) for item in items(box)]
        assert sorted(rest) == sorted(items(a) - items(b))


@given(SHAPES.flatmap(lambda shape: st.tuples(st.just(shape), st.lists(boxes_of(shape), max_size=6))))
def test_missing_boxes_any_cover_is_what_no_box_has(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    missing = missing_boxes(shape, boxes)
    covered = set().union(*map(items, boxes))
    assert set().union(*map(items, missing)) == items(Box.whole(shape)) - covered
    assert sum(box.numel for box in missing) == len(items(Box.whole(shape)) - covered)


@given(shape_and_boxes(1))
def test_is_whole_any_box_says_whether_it_is_the_tensor(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, (box,) = case
    assert box.is_inside(shape)
    assert box.is_whole(shape) == (box == Box((0,) * len(shape), shape))


@pytest.mark.parametrize(
    "box",
    [Box((0,), (3,)), Box((-1, 0), (1, 1)), Box((0, 0), (3, 1)), Box((2, 0), (1, 2)), Box((0, 0), (-1, 1))],
)
def test_is_inside_box_that_leaves_the_shape_is_false(box: Box) -> None:
    assert not box.is_inside((2, 2))


def test_box_of_tensor_without_dimensions_has_one_item() -> None:
    box = Box.whole(())
    assert box.numel == 1
    assert box.intersect(box) == box
    assert box.subtract(box) == []
    assert missing_boxes((), []) == [box]
