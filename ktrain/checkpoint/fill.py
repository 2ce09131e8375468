"""A node's part of reading a checkpoint once a job: payloads from the bucket into slots of its volume (ADR 0020).

Invariant: a slot is sealed only after every chunk of it matched the manifest that the head has named.
"""

from __future__ import annotations

import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy

from ktrain.abc.tier import Tier
from ktrain.base.clock import Clock, Deadline
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.packed import unpack
from ktrain.checkpoint.source import Failure, Fetched, NearestSource, Openers, PeerCalls
from ktrain.errors import CapacityError, KtrainError, UnavailableError
from ktrain.format.manifest import Manifest
from ktrain.native import Runs
from ktrain.snapshot.arena import NodeVolume
from ktrain.tier.location import open_tier

_SLOTS = 2  # that a rank may have in this volume, as for replicas
_NO_PEERS = PeerCalls(
    lambda copy, wanted: Fetched(0), lambda copy, wanted, deadline: 0
)  # all that is filled comes from the bucket


@dataclass(frozen=True, slots=True)
class WantedFills:
    """Copies in the bucket that this node brings into its volume, and all manifests, packed."""

    round: tuple[int, int] = (0, 0)  # epoch of the attempt, round of its restore
    copies: Sequence[Copy] = ()
    manifests: str = ""
    timeout_s: float = 0.0  # for all of them together, from when they are first wanted

    @classmethod
    def from_json(cls, fill: Mapping[str, Any] | None, restore: Mapping[str, Any] | None) -> WantedFills:
        """What the head says, beside its word on the restore, which has the manifests."""
        if fill is None or restore is None:
            return cls()
        copies = [Copy.from_json(value) for value in fill["copies"]]
        epoch, number = fill["round"]
        return cls((int(epoch), int(number)), copies, restore["manifests"], float(fill["timeout_s"]))


@dataclass(slots=True)
class Filler:
    """Fills for one node. `work` is for one thread at a time; `reports` may be read from any.

    Args:
        changed: called when there is something new to report.
        bad: takes the copies that are proven bad.
    """

    run_url: str
    timeouts: Timeouts
    clock: Clock
    changed: Callable[[], None]
    bad: Callable[[Failure], None]
    reports: Sequence[Mapping[str, Any]] = ()  # replaced whole
    _round: tuple[int, int] = field(default=(0, 0), init=False)

    def work(self, wanted: WantedFills, volume: NodeVolume | None, faults: FaultPoints) -> None:
        """Fills what a round wants, once; returns when each has ended."""
        if not wanted.copies or wanted.round == self._round:
            return
        self._round, self.reports = wanted.round, ()
        deadline = Deadline.after(wanted.timeout_s, self.clock)
        texts = unpack(wanted.manifests)
        tier = open_tier(self.run_url, timeouts=self.timeouts)
        try:
            for copy in wanted.copies:
                faults.reached("restore.fill", step=copy.identity.step, rank=copy.rank)
                reason, nbytes = self._fill(
                    copy, Manifest.from_bytes(texts[copy.rank].encode()), volume, tier, deadline
                )
                said = {"rank": copy.rank, "round": list(wanted.round), "reason": reason, "nbytes": nbytes}
                self.reports = (*self.reports, said)
                self.changed()
        finally:
            tier.close()

    def _fill(
        self, copy: Copy, manifest: Manifest, volume: NodeVolume | None, tier: Tier, deadline: Deadline
    ) -> tuple[str | None, int]:
        """Fills with one copy; why not, and the bytes that were read."""
        openers = Openers(
            volume=None,
            disk=None,
            tier=tier,
            peers=_NO_PEERS,
            deadline_of=lambda nbytes: Deadline.after(self.timeouts.storage_s + nbytes / 1e6, self.clock),
            num_threads=1,
        )
        source = NearestSource({copy.rank: manifest}, {copy.rank: [copy]}, openers, self._refused)
        try:
            _fill(source, manifest, volume, deadline)
        except (KtrainError, OSError) as error:
            return f"{type(error).__name__}: {error}", source.tally.nbytes
        finally:
            source.close()
        return None, source.tally.nbytes

    def _refused(self, failure: Failure) -> None:
        if failure.corrupt:
            self.bad(failure)


def _fill(source: NearestSource, manifest: Manifest, volume: NodeVolume | None, deadline: Deadline) -> None:
    """Brings one payload into a slot and seals it; where the volume holds it already nothing is read.

    Raises:
        CapacityError: no slot is free, or the volume is full.
        CorruptionError, UnavailableError: the copy is bad, or the store could not be asked.
        DeadlineError: there is no time left.
    """
    rank, identity = manifest.rank, manifest.identity
    if volume is None:
        raise UnavailableError(f"fill of rank {rank}, {identity}: this node has no volume now")
    if any((held.rank, held.identity) == (rank, identity) for held in volume.scan()):
        return
    deadline.check(f"fill of rank {rank}, {identity}")
    over = identity.epoch, identity.step
    writer = volume.acquire(rank, manifest.nbytes, protect=(), limit=_SLOTS, over=over)
    if writer is None:
        raise CapacityError(f"fill of rank {rank}, {identity}: all {_SLOTS} slots are in use")
    with writer:  # abandons what was not sealed
        source.fetch({}, into={rank: _whole(writer.memory)}, deadline=deadline)
        writer.seal(manifest)


def _whole(memory: memoryview) -> Runs:
    """The whole payload into this memory."""
    address = numpy.frombuffer(memory, dtype=numpy.uint8).ctypes.data
    return Runs(*(array.array("Q", [value]) for value in (address, memory.nbytes, 0, 1, 0, 0)))
