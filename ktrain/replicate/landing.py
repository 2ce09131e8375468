"""The receiving side of a pull: chunks of a snapshot into a slot of the own volume, whatever the wire.

Invariant: a slot is sealed only after every one of its chunks matched the source's manifest.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ktrain import native
from ktrain.abc.transport import Receipt
from ktrain.base.clock import Deadline
from ktrain.errors import CapacityError, CorruptionError
from ktrain.format.manifest import Identity, Manifest
from ktrain.snapshot.arena import NodeVolume

PULL_NBYTES = 32 << 20  # a piece on the wire: whole digest chunks, large enough to hide Ray's cost per call
IN_FLIGHT = 4  # pieces asked for and not yet landed; bounds the wire's memory on both sides
DIGEST_THREADS = 1  # training needs the cores more


class Piece(Protocol):
    """Bytes that are on their way."""

    def take(self, deadline: Deadline) -> Any:
        """The bytes, as a readable buffer; call once."""


class ChunkSource(Protocol):
    """A node to pull from. Use from one thread."""

    def open(self, rank: int, identity: Identity, *, deadline: Deadline) -> tuple[str, bytes]:
        """Leases the snapshot; a handle and the manifest's bytes."""

    def request(self, handle: str, begin: int, end: int) -> Piece:
        """Asks for a range of the payload and does not wait for it."""

    def release(self, handle: str) -> None:
        """Ends the lease and does not wait; never raises."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to pull, and what may not be overwritten for it."""

    rank: int
    identity: Identity
    protect: Sequence[tuple[int, int]]
    slots: int  # how many slots the volume may use for this rank

    def __str__(self) -> str:
        return f"rank {self.rank}, step {self.identity.step}, epoch {self.identity.epoch}"


def land(volume: NodeVolume, source: ChunkSource, wanted: Wanted, *, deadline: Deadline) -> Receipt:
    """Pulls one snapshot; see `Transport.pull` for what it raises. On an error nothing is sealed."""
    clock = deadline.clock
    begun_s = clock.monotonic()
    held = next((h for h in volume.scan() if (h.rank, h.identity) == (wanted.rank, wanted.identity)), None)
    if held is not None:
        return Receipt(wanted.rank, wanted.identity, held.nbytes, 0, 0.0, held.manifest_digest)
    handle, manifest_bytes = source.open(wanted.rank, wanted.identity, deadline=deadline)
    try:
        manifest = Manifest.from_bytes(manifest_bytes)
        if (manifest.rank, manifest.identity) != (wanted.rank, wanted.identity):
            raise CorruptionError(
                f"pull of {wanted}: the source sent the manifest of rank {manifest.rank}, {manifest.identity}"
            )
        protect, over = set(wanted.protect), (wanted.identity.epoch, wanted.identity.step)
        writer = volume.acquire(wanted.rank, manifest.nbytes, protect=protect, limit=wanted.slots, over=over)
        if writer is None:
            raise CapacityError(
                f"pull of {wanted}: all {wanted.slots} slots are protected or in use; try again after the next commit"
            )
        with writer:  # abandons what was not sealed
            wire_nbytes = _fill(writer.memory, manifest, _Lane(source, handle, str(wanted)), deadline)
            held = writer.seal(manifest)
    finally:
        source.release(handle)
    return Receipt(
        rank=wanted.rank,
        identity=wanted.identity,
        nbytes=manifest.nbytes,
        wire_nbytes=wire_nbytes + len(manifest_bytes),
        seconds=clock.monotonic() - begun_s,
        manifest_digest=held.manifest_digest,
    )


@dataclass(frozen=True, slots=True)
class _Lane:
    source: ChunkSource
    handle: str
    what: str


def _fill(memory: memoryview, manifest: Manifest, lane: _Lane, deadline: Deadline) -> int:
    """Lands and proves the whole payload, a bounded number of pieces ahead; returns the bytes that came."""
    piece_nbytes = max(1, PULL_NBYTES // manifest.chunk_nbytes) * manifest.chunk_nbytes
    ahead: deque[tuple[int, int, Piece]] = deque()
    wire_nbytes = 0
    position = 0
    while position < manifest.nbytes or ahead:
        while position < manifest.nbytes and len(ahead) < IN_FLIGHT:
            end = min(position + piece_nbytes, manifest.nbytes)
            ahead.append((position, end, lane.source.request(lane.handle, position, end)))
            position = end
        begin, end, piece = ahead.popleft()
        deadline.check(f"pull of {lane.what}: byte {begin} of {manifest.nbytes}")
        bad = _land_piece(memory, manifest, (begin, end), piece.take(deadline))
        wire_nbytes += end - begin
        del piece  # the wire's memory is free from here on
        if bad is not None:  # once more: a flipped bit on the way is not a bad copy at the source
            bad = _land_piece(
                memory, manifest, (begin, end), lane.source.request(lane.handle, begin, end).take(deadline)
            )
            wire_nbytes += end - begin
        if bad is not None:
            raise CorruptionError(
                f"pull of {lane.what}: bytes {bad[0]} to {bad[1]} of the payload do not match the manifest, "
                "twice; use another copy"
            )
    return wire_nbytes


def _land_piece(memory: memoryview, manifest: Manifest, span: tuple[int, int], data: Any) -> tuple[int, int] | None:
    """Copies one piece into place; the first byte range that is not what the manifest says, or None."""
    begin, end = span
    if memoryview(data).nbytes != end - begin:
        return span
    found = native.copy_digest(memory[begin:end], data, chunk_nbytes=manifest.chunk_nbytes, num_threads=DIGEST_THREADS)
    first = begin // manifest.chunk_nbytes
    for index, digest in enumerate(found):
        if digest != manifest.chunks[first + index]:
            at = begin + index * manifest.chunk_nbytes
            return at, min(at + manifest.chunk_nbytes, end)
    return None
