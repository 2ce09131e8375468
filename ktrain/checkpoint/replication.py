"""Which step the peers are to hold next: one for all of them, until all hold it (ADR 0022).

Pure state; guarded by its owner's lock.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ktrain.base.clock import Clock
from ktrain.base.settings import Timeouts
from ktrain.format.manifest import Identity


class Replication:
    """The wanted step of one attempt's replicas."""

    def __init__(self, timeouts: Timeouts, clock: Clock) -> None:
        self._timeouts = timeouts
        self._clock = clock
        self._moved_s = 0.0  # when one more rank had a replica of `wanted`
        self._num_kept = 0
        self._can_be_had = True
        self._is_lost = False
        self.wanted: Identity | None = None

    @property
    def lost(self) -> Identity | None:
        """The wanted step where nobody has some rank's snapshot of it any more: it is worth no slot."""
        return self.wanted if self._is_lost else None

    def counts(self, identity: Identity) -> bool:
        """Whether the step is committed among peers where all of them hold it.

        One that is wanted no more is not: nodes may be writing over it in this moment.
        """
        return self.wanted is None or identity == self.wanted

    def is_held(self, peer: Identity | None) -> bool:
        """Whether nothing is wanted that is newer than the step committed among peers."""
        return self.wanted is None or (peer is not None and _age(peer) >= _age(self.wanted))

    def look(self, holders: Mapping[int, Collection[str]], home: Mapping[int, str]) -> None:
        """Takes which nodes hold the wanted step of each rank. Not for a step that all peers have held."""
        there = [rank for rank, node in home.items() if node in holders.get(rank, ())]
        num_kept = sum(len(set(holders[rank])) > 1 for rank in there)
        if num_kept > self._num_kept:
            self._moved_s = self._clock.monotonic()
        self._num_kept, self._can_be_had = num_kept, len(there) == len(home)
        self._is_lost = not all(holders.get(rank) for rank in home)

    def choose(self, memory: Identity | None, peer: Identity | None) -> None:
        """Wants the newest step committed in `memory`, once all peers hold the wanted one or it is given up."""
        if memory is None or memory == self.wanted:
            return
        if self.is_held(peer) or self._is_in_vain():
            self.wanted, self._num_kept, self._can_be_had, self._is_lost = memory, 0, True, False
            self._moved_s = self._clock.monotonic()

    def _is_in_vain(self) -> bool:
        return not self._can_be_had or self._clock.monotonic() - self._moved_s > self._timeouts.drain_s


def _age(identity: Identity) -> tuple[int, int]:
    return identity.epoch, identity.step
