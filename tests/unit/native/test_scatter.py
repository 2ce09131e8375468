from __future__ import annotations

import array
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain import native
from ktrain.errors import ConfigError
from tests.unit.native import oracle

EMPTY = 0xEE


@dataclass(frozen=True)
class Row:
    """One row of runs and the memory it goes to, filled with a pattern that must stay between the runs."""

    offset: int
    nbytes: int
    count: int
    source_step: int
    target_step: int
    target: np.ndarray

    def expected(self, source: bytes, begin: int, good: set[int], chunk_nbytes: int) -> bytes:
        """The target after the scatter, byte by byte."""
        found = bytearray([EMPTY] * self.target.nbytes)
        for run in range(self.count):
            for index in range(self.nbytes):
                at = self.offset + run * self.source_step + index - begin
                if 0 <= at < len(source) and at // chunk_nbytes in good:
                    found[run * self.target_step + index] = source[at]
        return bytes(found)


def row(offset: int, nbytes: int, count: int = 1, source_gap: int = 0, target_gap: int = 0) -> Row:
    steps = nbytes + source_gap, nbytes + target_gap
    return Row(offset, nbytes, count, *steps, np.full(max(1, count) * steps[1], EMPTY, np.uint8))


def runs_of(rows: list[Row]) -> native.Runs:
    columns = [
        [each.target.ctypes.data for each in rows],
        *([getattr(each, name) for each in rows] for name in native.Runs.__slots__[1:]),
    ]
    return native.Runs(*(array.array("Q", column) for column in columns))


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Row], int]:
    sizes = st.integers(0, 60)
    rows = [
        row(draw(st.integers(0, 700)), draw(sizes), draw(st.integers(0, 9)), draw(sizes), draw(sizes))
        for _ in range(draw(st.integers(0, 8)))
    ]
    return sorted(rows, key=lambda each: each.offset), draw(st.integers(1, 90))


@given(
    case=cases(),
    source=st.binary(max_size=600),
    first_chunk=st.integers(0, 3),
    num_threads=st.integers(1, 4),
    spoilt=st.sets(st.integers(0, 20)),
)
def test_prove_scatter_of_any_runs_equals_copying_byte_by_byte_from_good_chunks(
    case: tuple[list[Row], int], source: bytes, first_chunk: int, num_threads: int, spoilt: set[int]
) -> None:
    rows, chunk_nbytes = case
    begin = first_chunk * chunk_nbytes
    digests = oracle.digests(source, chunk_nbytes)
    bad = sorted(index for index in spoilt if index < len(digests))
    for index in bad:
        digests[index] ^= 1 << 63
    expected = array.array("Q", digests)
    found = native.prove_scatter(
        source, runs_of(rows), begin=begin, chunk_nbytes=chunk_nbytes, expected=expected, num_threads=num_threads
    )
    assert found == bad
    good = set(range(len(digests))) - set(bad)
    for each in rows:
        assert each.target.tobytes() == each.expected(source, begin, good, chunk_nbytes)


@pytest.mark.parametrize("num_threads", [1, 3])
def test_prove_scatter_of_many_large_runs_copies_every_byte(num_threads: int) -> None:
    # Large enough for the stores that go past the caches; the rows of a box beside plain pieces.
    source = np.random.default_rng(random.getrandbits(32)).integers(0, 256, 5_000_003, np.uint8)
    rows = [row(17, 1_500_001), row(1_600_000, 5_000, 300, source_gap=3_000, target_gap=64), row(4_100_000, 900_003)]
    expected = array.array("Q", native.digest_chunks(source, chunk_nbytes=131_072))
    found = native.prove_scatter(
        source, runs_of(rows), begin=0, chunk_nbytes=131_072, expected=expected, num_threads=num_threads
    )
    assert found == []
    for each in (rows[0], rows[2]):
        assert np.array_equal(each.target, source[each.offset : each.offset + each.nbytes])
    box = np.lib.stride_tricks.as_strided(source[1_600_000:], (300, 5_000), (8_000, 1))
    assert np.array_equal(rows[1].target.reshape(300, 5_064)[:, :5_000], box)
    assert (rows[1].target.reshape(300, 5_064)[:, 5_000:] == EMPTY).all()


def test_prove_scatter_without_runs_names_the_bad_chunks() -> None:
    data = random.randbytes(1000)
    expected = array.array("Q", oracle.digests(data, 100))
    expected[3] ^= 1
    found = native.prove_scatter(data, native.NO_RUNS, begin=0, chunk_nbytes=100, expected=expected)
    assert found == [3]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([(0, 1, 5, 1, 0, 0), (0, 1, 4, 1, 0, 0)], "row 1 begins before"),
        ([(0, 4, 0, 2, 3, 4)], "row 0: its runs overlap"),
        ([(0, 1 << 63, 1, 1, 0, 0)], "row 0 ends beyond"),
        ([(0, 8, 0, 1 << 62, 8, 8)], "row 0 ends beyond"),
        ([(0, 8, 0, 3, 8, 1 << 62)], "row 0 ends beyond"),
    ],
)
def test_prove_scatter_with_bad_runs_names_the_row(rows: list[tuple[int, ...]], told: str) -> None:
    runs = native.Runs(*(array.array("Q", column) for column in zip(*rows, strict=True)))
    with pytest.raises(ConfigError, match=told):
        native.prove_scatter(
            bytes(10), runs, begin=0, chunk_nbytes=10, expected=array.array("Q", [native.crc64(bytes(10))])
        )


@pytest.mark.parametrize(
    ("begin", "expected"), [(0, array.array("Q", [0, 0])), (5, array.array("Q", [0])), (0, array.array("I", [0]))]
)
def test_prove_scatter_with_digests_that_do_not_fit_raises_config_error(begin: int, expected: array.array) -> None:
    with pytest.raises(ConfigError):
        native.prove_scatter(bytes(10), native.NO_RUNS, begin=begin, chunk_nbytes=10, expected=expected)
