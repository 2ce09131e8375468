"""Ranges of an object that arrive piece by piece, by one request or several, over connections that break."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from ktrain.base.retry import BusyError, Retries, RetryBudget
from ktrain.errors import CorruptionError
from ktrain.testing.tier_conformance import soon
from ktrain.tier import s3_reads
from ktrain.tier.deadline import Call
from ktrain.tier.s3_reads import RangeRead, Streams, num_more

_DATA = bytes(range(256)) * 40
_PIECE = 1000


class FakeS3:
    """Serves `_DATA`; the nth request breaks after so many bytes."""

    def __init__(self, breaks: dict[int, int] | None = None, data: bytes = _DATA) -> None:
        self.asked: list[tuple[int, int]] = []
        self.num_open = 0
        self._breaks = breaks or {}
        self._data = data
        self._lock = threading.Lock()

    @contextmanager
    def opened(self, begin: int, end: int, **place: str) -> Iterator[Callable[[memoryview], int]]:
        with self._lock:
            self.asked.append((begin, end))
            self.num_open += 1
            limit = self._breaks.get(len(self.asked))
        at = begin

        def read_into(memory: memoryview) -> int:
            nonlocal at
            if limit is not None and at - begin >= limit:
                raise BusyError("broke")
            part = self._data[at : min(at + memory.nbytes, end, at + 300)]
            memory[: len(part)] = part
            at += len(part)
            return len(part)

        try:
            yield read_into
        finally:
            with self._lock:
                self.num_open -= 1


def read(
    s3: FakeS3, bounds: tuple[int, int], *, take: Callable[[int, memoryview], None] | None = None
) -> dict[int, bytes]:
    """What was taken: where a piece begins -> its bytes."""
    found: dict[int, bytes] = {}

    def keep(at: int, piece: memoryview) -> None:
        found[at] = bytes(piece)

    streams = Streams(limit=8)
    reading = RangeRead(s3, {"Bucket": "b", "Key": "k"}, Call("read x"), take or keep, _PIECE)  # type: ignore[arg-type]
    try:
        reading.run(bounds, streams, Retries(RetryBudget(), max_tries=4, draw=lambda: 0.0), soon())
    finally:
        assert s3.num_open == 0 and streams.begin_more(100) == 8, "nothing is left open or counted"
    return found


def joined(found: dict[int, bytes]) -> bytes:
    return b"".join(found[at] for at in sorted(found))


@pytest.mark.parametrize("bounds", [(0, len(_DATA)), (17, 18), (1000, 2000), (5, 4321)])
def test_range_is_one_request_and_every_byte_in_whole_pieces(
    bounds: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "num_more", lambda *_: 0)
    s3 = FakeS3()
    found = read(s3, bounds)
    assert joined(found) == _DATA[slice(*bounds)] and s3.asked == [bounds]
    assert all((at - bounds[0]) % _PIECE == 0 for at in found)


def test_range_worth_more_streams_is_shared_out_behind_its_first_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_reads, "num_more", lambda *_: 3)
    s3 = FakeS3()
    found = read(s3, (40, len(_DATA)))
    assert joined(found) == _DATA[40:]
    assert s3.asked[0] == (40, len(_DATA)) and sorted(s3.asked[1:]) == [(4040, 7040), (7040, 10040), (10040, 10240)]


@pytest.mark.parametrize("num", [0, 3])
def test_range_over_connections_that_break_goes_on_behind_its_last_piece(
    num: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_reads, "num_more", lambda *_: num)
    s3 = FakeS3(breaks={1: 0, 2: 2500, 3: 0})
    assert joined(read(s3, (0, len(_DATA)))) == _DATA
    assert s3.asked[1] == (0, len(_DATA))


def test_range_of_an_object_that_ends_before_is_corruption_with_both_ends() -> None:
    with pytest.raises(CorruptionError, match="expected 10240 bytes or more, the object ends at 4500"):
        read(FakeS3(data=_DATA[:4500]), (0, len(_DATA)))


def test_range_whose_bytes_nobody_wants_ends_with_that_error() -> None:
    def refuse(at: int, piece: memoryview) -> None:
        raise ValueError(at)

    with pytest.raises(ValueError, match="0"):
        read(FakeS3(), (0, 5000), take=refuse)


@pytest.mark.parametrize(
    ("nbytes", "wait_s", "bytes_per_s", "expected"),
    [
        (60e6, 0.2, 500e6, 0),  # a server near by that digests the whole object first
        (60e6, 0.04, 80e6, 3),  # a store far away
        (60e6, 0.0, 80e6, 17),
        (0, 0.04, 80e6, 0),
    ],
)
def test_more_streams_where_what_is_left_outlasts_their_wait(
    nbytes: int, wait_s: float, bytes_per_s: float, expected: int
) -> None:
    assert num_more(int(nbytes), wait_s, bytes_per_s) == expected


def test_streams_of_a_tier_are_bounded_but_for_the_one_that_a_range_needs() -> None:
    streams = Streams(limit=4)
    for _ in range(3):
        streams.begin()
    assert streams.begin_more(5) == 1 and streams.begin_more(5) == 0
    streams.begin()
    assert streams.begin_more(5) == 0
    streams.end(3)
    assert streams.begin_more(5) == 2
