"""Ranges of objects in S3, read by one request or several, each piece given out as soon as it has arrived.

A request first waits, then streams. Where what is left would stream much longer than another request waits for its
first byte, the rest is shared out: a store far away serves many streams at full rate. A server near by that digests a
whole object before each first byte is asked once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.retry import Retries
from ktrain.errors import CorruptionError
from ktrain.tier.deadline import Call
from ktrain.tier.parts import side_by_side
from ktrain.tier.s3_client import S3Requests

MAX_STREAMS = 16
"""Of one tier at a time."""
_WORTH = 4.0  # times as long as a request waits must what it takes over stream
_LEAST_WAIT_S = 0.01  # below, a request costs more than its wait
_STEP_NBYTES = 256 << 10  # of one read from the connection: bytes that are still in the cache when they are copied


class Streams:
    """How many requests a tier has streaming. Safe from any thread."""

    def __init__(self, limit: int = MAX_STREAMS) -> None:
        self._limit = limit
        self._num = 0  # guarded by _lock
        self._lock = threading.Lock()

    def begin(self) -> None:
        """One more, whatever the limit says: a range needs one."""
        with self._lock:
            self._num += 1

    def begin_more(self, most: int) -> int:
        """Up to `most` more, as many as there is room for."""
        with self._lock:
            num = max(0, min(most, self._limit - self._num))
            self._num += num
            return num

    def end(self, num: int = 1) -> None:
        """So many have ended."""
        with self._lock:
            self._num -= num


@dataclass(frozen=True, slots=True)
class RangeRead:
    """A range of one object, read for one call of a tier. `take` gets pieces as `ReadsInPieces` says."""

    s3: S3Requests
    place: Mapping[str, Any]
    call: Call
    take: Callable[[int, memoryview], None]
    piece_nbytes: int

    def run(self, bounds: tuple[int, int], streams: Streams, retries: Retries, deadline: Deadline) -> None:
        """Reads all of it. A stream that breaks goes on behind its last whole piece.

        Raises:
            CorruptionError: the object ends before the range does.
            KtrainError: as `S3Requests.ask`, or whatever `take` raises.
        """
        first, num = _Stream(self, *bounds, deadline), 1
        streams.begin()
        try:
            retries.run(first.begin, deadline=deadline)
            num += streams.begin_more(num_more(first.left_nbytes, first.wait_s, first.bytes_per_s))
            others = [_Stream(self, at, end, deadline) for at, end in first.give_away(num - 1)]
            side_by_side(
                lambda stream: retries.run(stream.finish, deadline=deadline),
                [first, *others],
                num_threads=1 + len(others),
                name=f"ktrain-tier: {self.call.what}",
            )
        finally:
            streams.end(num)
            first.close()


class _Stream:
    """What one request after the other reads of a range until it is there: [at, end). For one thread at a time."""

    def __init__(self, reading: RangeRead, at: int, end: int, deadline: Deadline) -> None:
        self._reading = reading
        self._at = at
        self._end = end
        self._deadline = deadline
        self._memory = memoryview(bytearray(min(reading.piece_nbytes, end - at)))
        self._open = ExitStack()  # the request in progress
        self._read_into: Callable[[memoryview], int] | None = None
        self.wait_s = 0.0  # for the first byte
        self.bytes_per_s = 1.0  # from then on, as the first piece had it

    @property
    def left_nbytes(self) -> int:
        return self._end - self._at

    def begin(self) -> None:
        """Reads the first piece and leaves the request open."""
        begun_s, at = SYSTEM_CLOCK.monotonic(), self._at
        try:
            read_into = self._ask()
            waited_s = SYSTEM_CLOCK.monotonic()
            self._take_piece(read_into)
        except BaseException:
            self.close()
            raise
        self.wait_s = waited_s - begun_s
        self.bytes_per_s = (self._at - at) / max(SYSTEM_CLOCK.monotonic() - waited_s, 1e-6)

    def finish(self) -> None:
        """Reads the rest, by the open request or another one."""
        try:
            while self._at < self._end:
                self._take_piece(self._read_into or self._ask())
        finally:
            self.close()

    def give_away(self, num: int) -> list[tuple[int, int]]:
        """What is left in `num` + 1 shares of whole pieces; keeps the first and returns the others."""
        size = self._reading.piece_nbytes
        share = -(-self.left_nbytes // ((num + 1) * size)) * size
        bounds = [(at, min(at + share, self._end)) for at in range(self._at, self._end, share or 1)]
        if bounds:
            self._end = bounds[0][1]
        return bounds[1:]

    def close(self) -> None:
        """Ends the request in progress. Idempotent."""
        self._read_into = None
        self._open.close()

    def _ask(self) -> Callable[[memoryview], int]:
        opened = self._reading.s3.opened(self._at, self._end, **self._reading.place)
        self._read_into = self._open.enter_context(opened)
        return self._read_into

    def _take_piece(self, read_into: Callable[[memoryview], int]) -> None:
        call = self._reading.call
        piece = self._memory[: min(self._memory.nbytes, self._end - self._at)]
        done = 0
        while done < piece.nbytes:
            call.check()
            self._deadline.check(call.what)
            count = read_into(piece[done : done + _STEP_NBYTES])
            if not count:
                raise CorruptionError(
                    f"{call.what}: expected {self._end} bytes or more, the object ends at {self._at + done}; "
                    "try another copy"
                )
            done += count
        with call.hands_over():
            self._reading.take(self._at, piece)
        self._at += piece.nbytes


def num_more(nbytes: int, wait_s: float, bytes_per_s: float) -> int:
    """How many more streams are worth their wait for `nbytes` that are left of one that streams at this rate."""
    return max(0, int(nbytes / bytes_per_s / (_WORTH * max(wait_s, _LEAST_WAIT_S))) - 1)
