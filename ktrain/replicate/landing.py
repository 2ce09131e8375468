"""The receiving side: a whole snapshot into a slot of the own volume, or parts into a reader's file, whatever the wire.

Invariant: a slot is sealed only after every one of its chunks matched the source's manifest, and a read of parts ends
well only after every chunk matched the reader's digests.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from mmap import mmap
from pathlib import Path
from typing import Any, Protocol

from ktrain import native
from ktrain.abc.transport import Part, PartialRead, Receipt
from ktrain.base.clock import Deadline
from ktrain.errors import CapacityError, CorruptionError, UnavailableError
from ktrain.format.manifest import Identity, Manifest
from ktrain.snapshot.arena import NodeVolume

PULL_NBYTES = 32 << 20  # a piece on the wire: whole digest chunks, large enough to hide Ray's cost per call
IN_FLIGHT = 4  # pieces asked for and not yet landed; bounds the wire's memory on both sides
DIGEST_THREADS = 1  # training needs the cores more


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
            ahead.append((position, end, lane.source.request(lane.handle, [(position, end)])))
            position = end
        begin, end, piece = ahead.popleft()
        deadline.check(f"pull of {lane.what}: byte {begin} of {manifest.nbytes}")
        bad = _land_piece(memory, manifest, (begin, end), piece.take(deadline))
        wire_nbytes += end - begin
        del piece  # the wire's memory is free from here on
        if bad is not None:  # once more: a flipped bit on the way is not a bad copy at the source
            bad = _land_piece(
                memory, manifest, (begin, end), lane.source.request(lane.handle, [(begin, end)]).take(deadline)
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
    first, last = begin // manifest.chunk_nbytes, -(-end // manifest.chunk_nbytes)
    part = Part(begin, end, manifest.chunks[first:last])
    return _land_parts(memory[begin:end], manifest.chunk_nbytes, [part], data)


def land_parts(source: ChunkSource, wanted: PartialRead, *, num_ahead: int, deadline: Deadline) -> int:
    """Brings parts of one snapshot into the reader's file, `num_ahead` pieces in flight; see `Transport.read`."""
    with _opened(wanted.file, wanted.nbytes) as mapped:
        handle = source.lease(wanted.rank, wanted.identity, deadline=deadline)
        try:
            with memoryview(mapped) as memory:
                return _Parts(memory, source, handle, wanted).land(num_ahead, deadline)
        finally:
            source.release(handle)


def _opened(file: Path, nbytes: int) -> mmap:
    try:
        with open(file, "r+b") as opened:
            return mmap(opened.fileno(), nbytes)
    except (OSError, ValueError) as error:
        raise UnavailableError(f"read into {file}: {nbytes} bytes of it cannot be mapped: {error}") from error


@dataclass(frozen=True, slots=True)
class _Parts:
    """A read of parts in progress."""

    memory: memoryview  # of the reader's file
    source: ChunkSource
    handle: str
    wanted: PartialRead

    def land(self, num_ahead: int, deadline: Deadline) -> int:
        """Lands and proves all parts; returns the bytes that came."""
        waiting = deque(_pieces(self.wanted))
        ahead: deque[tuple[int, list[Part], Piece]] = deque()
        wire_nbytes = 0
        while waiting or ahead:
            while waiting and len(ahead) < num_ahead:
                at, parts = waiting.popleft()
                ahead.append((at, parts, self._ask(parts)))
            at, parts, piece = ahead.popleft()
            deadline.check(f"read of {self.wanted}: byte {parts[0].begin}")
            bad = self._land_piece(at, parts, piece, deadline)
            wire_nbytes += sum(part.nbytes for part in parts)
            del piece  # the wire's memory is free from here on
            if bad is not None:  # once more: a flipped bit on the way is not a bad copy at the source
                bad = self._land_piece(at, parts, self._ask(parts), deadline)
                wire_nbytes += sum(part.nbytes for part in parts)
            if bad is not None:
                raise CorruptionError(
                    f"read of {self.wanted}: bytes {bad[0]} to {bad[1]} of the payload do not match their digests, "
                    "twice; use another copy"
                )
        return wire_nbytes

    def _ask(self, parts: Sequence[Part]) -> Piece:
        return self.source.request(self.handle, [(part.begin, part.end) for part in parts])

    def _land_piece(self, at: int, parts: Sequence[Part], piece: Piece, deadline: Deadline) -> tuple[int, int] | None:
        end = at + sum(part.nbytes for part in parts)
        return _land_parts(self.memory[at:end], self.wanted.chunk_nbytes, parts, piece.take(deadline))


def _pieces(wanted: PartialRead) -> list[tuple[int, list[Part]]]:
    """The parts in pieces of about the size of a pull's, each with its place in the file."""
    pieces: list[tuple[int, list[Part]]] = []
    at = room = 0
    for part in wanted.parts:
        if part.nbytes > room or not pieces:
            pieces.append((at, []))
            room = PULL_NBYTES
        pieces[-1][1].append(part)
        at += part.nbytes
        room -= part.nbytes
    return pieces


def _land_parts(memory: memoryview, chunk_nbytes: int, parts: Sequence[Part], data: Any) -> tuple[int, int] | None:
    """Copies parts that arrived together into place; the first byte range that is not what its digest says, or None."""
    arrived = memoryview(data).cast("B")
    if arrived.nbytes != sum(part.nbytes for part in parts):
        return parts[0].begin, parts[-1].end
    at = 0
    for part in parts:
        there = slice(at, at + part.nbytes)
        found = native.copy_digest(memory[there], arrived[there], chunk_nbytes=chunk_nbytes, num_threads=DIGEST_THREADS)
        if tuple(found) != tuple(part.chunks):
            index = next(i for i, (a, b) in enumerate(zip(found, part.chunks, strict=True)) if a != b)
            begin = part.begin + index * chunk_nbytes
            return begin, min(begin + chunk_nbytes, part.end)
        at += part.nbytes
    return None
