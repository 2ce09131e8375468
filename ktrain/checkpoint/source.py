"""Where a rank's restore takes its bytes from: for each saved rank the nearest copy that proves good.

What is wanted of a copy is planned (`checkpoint.ranges`), read with many calls in flight, and proven before a byte of
it is written or lent (`checkpoint.readers`). A copy that turns out bad half way gives way to the next one, which
brings the same bytes again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from ktrain.abc.source import copies_beside
from ktrain.abc.tier import Tier
from ktrain.abc.transport import Part, PartialRead
from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.ranges import Ranges, Share, wanted_nbytes
from ktrain.checkpoint.readers import (
    BUCKET_READ_NBYTES,
    PEER_READ_NBYTES,
    BadCopy,
    LentReader,
    Object,
    Peer,
    PeerReader,
    Reader,
    TierReader,
    VolumeReader,
)
from ktrain.errors import CapacityError, CorruptionError, KtrainError, NotFoundError, UnavailableError
from ktrain.format import record as records
from ktrain.format.manifest import Manifest
from ktrain.native import NO_RUNS, Runs
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.scratch import Scratch
from ktrain.tier.disk import NodeDisk
from ktrain.tier.disk import copies_name as disk_copies_name
from ktrain.tier.disk import payload_name as disk_payload_name

IN_FLIGHT_NBYTES = 256 << 20
"""Bytes that one rank has on their way from tiers at a time; bounds its memory and its number of calls."""

WHOLE_SHARE = 1 / 1.1
"""Who wants at least this part of a peer's snapshot has all of it brought, once for all ranks of the node."""
WHOLE_SHARE_OF_OWN = 0.5
"""The same for a rank's own snapshot, whose replica in the own volume serves the next restore."""


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
    """What a restore has read, for the event; what was read of refused copies counts too."""

    nbytes: int = 0
    wanted_nbytes: int = 0
    num_reads: int = 0
    wire_nbytes: int = 0
    bucket_nbytes: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock, repr=False)  # of wire_nbytes, which threads add to

    def crossed(self, nbytes: int) -> None:
        """So much came over the wire. Safe from any thread."""
        with self.lock:
            self.wire_nbytes += nbytes


@dataclass(frozen=True, slots=True)
class Fetched:
    """What a node has brought of a peer's snapshot: a slot of its volume, or a `file` that it lends to its ranks."""

    wire_nbytes: int  # that crossed for it now
    file: Path | None = None

    def to_json(self) -> dict[str, Any]:
        return {"wire_nbytes": self.wire_nbytes, "file": None if self.file is None else str(self.file)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Fetched:
        return cls(int(value["wire_nbytes"]), None if value["file"] is None else Path(value["file"]))


def whole(manifest: Manifest) -> PartialRead:
    """A read of a whole snapshot; which file it goes to is the node's choice."""
    parts = [Part(0, manifest.nbytes, manifest.chunks)]
    return PartialRead(manifest.rank, manifest.identity, manifest.chunk_nbytes, parts, Path())


@dataclass(frozen=True, slots=True)
class PeerCalls:
    """How a rank gets at the snapshots of other nodes.

    `read` returns the bytes that crossed the wire. `rank` is the saved rank that is this rank's own, None where there
    is none (another number of ranks).
    """

    fetch: Callable[[Copy, PartialRead], Fetched]  # the whole snapshot, to wherever the node has a place for it
    read: Callable[[Copy, PartialRead, Deadline], int]  # parts of it into a file
    rank: int | None = None


class Openers:
    """Opens copies for one rank on one node.

    Args:
        peers: the way to copies in the memory of other nodes.
        deadline_of: how long one call for so many bytes may take.
        num_threads: of this rank, for bytes that lie in memory.
    """

    def __init__(
        self,
        *,
        volume: NodeVolume | None,
        disk: NodeDisk | None,
        tier: Tier,
        peers: PeerCalls,
        deadline_of: Callable[[int], Deadline],
        num_threads: int,
    ) -> None:
        self._volume = volume
        self._disk = disk
        self._tier = tier
        self._peers = peers
        self._deadline_of = deadline_of
        self._num_threads = num_threads
        self._scratch: Scratch | None = None

    def open(self, copy: Copy, share: Share, manifest: Manifest, tally: Tally) -> Reader:
        """The copy, opened where it lies for a share of it; a peer's is pulled first where most of it is wanted."""
        if copy.rank < 0:
            return self._open_beside(copy, manifest)
        if copy.tier == contract.TIER_BUCKET:
            identity = copy.identity
            name = records.payload_name(identity.step, identity.epoch, copy.place, copy.rank)
            return TierReader(Object(self._tier, name, self._deadline_of), manifest)
        if copy.tier == contract.TIER_DISK:
            if self._disk is None or self._disk.path.name != copy.place:
                raise UnavailableError(f"rank {copy.rank}, {copy.identity}: only {copy.place} can read its disk")
            name = disk_payload_name(copy.identity, copy.rank)
            return TierReader(Object(self._disk.tier, name, self._deadline_of), manifest)
        if self._volume is None:
            raise UnavailableError(f"rank {copy.rank}, {copy.identity}: this process has no volume")
        if copy.tier == contract.TIER_PEER:
            return self._open_peer(self._volume, copy, share, manifest, tally)
        return self._open_slot(self._volume, copy, manifest)

    def _open_slot(self, volume: NodeVolume, copy: Copy, manifest: Manifest) -> Reader:
        slot = volume.open(copy.rank, copy.identity, known=manifest)
        return VolumeReader(slot, manifest, self._num_threads)

    def close(self) -> None:
        """Gives back what reads from peers used."""
        if self._scratch is not None:
            self._scratch.close()

    def _open_beside(self, copy: Copy, manifest: Manifest) -> Reader:
        """Copies beside a share on this node's volume or disk."""
        rank = copies_beside(copy.rank)
        if copy.tier == contract.TIER_DISK and self._disk is not None:
            name = disk_copies_name(copy.identity, rank)
            return TierReader(Object(self._disk.tier, name, self._deadline_of), manifest)
        assert self._volume is not None, "copies are looked for where there is a volume"
        return VolumeReader(self._volume.copies.open(rank, copy.identity), manifest, self._num_threads)

    def _open_peer(self, volume: NodeVolume, copy: Copy, share: Share, manifest: Manifest, tally: Tally) -> Reader:
        whole_nbytes = manifest.nbytes * (WHOLE_SHARE_OF_OWN if copy.rank == self._peers.rank else WHOLE_SHARE)
        if wanted_nbytes(share) >= whole_nbytes:
            try:
                fetched = self._peers.fetch(copy, whole(manifest))
                tally.crossed(fetched.wire_nbytes)
                if fetched.file is not None:
                    return LentReader(fetched.file, copy.place, manifest, self._num_threads)
            except CapacityError:
                pass  # parts need no room
            except FileNotFoundError:
                pass  # the agent that lent it is dead
        try:
            return self._open_slot(volume, copy, manifest)
        except NotFoundError:
            pass  # nobody on this node has pulled it
        if self._scratch is None:
            self._scratch = Scratch(volume.path, PEER_READ_NBYTES)
        peer = Peer(
            copy.place,
            lambda wanted, deadline: self._peers.read(copy, wanted, deadline),
            self._scratch,
            self._deadline_of,
            tally.crossed,
        )
        return PeerReader(peer, manifest)


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a fetch wants of one saved rank, and the copies that are left to try."""

    rank: int
    share: Share
    copies: Iterator[Copy]


@dataclass(slots=True)
class _Attempt:
    """One copy that is being read from a tier."""

    wanted: _Wanted
    copy: Copy
    reader: Reader
    num_left: int  # reads that have not returned
    is_refused: bool = False


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

    def fetch(
        self, ranges: Mapping[int, Ranges], *, into: Mapping[int, Runs] | None = None, deadline: Deadline
    ) -> None:
        into = into or {}
        shares = {rank: Share(ranges.get(rank, ()), into.get(rank, NO_RUNS)) for rank in sorted({*ranges, *into})}
        shares = {rank: share for rank, share in shares.items() if not share.is_empty}
        self.tally.wanted_nbytes += sum(map(wanted_nbytes, shares.values()))
        _Fetch(self, deadline).run([_Wanted(rank, share, iter(self._copies[rank])) for rank, share in shares.items()])

    def view(self, rank: int, begin: int, end: int) -> memoryview:
        return self._readers[rank].view(begin, end)

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers = {}
        self._openers.close()

    # For a fetch

    def open(self, copy: Copy, share: Share) -> Reader:
        return self._openers.open(copy, share, self._manifests[copy.rank], self.tally)

    def accept(self, copy: Copy, reader: Reader) -> None:
        """The copy has brought and proven all that was wanted of it."""
        self._readers[copy.rank] = reader
        self.tiers[copy.rank] = copy.tier

    def refuse(self, copy: Copy, error: KtrainError) -> None:
        # What is surely not where its commit says it is, is bad; a peer may have let go of it in good order. A volume
        # without room says nothing on the copy.
        absent = isinstance(error, NotFoundError) and copy.tier != contract.TIER_PEER
        begin, end = (error.begin, error.end) if isinstance(error, BadCopy) else (None, None)
        corrupt = absent or isinstance(error, CorruptionError)
        failure = Failure(copy, corrupt, f"{copy.tier} {copy.place}: {error}", begin, end)
        self.failures.append(failure)
        self._failed(failure)

    def exhausted(self, rank: int) -> KtrainError:
        """No copy of this rank is left; `failures` says why each was refused."""
        mine = [failure for failure in self.failures if failure.copy.rank == rank]
        reasons = "; ".join(failure.reason for failure in mine)
        text = f"rank {rank}, {self._manifests[rank].identity}: no copy can be used ({reasons})"
        return CorruptionError(text) if any(failure.corrupt for failure in mine) else UnavailableError(text)


class _Fetch:
    """One fetch: reads of all saved ranks in flight together, each rank from its nearest copy that holds."""

    def __init__(self, source: NearestSource, deadline: Deadline) -> None:
        self._source = source
        self._deadline = deadline
        self._pool = ThreadPoolExecutor(max(1, IN_FLIGHT_NBYTES // BUCKET_READ_NBYTES), "ktrain-read")
        self._running: dict[Future[int], _Attempt] = {}
        self._returned: SimpleQueue[Future[int]] = SimpleQueue()

    def run(self, wanted: Sequence[_Wanted]) -> None:
        """Brings everything.

        Raises:
            CorruptionError, UnavailableError: no copy of a rank is left. No read is in progress any more.
        """
        try:
            for each in wanted:
                self._begin(each)
            while self._running:
                # Without a timeout: every read ends at its own deadline, and while one runs it may write to memory.
                self._end(self._returned.get())
        finally:
            left = {id(attempt): attempt.reader for attempt in self._running.values()}
            for reader in left.values():
                reader.stop()
            self._pool.shutdown(wait=True)
            for reader in left.values():
                reader.close()

    def _begin(self, wanted: _Wanted) -> None:
        """Opens the next copy that can be, and has its reads run; those from memory at once."""
        source = self._source
        for copy in wanted.copies:
            reader: Reader | None = None
            try:
                reader = source.open(copy, wanted.share)
                reads = reader.reads(wanted.share)
                if reader.is_near:
                    for read in reads:
                        source.tally.nbytes += read(self._deadline)
            except KtrainError as error:
                if reader is not None:
                    reader.close()
                source.refuse(copy, error)
                continue
            source.tally.num_reads += len(reads)
            if reader.is_near or not reads:
                source.accept(copy, reader)
                return
            attempt = _Attempt(wanted, copy, reader, len(reads))
            for read in reads:
                future = self._pool.submit(read, self._deadline)
                self._running[future] = attempt
                future.add_done_callback(self._returned.put)
            return
        raise source.exhausted(wanted.rank)

    def _end(self, future: Future[int]) -> None:
        attempt = self._running.pop(future)
        attempt.num_left -= 1
        error = future.exception()
        if error is not None and not isinstance(error, KtrainError):
            raise error
        refuses = error is not None and not attempt.is_refused
        if error is None:
            self._source.tally.nbytes += future.result()
            if attempt.copy.tier == contract.TIER_BUCKET:
                self._source.tally.bucket_nbytes += future.result()
        elif refuses:
            attempt.is_refused = True
            attempt.reader.stop()
            self._source.refuse(attempt.copy, error)
        if attempt.num_left == 0:
            if attempt.is_refused:
                attempt.reader.close()
            else:
                self._source.accept(attempt.copy, attempt.reader)
        if refuses:
            self._begin(attempt.wanted)
