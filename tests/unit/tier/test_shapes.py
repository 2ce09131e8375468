"""One request or parts: both are tried, the faster stays, and what a store refuses is not tried again."""

from __future__ import annotations

import pytest

from ktrain.tier.shapes import Shape, Shapes


@pytest.mark.parametrize(("slow", "fast"), [(Shape.PARTS, Shape.ONE), (Shape.ONE, Shape.PARTS)])
def test_shapes_try_both_then_the_faster_and_the_other_at_times(slow: Shape, fast: Shape) -> None:
    shapes, chosen = Shapes(), []
    for _ in range(40):
        shape = shapes.choose()
        shapes.took(shape, 100, 2.0 if shape is slow else 1.0)
        chosen.append(shape)
    assert chosen[:2] == [Shape.PARTS, Shape.ONE]
    assert chosen[2:].count(slow) == 2, "each sixteenth"


def test_shapes_follow_a_store_that_changes() -> None:
    shapes, seconds = Shapes(), {Shape.PARTS: 2.0, Shape.ONE: 1.0}
    for number in range(79):  # the 80th is a look at the other way
        if number == 20:
            seconds[Shape.ONE] = 10.0
        shape = shapes.choose()
        shapes.took(shape, 100, seconds[shape])
    assert shape is Shape.PARTS


def test_shape_that_failed_is_not_chosen_again() -> None:
    shapes = Shapes()
    shapes.took(Shape.PARTS, 100, 1.0)
    assert shapes.choose() is Shape.ONE
    shapes.failed(Shape.ONE)
    assert {shapes.choose() for _ in range(100)} == {Shape.PARTS}
