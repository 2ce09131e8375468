from __future__ import annotations

import ctypes
import random
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain import native
from ktrain.errors import ConfigError
from tests.unit.native import oracle


@dataclass(frozen=True)
class Piece:
    """A source that lives as long as the test, and where it goes."""

    source: np.ndarray
    offset: int

    @property
    def segment(self) -> native.Segment:
        return native.Segment(self.source.ctypes.data, self.source.nbytes, self.offset)


@st.composite
def gather_cases(draw: st.DrawFn) -> tuple[bytes, list[Piece]]:
    """A target's bytes and disjoint pieces, sorted, with gaps and empty pieces between."""
    pieces = []
    end = 0
    for _ in range(draw(st.integers(0, 8))):
        end += draw(st.integers(0, 200))
        data = draw(st.binary(max_size=300))
        shift = draw(st.integers(0, 3))
        pieces.append(Piece(np.frombuffer(bytes(shift) + data, np.uint8)[shift:].copy(), end))
        end += len(data)
    return draw(st.randoms(use_true_random=False)).randbytes(end + draw(st.integers(0, 200))), pieces


def assemble(target: bytes, pieces: list[Piece]) -> bytes:
    result = bytearray(target)
    for piece in pieces:
        result[piece.offset : piece.offset + piece.source.nbytes] = piece.source.tobytes()
    return bytes(result)


def address_of(data: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(data))


@given(data=st.binary(max_size=2000), chunk_nbytes=st.integers(1, 700), num_threads=st.integers(1, 4))
def test_copy_digest_of_any_bytes_copies_and_equals_the_oracle(
    data: bytes, chunk_nbytes: int, num_threads: int
) -> None:
    target = bytearray(len(data))
    digests = native.copy_digest(target, data, chunk_nbytes=chunk_nbytes, num_threads=num_threads)
    assert target == data
    assert digests == oracle.digests(data, chunk_nbytes)


@pytest.mark.parametrize("target_shift", [0, 1, 63])
def test_copy_digest_of_many_blocks_copies_exactly_the_bytes(target_shift: int) -> None:
    # Large enough for the stores that go past the caches, with odd ends.
    nbytes = (5 << 20) + 3
    source = np.random.default_rng(random.getrandbits(32)).integers(0, 256, nbytes, np.uint8)
    room = np.full(nbytes + 128, 0xEE, np.uint8)
    target = room[target_shift : target_shift + nbytes]
    digests = native.copy_digest(target, source, chunk_nbytes=1_000_003, num_threads=2)
    assert np.array_equal(target, source)
    assert (room[:target_shift] == 0xEE).all()
    assert (room[target_shift + nbytes :] == 0xEE).all()
    assert digests == native.digest_chunks(source, chunk_nbytes=1_000_003)


@given(case=gather_cases(), chunk_nbytes=st.integers(1, 900), num_threads=st.integers(1, 4))
def test_gather_digest_of_any_segments_equals_assembling_by_hand(
    case: tuple[bytes, list[Piece]], chunk_nbytes: int, num_threads: int
) -> None:
    before, pieces = case
    target = bytearray(before)
    segments = [piece.segment for piece in pieces]
    digests = native.gather_digest(target, segments, chunk_nbytes=chunk_nbytes, num_threads=num_threads)
    expected = assemble(before, pieces)
    assert target == expected
    assert digests == oracle.digests(expected, chunk_nbytes)


def test_gather_digest_of_large_segments_around_a_header_keeps_the_header() -> None:
    rng = np.random.default_rng(random.getrandbits(32))
    pieces = [Piece(rng.integers(0, 256, 3_000_001, np.uint8), 4096)]
    pieces.append(Piece(rng.integers(0, 256, 2_500_000, np.uint8), 4096 + 3_000_001))
    before = b"header" + bytes(4090) + bytes(5_500_101)
    target = bytearray(before)
    segments = [piece.segment for piece in pieces]
    digests = native.gather_digest(target, segments, chunk_nbytes=1 << 20, num_threads=2)
    assert target == assemble(before, pieces)
    assert digests == native.digest_chunks(target, chunk_nbytes=1 << 20)


@pytest.mark.parametrize("dtype", [np.int64, np.uint64])
def test_gather_digest_with_columns_does_what_segments_do(dtype: type) -> None:
    source = np.arange(100, dtype=np.uint8)
    columns = tuple(np.array([word], dtype) for word in (source.ctypes.data, 100, 20))
    target = bytearray(150)
    digests = native.gather_digest(target, columns, chunk_nbytes=64)
    assert target[20:120] == source.tobytes()
    assert digests == oracle.digests(bytes(target), 64)


def test_gather_digest_with_three_segments_in_a_tuple_takes_them_as_segments() -> None:
    source = np.arange(3, dtype=np.uint8) + 1
    segments = tuple(native.Segment(source.ctypes.data + i, 1, i) for i in range(3))
    target = bytearray(3)
    native.gather_digest(target, segments, chunk_nbytes=64)
    assert target == b"\x01\x02\x03"


def test_gather_digest_with_nothing_to_do_returns_the_digests_of_the_target() -> None:
    assert native.gather_digest(bytearray(b"abc"), [], chunk_nbytes=8) == [oracle.crc64(b"abc")]
    assert native.gather_digest(bytearray(), [], chunk_nbytes=8) == []


@pytest.mark.parametrize(
    ("segments", "told"),
    [
        ([(0, 10, 0), (0, 10, 5)], "segment 1"),
        ([(0, 101, 0)], "100 bytes"),
        ([(0, 1, 100)], "segment 0"),
        ([(0, (1 << 64) - 1, 2)], "segment 0"),
        ([(-1, 1, 0)], "gather"),
        ([(0, 1, 1 << 64)], "gather"),
    ],
)
def test_gather_digest_with_bad_segment_names_it_and_writes_nothing(
    segments: list[tuple[int, int, int]], told: str
) -> None:
    target = bytearray(b"\x55" * 100)
    with pytest.raises(ConfigError, match=told):
        native.gather_digest(target, [native.Segment(*words) for words in segments], chunk_nbytes=10)
    assert target == b"\x55" * 100


@pytest.mark.parametrize(
    "columns",
    [
        (np.zeros(1, np.int64), np.zeros(2, np.int64), np.zeros(1, np.int64)),
        (np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32)),
        (np.zeros(1, np.float64), np.zeros(1, np.float64), np.zeros(1, np.float64)),
    ],
)
def test_gather_digest_with_bad_columns_raises_config_error(columns: native.Columns) -> None:
    with pytest.raises(ConfigError):
        native.gather_digest(bytearray(10), columns, chunk_nbytes=10)


def test_copy_digest_with_lengths_that_differ_names_both() -> None:
    with pytest.raises(ConfigError, match=r"\b4 bytes.*\b3\b"):
        native.copy_digest(bytearray(4), b"abc", chunk_nbytes=1)


@pytest.mark.parametrize("target", [b"abc", memoryview(b"abc"), memoryview(bytearray(6))[::2]])
def test_copy_digest_into_what_cannot_be_written_raises_config_error(target: bytes) -> None:
    with pytest.raises(ConfigError):
        native.copy_digest(target, b"xyz", chunk_nbytes=1)


def test_prefault_of_written_memory_changes_no_byte() -> None:
    data = bytearray(random.randbytes(50_001))
    before = bytes(data)
    native.prefault(memoryview(data)[1:], num_threads=2)
    native.prefault(bytearray())
    assert data == before


def test_prefault_of_read_only_memory_raises_config_error() -> None:
    with pytest.raises(ConfigError):
        native.prefault(b"abc")


@given(case=gather_cases(), num_threads=st.integers(1, 4))
def test_gather_of_any_segments_equals_assembling_by_hand(case: tuple[bytes, list[Piece]], num_threads: int) -> None:
    before, pieces = case
    target = bytearray(before)
    native.gather(target, [piece.segment for piece in pieces], num_threads=num_threads)
    assert target == assemble(before, pieces)


def test_gather_of_one_large_segment_shares_it_among_threads() -> None:
    source = np.random.default_rng(random.getrandbits(32)).integers(0, 256, (5 << 20) + 3, np.uint8)
    target = bytearray(source.nbytes + 7)
    native.gather(target, [native.Segment(source.ctypes.data, source.nbytes, 5)], num_threads=3)
    assert target == bytes(5) + source.tobytes() + bytes(2)


def test_gather_with_a_segment_behind_the_target_writes_nothing() -> None:
    source = np.ones(8, np.uint8)
    target = bytearray(8)
    with pytest.raises(ConfigError, match="gather"):
        native.gather(target, [native.Segment(source.ctypes.data, 8, 1)])
    assert target == bytes(8)


@given(case=gather_cases(), num_threads=st.integers(1, 4))
def test_digest_pieces_equals_the_digest_of_each(case: tuple[bytes, list[Piece]], num_threads: int) -> None:
    pieces = case[1]
    addresses = np.array([piece.source.ctypes.data for piece in pieces], np.uint64)
    sizes = np.array([piece.source.nbytes for piece in pieces], np.uint64)
    found = np.frombuffer(native.digest_pieces(addresses, sizes, num_threads=num_threads), np.uint64)
    assert found.tolist() == [oracle.crc64(piece.source.tobytes()) for piece in pieces]


def test_digest_pieces_with_columns_of_two_lengths_is_refused() -> None:
    with pytest.raises(ConfigError, match="differ in length"):
        native.digest_pieces(np.zeros(1, np.uint64), np.zeros(2, np.uint64))
