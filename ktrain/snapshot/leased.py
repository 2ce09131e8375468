"""Slots that are chosen and opened before there is a snapshot to write, so that the save itself finds one ready."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from ktrain.snapshot.slots import Held, Slot


@dataclass(frozen=True, slots=True)
class LeasedSlot:
    """A slot that nobody else reads or writes, mapped, and still with its snapshot. From one thread at a time.

    A process that dies before `NodeVolume.begin` leaves the snapshot as it was.

    Attributes:
        held: what is overwritten; None where it is empty.
        newest_is_there: whether the snapshot still is for which `held` is not needed any more.
        give_back: ends the lease. To be called unless a writer was made of it.
    """

    slot: Slot
    rank: int
    held: Held | None
    newest_is_there: Callable[[], bool]
    give_back: Callable[[], None]

    def may_be_written(self, nbytes: int, kept: Collection[tuple[int, int]]) -> bool:
        """Whether it may be overwritten still, as what is held and kept has changed since, and has that size."""
        if not self.slot.is_mapped(nbytes):
            return False
        held = self.held
        return held is None or ((held.identity.step, held.identity.epoch) not in kept and self.newest_is_there())
