"""The receiving side: a whole snapshot into a slot of the own volume, or parts into a reader's file, whatever the wire.

Invariant: a slot is sealed only after every one of its chunks matched the source's manifest, and a read of parts ends
well only after every chunk matched the reader's digests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

from ktrain import native
from ktrain.abc.transport import BadOwn, Part, PartialRead, Receipt
from ktrain.base.clock import Deadline
from ktrain.errors import CapacityError, CorruptionError, UnavailableError
from ktrain.format.manifest import Identity, Manifest
from ktrain.replicate.own import DIGEST_THREADS, OwnBytes
from ktrain.snapshot.arena import NodeVolume, SlotWriter

PULL_NBYTES = 32 << 20  # a piece on the wire: whole digest chunks, large enough to hide Ray's cost per call
IN_FLIGHT = 4  # pieces asked for and not yet landed; bounds the wire's memory on both sides

Ranges = Sequence[tuple[int, int]]


class Piece(Protocol):
    """Bytes that are on their way."""

    def take(self, deadline: Deadline) -> Any:
        """The bytes, as a readable buffer; call once."""


class ChunkSource(Protocol):
    """A node to pull from. Use from one thread."""

    def open(self, rank: int, identity: Identity, *, deadline: Deadline) -> tuple[str, bytes]:
        """Leases the snapshot; a handle and the manifest's bytes."""

    def lease(self, rank: int, identity: Identity, *, deadline: Deadline) -> str:
        """Leases the snapshot; a handle."""

    def request(self, handle: str, ranges: Ranges) -> Piece:
        """Asks for ranges of the payload, which come one behind the other, and does not wait for them."""

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
    """Brings one snapshot into a slot; see `Transport.pull` for what it raises. On an error nothing is sealed.

    What the volume has of it beside its own ranks' shares is copied there, and only the rest crosses the wire.
    """
    clock = deadline.clock
    begun_s = clock.monotonic()
    held = next((h for h in volume.scan() if (h.rank, h.identity) == (wanted.rank, wanted.identity)), None)
    if held is not None:
        return Receipt(wanted.rank, wanted.identity, held.nbytes, 0, 0.0, held.manifest_digest)
    handle, manifest_bytes = source.open(wanted.rank, wanted.identity, deadline=deadline)
    opened_s = clock.monotonic() - begun_s
    try:
        manifest = Manifest.from_bytes(manifest_bytes)
        if (manifest.rank, manifest.identity) != (wanted.rank, wanted.identity):
            raise CorruptionError(
                f"pull of {wanted}: the source sent the manifest of rank {manifest.rank}, {manifest.identity}"
            )
        with _acquire(volume, manifest, wanted) as writer:  # abandons what was not sealed
            lane = _Lane(source, handle, f"pull of {wanted}", manifest.chunk_nbytes, IN_FLIGHT, writer.memory)
            filled = _fill(volume, manifest, lane, deadline)
            held = writer.seal(manifest)
    finally:
        source.release(handle)
    return Receipt(
        rank=wanted.rank,
        identity=wanted.identity,
        nbytes=manifest.nbytes,
        wire_nbytes=filled.wire_nbytes + len(manifest_bytes),
        seconds=clock.monotonic() - begun_s,
        manifest_digest=held.manifest_digest,
        own_nbytes=filled.own_nbytes,
        wire_s=opened_s + filled.wire_s,
        bad_own=filled.bad_own,
    )


def _acquire(volume: NodeVolume, manifest: Manifest, wanted: Wanted) -> SlotWriter:
    protect, over = set(wanted.protect), (wanted.identity.epoch, wanted.identity.step)
    writer = volume.acquire(wanted.rank, manifest.nbytes, protect=protect, limit=wanted.slots, over=over)
    if writer is None:
        raise CapacityError(
            f"pull of {wanted}: all {wanted.slots} slots are protected or in use; try again after the next commit"
        )
    return writer


@dataclass(frozen=True, slots=True)
class _Filled:
    """Where the bytes of a slot came from; fields as in `Receipt`."""

    own_nbytes: int
    wire_nbytes: int
    wire_s: float
    bad_own: tuple[BadOwn, ...]


def _fill(volume: NodeVolume, manifest: Manifest, lane: _Lane, deadline: Deadline) -> _Filled:
    """Fills a slot with the whole payload and proves it."""
    with OwnBytes(volume, manifest) as own:
        missing = own.copy(lane.memory, deadline)
        bad = tuple(own.bad)
    size, clock = manifest.chunk_nbytes, deadline.clock
    parts = [Part(begin, end, manifest.chunks[begin // size : -(-end // size)]) for begin, end in missing]
    begun_s = clock.monotonic()
    wire_nbytes = lane.bring([(part, part.begin) for part in parts], deadline)
    own_nbytes = manifest.nbytes - sum(part.nbytes for part in parts)
    return _Filled(own_nbytes, wire_nbytes, clock.monotonic() - begun_s, bad)


def land_parts(source: ChunkSource, wanted: PartialRead, *, num_ahead: int, deadline: Deadline) -> int:
    """Brings parts of one snapshot into the reader's file, `num_ahead` pieces in flight; see `Transport.read`."""
    with _opened(wanted.file, wanted.nbytes) as mapped:
        handle = source.lease(wanted.rank, wanted.identity, deadline=deadline)
        try:
            with memoryview(mapped) as memory:
                lane = _Lane(source, handle, f"read of {wanted}", wanted.chunk_nbytes, num_ahead, memory)
                ends = accumulate(part.nbytes for part in wanted.parts)
                places = [(part, end - part.nbytes) for part, end in zip(wanted.parts, ends, strict=True)]
                return lane.bring(places, deadline)
        finally:
            source.release(handle)


def _opened(file: Path, nbytes: int) -> mmap:
    try:
        with open(file, "r+b") as opened:
            return mmap(opened.fileno(), nbytes)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"read into {file}: {nbytes} bytes of it cannot be mapped: {error}") from error


_Place = tuple[Part, int]
"""A part, and the byte of a lane's memory that it goes to."""


@dataclass(frozen=True, slots=True)
class _Lane:
    """A leased snapshot of another node, how it is read, and where to."""

    source: ChunkSource
    handle: str
    what: str  # for errors
    chunk_nbytes: int
    num_ahead: int  # pieces asked for and not yet landed
    memory: memoryview

    def bring(self, places: Sequence[_Place], deadline: Deadline) -> int:
        """Lands and proves all parts; returns the bytes that came."""
        waiting = deque(_pieces(places, self.chunk_nbytes))
        ahead: deque[tuple[list[_Place], Piece]] = deque()
        wire_nbytes = 0
        while waiting or ahead:
            while waiting and len(ahead) < self.num_ahead:
                together = waiting.popleft()
                ahead.append((together, self._ask(together)))
            together, piece = ahead.popleft()
            deadline.check(f"{self.what}: byte {together[0][0].begin}")
            nbytes = sum(part.nbytes for part, _ in together)
            bad = self._land(together, piece.take(deadline))
            wire_nbytes += nbytes
            del piece  # the wire's memory is free from here on
            if bad is not None:  # once more: a flipped bit on the way is not a bad copy at the source
                bad = self._land(together, self._ask(together).take(deadline))
                wire_nbytes += nbytes
            if bad is not None:
                raise CorruptionError(
                    f"{self.what}: bytes {bad[0]} to {bad[1]} of the payload do not match their digests, twice; use "
                    "another copy"
                )
        return wire_nbytes

    def _ask(self, together: Sequence[_Place]) -> Piece:
        return self.source.request(self.handle, [(part.begin, part.end) for part, _ in together])

    def _land(self, places: Sequence[_Place], data: Any) -> tuple[int, int] | None:
        """Copies parts that arrived together into place; the first byte range that does not match, or None."""
        arrived, size, at = memoryview(data).cast("B"), self.chunk_nbytes, 0
        if arrived.nbytes != sum(part.nbytes for part, _ in places):
            return places[0][0].begin, places[-1][0].end
        for part, to in places:
            found = native.copy_digest(
                self.memory[to : to + part.nbytes],
                arrived[at : at + part.nbytes],
                chunk_nbytes=size,
                num_threads=DIGEST_THREADS,
            )
            if tuple(found) != tuple(part.chunks):
                index = next(i for i, (a, b) in enumerate(zip(found, part.chunks, strict=True)) if a != b)
                begin = part.begin + index * size
                return begin, min(begin + size, part.end)
            at += part.nbytes
        return None


def _pieces(places: Sequence[_Place], chunk_nbytes: int) -> list[list[_Place]]:
    """What travels together: pieces of at most `PULL_NBYTES` or one chunk; larger parts are cut between chunks."""
    most = max(1, PULL_NBYTES // chunk_nbytes) * chunk_nbytes
    pieces: list[list[_Place]] = []
    room = 0
    for whole, to in places:
        for at in range(0, whole.nbytes, most):
            end = min(at + most, whole.nbytes)
            chunks = whole.chunks[at // chunk_nbytes : -(-end // chunk_nbytes)]
            if end - at > room:
                pieces.append([])
                room = most
            pieces[-1].append((Part(whole.begin + at, whole.begin + end, chunks), to + at))
            room -= end - at
    return pieces
