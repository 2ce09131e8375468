"""Parts of large writes: threads, sizes, and who lets go of what."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest

from ktrain.tier.parts import part_nbytes, side_by_side


@pytest.fixture
def without_collector() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


def test_side_by_side_does_every_item_once() -> None:
    done: list[int] = []
    side_by_side(done.append, range(100), num_threads=4, name="test")
    assert sorted(done) == list(range(100))


def test_side_by_side_works_on_several_at_a_time() -> None:
    together = threading.Barrier(3)
    side_by_side(lambda item: together.wait(30), range(3), num_threads=3, name="test")
    assert not together.broken


def test_side_by_side_first_error_stops_what_has_not_begun() -> None:
    done: list[int] = []

    def work(item: int) -> None:
        done.append(item)
        raise ValueError(item)

    with pytest.raises(ValueError):
        side_by_side(work, range(100), num_threads=2, name="test")
    assert len(done) <= 2


def test_side_by_side_error_lets_go_of_the_callers_buffer(without_collector: None) -> None:
    buffer = bytearray(100)

    def work(begin: int) -> None:
        part = memoryview(buffer)[begin : begin + 10]
        raise ValueError(len(part))

    for num_threads in (1, 3):
        try:
            side_by_side(work, range(0, 100, 10), num_threads=num_threads, name="test")
        except ValueError:
            pass
        buffer.append(0)  # refused while a view of it is alive


@pytest.mark.parametrize(
    ("nbytes", "expected"), [(0, 16), (100, 16), (16 * 9, 16), (16 * 9 + 1, 20), (1000, 112), (1001, 112)]
)
def test_part_size_is_whole_chunks_and_no_more_parts_than_allowed(nbytes: int, expected: int) -> None:
    assert part_nbytes(nbytes, 16, 9, 4) == expected
