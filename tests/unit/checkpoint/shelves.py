"""Places for the snapshots of a world that lie in this process, and restores from there as a rank does them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktrain.abc.tier import Buffer, ReadsInPieces, Stored, Tier
from ktrain.abc.transport import PartialRead
from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.source import Failure, Fetched, NearestSource, Openers, PeerCalls
from ktrain.format import record as records
from ktrain.format.manifest import Manifest
from ktrain.snapshot.arena import NodeVolume
from ktrain.state.apply import RestoreNeeds, apply, plan_restore
from ktrain.state.landing import land
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.tier_conformance import soon
from ktrain.tier.disk import NodeDisk, payload_name
from ktrain.tier.files import FileTier

Snapshots = Mapping[int, tuple[Manifest, bytes]]

NODE = "node-0"
WRITE_ID = "0a1b"
DISK_TIMEOUTS = Timeouts(patience_s=20)


class CountingTier:
    """A tier that notes every read as (name, begin, end), and hands everything on."""

    def __init__(self, inner: Tier) -> None:
        self.inner = inner
        self.reads: list[tuple[str, int, int]] = []  # guarded by _lock
        self.most_at_once = 0  # guarded by _lock
        self._at_once = 0  # guarded by _lock
        self._lock = threading.Lock()
        self.kind, self.url, self.supports_create = inner.kind, inner.url, inner.supports_create

    @property
    def nbytes(self) -> int:
        return sum(end - begin for _, begin, end in self.reads)

    @contextmanager
    def _counted(self, name: str, begin: int, end: int) -> Iterator[None]:
        with self._lock:
            self.reads.append((name, begin, end))
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def write(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        self.inner.write(name, data, deadline=deadline)

    def create(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        self.inner.create(name, data, deadline=deadline)

    def read(self, name: str, *, deadline: Deadline) -> bytes:
        return self.inner.read(name, deadline=deadline)

    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes:
        with self._counted(name, begin, end):
            return self.inner.read_range(name, begin, end, deadline=deadline)

    def list(self, prefix: str, *, deadline: Deadline) -> list[Stored]:
        return self.inner.list(prefix, deadline=deadline)

    def delete(self, name: str, *, deadline: Deadline) -> None:
        self.inner.delete(name, deadline=deadline)

    def close(self) -> None:
        self.inner.close()


class PiecesTier(CountingTier):
    """A counting tier over one that reads in pieces."""

    @property
    def range_nbytes(self) -> int:
        assert isinstance(self.inner, ReadsInPieces)
        return self.inner.range_nbytes

    def read_pieces(
        self,
        name: str,
        bounds: tuple[int, int],
        take: Callable[[int, memoryview], None],
        *,
        piece_nbytes: int,
        deadline: Deadline,
    ) -> None:
        assert isinstance(self.inner, ReadsInPieces)
        with self._counted(name, *bounds):
            self.inner.read_pieces(name, bounds, take, piece_nbytes=piece_nbytes, deadline=deadline)


@dataclass
class Shelves:
    """A node's volume and disk, and a bucket; what a restore says about copies is in `failures`."""

    folder: Path
    run: str
    bucket: Any = field(default_factory=FakeBucket)
    num_threads: int = 2
    call_s: float = 20.0
    pull: Callable[[Copy], int] = lambda copy: 0
    lent: Path | None = None  # the file that a pull went to, where it took no slot
    read: Callable[[Copy, PartialRead, Deadline], int] = lambda copy, wanted, deadline: 0
    own: int | None = None  # the saved rank that is the reader's own
    failures: list[Failure] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.volume = NodeVolume(self.folder / "volume", node=NODE, run=self.run)
        self.disk = NodeDisk(self.folder / "disk", run=self.run, node=NODE, timeouts=DISK_TIMEOUTS)

    def put(self, tier: str, snapshots: Snapshots, *, bad_at: int | None = None) -> dict[int, Copy]:
        """Stores the snapshots in a tier; their copies by rank. A peer's are taken to be pulled already.

        `bad_at`: a byte that goes bad there. On disk it does so after it was stored, for what is stored is proven.
        """
        for rank, (manifest, good) in snapshots.items():
            payload = good if bad_at is None else flipped(good, bad_at)
            if tier in (contract.TIER_MEMORY, contract.TIER_PEER):
                writer = self.volume.acquire(rank, len(payload), protect=(), limit=2)
                assert writer is not None
                with writer:
                    writer.memory[:] = payload
                    writer.seal(manifest)
            elif tier == contract.TIER_DISK:
                self.disk.store(manifest, good)
                if bad_at is not None:
                    self.disk.tier.write(payload_name(manifest.identity, rank), payload, deadline=soon())
            else:
                self.bucket.write(bucket_name(manifest), payload, deadline=soon())
        place = WRITE_ID if tier == contract.TIER_BUCKET else NODE
        return {rank: Copy(tier, place, rank, manifest.identity) for rank, (manifest, _) in snapshots.items()}

    def source(self, snapshots: Snapshots, copies: Mapping[int, Sequence[Copy]]) -> NearestSource:
        openers = Openers(
            volume=self.volume,
            disk=self.disk,
            tier=self.bucket,
            peers=PeerCalls(
                lambda copy, wanted: Fetched(self.pull(copy), self.lent), lambda *args: self.read(*args), self.own
            ),
            deadline_of=lambda nbytes: Deadline.after(self.call_s),
            num_threads=self.num_threads,
        )
        manifests = {rank: manifest for rank, (manifest, _) in snapshots.items()}
        return NearestSource(manifests, copies, openers, self.failures.append)

    def close(self) -> None:
        self.volume.close()
        self.disk.close()
        self.bucket.close()


def flipped(payload: bytes, at: int) -> bytes:
    """The payload with one bit changed."""
    return payload[:at] + bytes([payload[at] ^ 4]) + payload[at + 1 :]


def bucket_name(manifest: Manifest) -> str:
    identity = manifest.identity
    return records.payload_name(identity.step, identity.epoch, WRITE_ID, manifest.rank)


@contextmanager
def shelves(folder: Path, snapshots: Snapshots, bucket: Any = None) -> Iterator[Shelves]:
    run = next(iter(snapshots.values()))[0].identity.run
    made = Shelves(folder, run, FakeBucket() if bucket is None else bucket)
    try:
        yield made
    finally:
        made.close()


def restore_from(source: NearestSource, state: TrainState, topology: Topology) -> RestoreNeeds:
    """Plans, reads, proves, applies."""
    needs = plan_restore(state, source.manifests, topology)
    landing = land(needs.targets)
    try:
        source.fetch(landing.views, into=landing.runs, deadline=soon())
        apply(state, needs, source, landing)
    finally:
        source.close()
    return needs


def file_bucket(folder: Path) -> PiecesTier:
    """A bucket on the local file system, as a run in a directory has it."""
    return PiecesTier(FileTier(folder / "bucket", kind=contract.TIER_BUCKET))
