"""The slots that a rank writes its snapshots into, one after the other: each is chosen before it is needed."""

from __future__ import annotations

from collections.abc import Collection

from ktrain.snapshot.arena import NodeVolume, SlotWriter
from ktrain.snapshot.leased import LeasedSlot


class NextSlot:
    """Takes slots of a volume, of which the rank has at most `limit`. From one thread at a time.

    Looking for a slot and locking it takes a millisecond, for which training would stand.
    """

    def __init__(self, rank: int, limit: int) -> None:
        self._rank = rank
        self._limit = limit
        self._leased: LeasedSlot | None = None

    def take(self, volume: NodeVolume, nbytes: int, *, protect: Collection[tuple[int, int]]) -> SlotWriter | None:
        """The slot that was leased ahead, where it may be written still; another one else. As `NodeVolume.acquire`."""
        leased, self._leased = self._leased, None
        if leased is not None:
            writer = volume.begin(leased, nbytes, protect=protect)
            if writer is not None:
                return writer
        return volume.acquire(self._rank, nbytes, protect=protect, limit=self._limit)

    def lease_ahead(self, volume: NodeVolume, nbytes: int, *, protect: Collection[tuple[int, int]]) -> None:
        """Chooses one for the next snapshot, of those that are there; what it holds is kept until it is taken.

        No new slot is made: one that is still needed now may be free by then.

        Raises:
            CapacityError, CorruptionError, UnavailableError: as `acquire`, which says so again.
        """
        self.give_back()
        self._leased = volume.lease(self._rank, nbytes, protect=protect, limit=0)

    def give_back(self) -> None:
        """Lets go of what is leased. Idempotent."""
        if self._leased is not None:
            self._leased.give_back()
            self._leased = None
