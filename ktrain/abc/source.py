"""Where a restore takes its bytes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from ktrain.base.clock import Deadline
from ktrain.format.manifest import Manifest
from ktrain.native import Runs


def copies_beside(rank: int) -> int:
    """Stands for the copies that lie beside a rank's share, wherever a source speaks of a saved rank; undoes itself.

    Shares are named by their ranks, from 0 on; copies (ADR 0015) by what is below.
    """
    return -1 - rank


class SnapshotSource(Protocol):
    """The ranks' snapshots of one checkpoint, wherever they lie (own memory, a peer, disk, a bucket).

    A protocol, so that a restore plans by manifests alone and moves only the bytes it needs. Use from one
    thread.
    """

    @property
    def manifests(self) -> Mapping[int, Manifest]:
        """All manifests of the checkpoint, by saved rank."""

    def fetch(
        self,
        ranges: Mapping[int, Sequence[tuple[int, int]]],
        *,
        into: Mapping[int, Runs] | None = None,
        deadline: Deadline,
    ) -> None:
        """Brings byte ranges of the payloads near and proves every chunk they touch.

        Args:
            ranges: by saved rank, absolute ranges `[begin, end)` of the payload file, to be viewed afterwards.
            into: by saved rank, what is written into memory of the caller while it is proven. Only proven bytes are
                written, but after an error some of them are there and others not.
            deadline: the whole fetch must end before it.

        Raises:
            CorruptionError: a chunk does not match its digest, in every copy that there is.
            UnavailableError: a copy could not be reached.
            DeadlineError: it took too long.
        """

    def view(self, rank: int, begin: int, end: int) -> memoryview:
        """Read-only bytes of a range that was fetched; valid until `close`."""

    def close(self) -> None:
        """Gives leases and memory back; views become invalid. May be called again."""
