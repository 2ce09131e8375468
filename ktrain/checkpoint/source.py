"""Where a rank's restore takes its bytes from: for each saved rank the nearest copy that proves good.

Invariant: no byte leaves `view` that was not digested after its last hop (design promise 2).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ktrain.abc.tier import Tier
from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.checkpoint.lineage import Copy
from ktrain.errors import CorruptionError, KtrainError, NotFoundError, UnavailableError
from ktrain.format import record as records
from ktrain.format.manifest import Manifest, bad_ranges_in
from ktrain.snapshot.arena import NodeVolume, SlotReader
from ktrain.tier.disk import NodeDisk
from ktrain.tier.disk import payload_name as disk_payload_name

Ranges = Sequence[tuple[int, int]]


class Reader(Protocol):
    """One copy of one rank's snapshot, opened."""

    def fetch(self, ranges: Ranges, deadline: Deadline) -> int:
        """Brings ranges near and proves them; returns the bytes read from the copy."""

    def view(self, begin: int, end: int) -> memoryview: ...

    def close(self) -> None: ...


class BadCopy(CorruptionError):
    """A copy that is proven bad, with the first bad byte range where it is known."""

    def __init__(self, message: str, begin: int | None = None, end: int | None = None) -> None:
        super().__init__(message)
        self.begin, self.end = begin, end


def _prove(manifest: Manifest, piece: memoryview | bytes, begin: int, where: str) -> None:
    bad = bad_ranges_in(manifest, piece, begin)
    if bad:
        low, high = bad[0]
        raise BadCopy(
            f"{where}, rank {manifest.rank}, {manifest.identity}: bytes {low} to {high} differ from the digest made at "
            "the snapshot",
            low,
            high,
        )


def merged_cover(manifest: Manifest, ranges: Ranges) -> list[tuple[int, int]]:
    """Ranges widened to whole chunks, sorted and merged."""
    covers: list[tuple[int, int]] = []
    for begin, end in sorted(manifest.cover(begin, end) for begin, end in ranges if end > begin):
        if covers and begin <= covers[-1][1]:
            covers[-1] = (covers[-1][0], max(end, covers[-1][1]))
        else:
            covers.append((begin, end))
    return covers


class VolumeReader:
    """A sealed slot of this node's volume, under lease."""

    def __init__(self, slot: SlotReader, manifest: Manifest, num_threads: int) -> None:
        if slot.manifest.digest() != manifest.digest():
            slot.close()
            raise BadCopy(f"slot {slot.slot}: its manifest is not the one that was agreed on")
        self._slot = slot
        self._manifest = manifest
        self._num_threads = num_threads

    def fetch(self, ranges: Ranges, deadline: Deadline) -> int:
        total = 0
        for begin, end in merged_cover(self._manifest, ranges):
            deadline.check(f"digest rank {self._manifest.rank} in memory")
            _prove(self._manifest, self._slot.memory[begin:end], begin, f"slot {self._slot.slot}")
            total += end - begin
        return total

    def view(self, begin: int, end: int) -> memoryview:
        return self._slot.memory[begin:end]

    def close(self) -> None:
        self._slot.close()


class TierReader:
    """An object in a bucket or on disk; what was fetched is kept in private memory until closed."""

    _READ_NBYTES = 64 << 20

    def __init__(self, tier: Tier, name: str, manifest: Manifest, deadline_of: Callable[[int], Deadline]) -> None:
        self._tier = tier
        self._name = name
        self._manifest = manifest
        self._deadline_of = deadline_of
        self._pieces: list[tuple[int, memoryview]] = []
        self._joined: list[bytes] = []

    def fetch(self, ranges: Ranges, deadline: Deadline) -> int:
        total = 0
        stride = max(1, self._READ_NBYTES // self._manifest.chunk_nbytes) * self._manifest.chunk_nbytes
        for begin, end in merged_cover(self._manifest, ranges):
            for low in range(begin, end, stride):
                high = min(low + stride, end)
                deadline.check(f"read {self._name}")
                data = self._tier.read_range(self._name, low, high, deadline=self._deadline_of(high - low))
                if len(data) != high - low:
                    raise BadCopy(
                        f"{self._name}: expected {self._manifest.nbytes} bytes, it ends at {low + len(data)}",
                        low + len(data),
                        end,
                    )
                _prove(self._manifest, data, low, self._name)
                self._pieces.append((low, memoryview(data)))
                total += high - low
        self._pieces.sort(key=lambda piece: piece[0])
        return total

    def view(self, begin: int, end: int) -> memoryview:
        """The bytes; copied only where a tensor lies across the border of two reads."""
        first = max(0, bisect.bisect_right(self._pieces, begin, key=lambda piece: piece[0]) - 1)
        parts, at = [], begin
        for start, piece in self._pieces[first:]:
            if at >= end or not start <= at < start + len(piece):
                break
            parts.append(piece[at - start : min(end - start, len(piece))])
            at += len(parts[-1])
        assert at >= end, f"{self._name}: bytes {begin} to {end} were not fetched"
        if len(parts) == 1:
            return parts[0]
        self._joined.append(b"".join(parts))  # a view is valid until close(): whoever has one may go by its address
        return memoryview(self._joined[-1])

    def close(self) -> None:
        self._pieces, self._joined = [], []


@dataclass(frozen=True, slots=True)
class Failure:
    """A copy that could not be used."""

    copy: Copy
    corrupt: bool
    reason: str
    begin: int | None = None
    end: int | None = None

    def to_json(self) -> dict[str, Any]:
        return {"key": list(self.copy.key()), "corrupt": self.corrupt, "reason": self.reason}


@dataclass(slots=True)
class Tally:
    """What a restore has read, for the event."""

    nbytes: int = 0
    wire_nbytes: int = 0


class Openers:
    """Opens copies for one rank on one node."""

    def __init__(
        self,
        *,
        volume: NodeVolume | None,
        disk: NodeDisk | None,
        tier: Tier,
        pull: Callable[[Copy], int],
        deadline_of: Callable[[int], Deadline],
        num_threads: int,
    ) -> None:
        self._volume = volume
        self._disk = disk
        self._tier = tier
        self._pull = pull  # brings a peer's copy into the own volume; returns the bytes that crossed the wire
        self._deadline_of = deadline_of
        self._num_threads = num_threads

    def open(self, copy: Copy, manifest: Manifest, tally: Tally) -> Reader:
        """The copy, opened where it lies; a peer's copy is pulled into this node's volume first."""
        if copy.tier == contract.TIER_BUCKET:
            identity = copy.identity
            name = records.payload_name(identity.step, identity.epoch, copy.place, copy.rank)
            return TierReader(self._tier, name, manifest, self._deadline_of)
        if copy.tier == contract.TIER_DISK:
            if self._disk is None or self._disk.path.name != copy.place:
                raise UnavailableError(f"rank {copy.rank}, {copy.identity}: only {copy.place} can read its disk")
            return TierReader(self._disk.tier, disk_payload_name(copy.identity, copy.rank), manifest, self._deadline_of)
        if self._volume is None:
            raise UnavailableError(f"rank {copy.rank}, {copy.identity}: this process has no volume")
        if copy.tier == contract.TIER_PEER:
            tally.wire_nbytes += self._pull(copy)
        return VolumeReader(self._volume.open(copy.rank, copy.identity), manifest, self._num_threads)


class NearestSource:
    """A SnapshotSource over the copies that the plan names, nearest first. Use from one thread."""

    def __init__(
        self,
        manifests: Mapping[int, Manifest],
        copies: Mapping[int, Sequence[Copy]],
        openers: Openers,
        failed: Callable[[Failure], None],
    ) -> None:
        self._manifests = dict(manifests)
        self._copies = copies
        self._openers = openers
        self._failed = failed
        self._readers: dict[int, Reader] = {}
        self.failures: list[Failure] = []
        self.tiers: dict[int, str] = {}
        self.tally = Tally()

    @property
    def manifests(self) -> Mapping[int, Manifest]:
        return self._manifests

    def fetch(self, ranges: Mapping[int, Ranges], *, deadline: Deadline) -> None:
        for rank in sorted(ranges):
            if ranges[rank]:
                self._fetch_rank(rank, ranges[rank], deadline)

    def _fetch_rank(self, rank: int, ranges: Ranges, deadline: Deadline) -> None:
        """Tries the copies of one rank, nearest first.

        Raises:
            CorruptionError, UnavailableError: no copy of this rank is left; `failures` says why each was refused.
        """
        for copy in self._copies[rank]:
            reader: Reader | None = None
            try:
                reader = self._openers.open(copy, self._manifests[rank], self.tally)
                self.tally.nbytes += reader.fetch(ranges, deadline)
            except KtrainError as error:
                if reader is not None:
                    reader.close()
                self._refuse(copy, error)
                continue
            self._readers[rank] = reader
            self.tiers[rank] = copy.tier
            return
        mine = [failure for failure in self.failures if failure.copy.rank == rank]
        reasons = "; ".join(failure.reason for failure in mine)
        text = f"rank {rank}, {self._manifests[rank].identity}: no copy can be used ({reasons})"
        raise CorruptionError(text) if any(failure.corrupt for failure in mine) else UnavailableError(text)

    def _refuse(self, copy: Copy, error: KtrainError) -> None:
        corrupt = isinstance(error, CorruptionError | NotFoundError)  # a volume without room says nothing on the copy
        begin, end = (error.begin, error.end) if isinstance(error, BadCopy) else (None, None)
        failure = Failure(copy, corrupt, f"{copy.tier} {copy.place}: {error}", begin, end)
        self.failures.append(failure)
        self._failed(failure)

    def view(self, rank: int, begin: int, end: int) -> memoryview:
        return self._readers[rank].view(begin, end)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers = {}
