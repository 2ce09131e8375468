"""Large writes that prove what they send: a capability that a tier may have beside its six calls.

Another is a plain attribute, `shows_whole`: true where an object is seen whole or not at all, so that two holders of
a snapshot may write its bytes under one name. A tier without it counts as one that shows halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from ktrain import native
from ktrain.abc.tier import Buffer
from ktrain.base.clock import Deadline
from ktrain.base.pace import Pace
from ktrain.base.retry import RetryBudget
from ktrain.errors import CorruptionError


class BadBytes(CorruptionError):
    """Bytes that differ from their digest: [begin, end) of the object is the first such range."""

    def __init__(self, message: str, begin: int, end: int) -> None:
        super().__init__(message, begin, end)
        self.begin, self.end = begin, end

    def __str__(self) -> str:
        return str(self.args[0])


@dataclass(frozen=True, slots=True)
class Chunks:
    """The digests of an object: CRC-64/NVME of each `chunk_nbytes`, the last chunk short."""

    chunk_nbytes: int
    digests: Sequence[int]

    def check(self, found: Sequence[int], begin: int, nbytes: int, what: str) -> None:
        """Compares digests of the chunks from byte `begin` on, which begins one; `nbytes` is the object's size.

        Raises:
            BadBytes: one differs.
        """
        first = begin // self.chunk_nbytes
        for index, digest in enumerate(found, start=first):
            if digest != self.digests[index]:
                low = index * self.chunk_nbytes
                high = min(low + self.chunk_nbytes, nbytes)
                raise BadBytes(f"{what}: bytes {low} to {high} differ from the digest made at the snapshot", low, high)

    def check_stored(self, data: Buffer, begin: int, nbytes: int, what: str) -> None:
        """Compares one chunk as a store gave it back; `nbytes` is the object's size.

        Raises:
            CorruptionError: the store has other bytes than were sent.
        """
        if native.crc64(data) != self.digests[begin // self.chunk_nbytes]:
            end = min(begin + self.chunk_nbytes, nbytes)
            raise CorruptionError(
                f"{what}: bytes {begin} to {end} as read back from the store are not those that were sent; check the "
                "store"
            )

    def digest(self, begin: int, end: int) -> int:
        """The digest of [begin, end), which is whole chunks, without reading a byte."""
        total, size = 0, self.chunk_nbytes
        for low in range(begin, end, size):
            total = native.crc64_combine(total, self.digests[low // size], min(size, end - low))
        return total


def _ignore(nbytes: int) -> None:
    pass


@dataclass(frozen=True, slots=True)
class Terms:
    """What a large write has to keep: the proof of its bytes, and what it may take of node and store.

    Attributes:
        pace: the node's; asked for every byte that is sent or read back.
        retries: shared by all that this write asks of the store.
        sent: told of bytes that have arrived; from several threads.
        is_taken_over: another process may have written a part of this very object; what is proven of it need not be
            sent again.
    """

    chunks: Chunks
    pace: Pace
    retries: RetryBudget = field(default_factory=RetryBudget)
    sent: Callable[[int], None] = _ignore
    is_taken_over: bool = False


@runtime_checkable
class ProvesWrites(Protocol):
    """A tier that digests what it sends, at the moment it sends it, in one pass over memory."""

    def write_proven(self, name: str, data: Buffer, terms: Terms, *, deadline: Deadline) -> None:
        """Like `Tier.write`; no byte becomes visible that was not compared with its digest on its way out.

        Where the store can compare digests itself, it has; where it cannot, a sample was read back.

        Raises:
            BadBytes: `data` is not what the digests say; the object is not there.
            CorruptionError: the store has other bytes than were sent.
        """
