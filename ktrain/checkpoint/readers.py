"""One copy of one saved rank, opened: a slot of the own volume, an object of a tier, or a slot of a peer.

Invariant: no byte is lent by `view` or written to memory before its whole chunk matched the digest that was made at
the snapshot, after the last hop that the bytes took (design promise 2).
"""

from __future__ import annotations

import array
import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy

from ktrain import native
from ktrain.abc.tier import ReadsInPieces, Tier
from ktrain.abc.transport import Part, PartialRead
from ktrain.base.clock import Deadline
from ktrain.checkpoint.ranges import Share, Span, batches, plan_spans, runs_of, split_span, table_of
from ktrain.errors import CorruptionError, InternalError
from ktrain.format.manifest import Manifest
from ktrain.native import Runs
from ktrain.snapshot.arena import SlotReader
from ktrain.snapshot.scratch import Scratch

PIECE_NBYTES = 8 << 20
"""Of a piece, where a tier reads piece by piece: our copy goes past the caches from 4 MiB on, and smaller pieces took
up to a third longer."""
BUCKET_READ_NBYTES = 32 << 20
"""Of one read where it does not, and what sets how many are in flight."""

PEER_READ_NBYTES = 16 << 20
"""Of one read from a peer: large beside the cost of a call, small beside what a volume has free."""


class BadCopy(CorruptionError):
    """A copy that is proven bad, with the first bad byte range where it is known."""

    def __init__(self, message: str, begin: int | None = None, end: int | None = None) -> None:
        super().__init__(message)
        self.begin, self.end = begin, end


Read = Callable[[Deadline], int]
"""One call that brings bytes near, proves them and puts them where they are wanted; returns how many it read."""


class Reader(Protocol):
    """One copy of one saved rank. Its reads may run side by side."""

    is_near: bool  # its reads are work of the processors alone, which use all threads by themselves

    def reads(self, share: Share) -> list[Read]:
        """The reads that bring a share."""

    def view(self, begin: int, end: int) -> memoryview:
        """Bytes of a view that was brought; valid until `close`."""

    def stop(self) -> None:
        """Has reads that have not begun do nothing: the copy is refused."""

    def close(self) -> None: ...


class _Proof:
    """The digests of a manifest, at hand for native code."""

    def __init__(self, manifest: Manifest, num_threads: int) -> None:
        self._manifest = manifest
        self._chunks = memoryview(array.array("Q", manifest.chunks))
        self._num_threads = num_threads

    def land(self, data: Any, begin: int, runs: Runs, where: str) -> None:
        """Proves whole chunks and copies what the runs want of them.

        Raises:
            BadCopy: a chunk does not match; nothing of it was written.
        """
        manifest = self._manifest
        first = begin // manifest.chunk_nbytes
        num_chunks = -(-memoryview(data).nbytes // manifest.chunk_nbytes)
        bad = native.prove_scatter(
            data,
            runs,
            begin=begin,
            chunk_nbytes=manifest.chunk_nbytes,
            expected=self._chunks[first : first + num_chunks],
            num_threads=self._num_threads,
        )
        if bad:
            low = begin + bad[0] * manifest.chunk_nbytes
            together = next((n for n, index in enumerate(bad) if index != bad[0] + n), len(bad))
            high = min(low + together * manifest.chunk_nbytes, manifest.nbytes)
            raise BadCopy(
                f"{where}, rank {manifest.rank}, {manifest.identity}: bytes {low} to {high} differ from the digest "
                "made at the snapshot",
                low,
                high,
            )


class VolumeReader:
    """A sealed slot of this node's volume, under lease."""

    is_near = True

    def __init__(self, slot: SlotReader, manifest: Manifest, num_threads: int) -> None:
        # What the bytes are proven by, the header's included; digests of whole manifests would have to be made anew.
        found, agreed = ((each.nbytes, each.chunk_nbytes, each.chunks) for each in (slot.manifest, manifest))
        if found != agreed:
            slot.close()
            raise BadCopy(f"slot {slot.slot}: its manifest is not the one that was agreed on")
        self._slot = slot
        self._manifest = manifest
        self._proof = _Proof(manifest, num_threads)
        self._proven: list[tuple[int, int]] = []  # sorted, as spans are

    def reads(self, share: Share) -> list[Read]:
        return [partial(self._read, span) for span in plan_spans(self._manifest, share, closes_gaps=False)]

    def _read(self, span: Span, deadline: Deadline) -> int:
        deadline.check(f"prove rank {self._manifest.rank} in memory")
        self._proof.land(self._slot.memory[span.begin : span.end], span.begin, span.runs, f"slot {self._slot.slot}")
        self._proven.append((span.begin, span.end))
        return span.end - span.begin

    def view(self, begin: int, end: int) -> memoryview:
        at = bisect.bisect_right(self._proven, begin, key=lambda span: span[0]) - 1
        if at < 0 or end > self._proven[at][1]:
            raise _not_asked_for(f"slot {self._slot.slot}", begin, end)
        return self._slot.memory[begin:end]

    def stop(self) -> None:
        """Its reads run one after the other, so none is left."""

    def close(self) -> None:
        self._slot.close()


@dataclass(frozen=True, slots=True)
class Object:
    """Where a payload lies, and how long a call for some of its bytes may take."""

    tier: Tier
    name: str
    deadline_of: Callable[[int], Deadline]


class TierReader:
    """An object in a bucket or on disk. Bytes stay no longer than their proof takes, except those that are viewed."""

    is_near = False

    def __init__(self, stored: Object, manifest: Manifest) -> None:
        self._stored = stored
        self._manifest = manifest
        self._pieces = stored.tier if isinstance(stored.tier, ReadsInPieces) else None
        self._read_nbytes = BUCKET_READ_NBYTES if self._pieces is None else self._pieces.range_nbytes
        self._proof = _Proof(manifest, 1)  # reads run side by side already
        self._views = _Views()
        self._is_stopped = False

    def reads(self, share: Share) -> list[Read]:
        found: list[Read] = []
        for span in plan_spans(self._manifest, self._views.landing(share), closes_gaps=True):
            for begin, end in split_span(span, self._read_nbytes, self._manifest.chunk_nbytes):
                found.append(partial(self._read, begin, end, span.runs))
        return found

    def _read(self, begin: int, end: int, runs: Runs, deadline: Deadline) -> int:
        if self._is_stopped:
            return 0
        name = self._stored.name
        deadline.check(f"read {name}")
        allowed = self._stored.deadline_of(end - begin)
        within = deadline.sooner(allowed.remaining_s())
        if self._pieces is None:
            data = self._stored.tier.read_range(name, begin, end, deadline=within)
            self._land(data, begin, end, runs)
        else:
            piece_nbytes = max(1, PIECE_NBYTES // self._manifest.chunk_nbytes) * self._manifest.chunk_nbytes

            def take(at: int, data: memoryview) -> None:
                self._proof.land(data, at, runs, name)

            self._pieces.read_pieces(name, (begin, end), take, piece_nbytes=piece_nbytes, deadline=within)
        return end - begin

    def _land(self, data: Any, begin: int, end: int, runs: Runs) -> None:
        if len(data) != end - begin:
            raise BadCopy(
                f"{self._stored.name}: expected {self._manifest.nbytes} bytes, it ends at {begin + len(data)}",
                begin + len(data),
                end,
            )
        self._proof.land(data, begin, runs, self._stored.name)

    def view(self, begin: int, end: int) -> memoryview:
        return self._views.view(self._stored.name, begin, end)

    def stop(self) -> None:
        self._is_stopped = True

    def close(self) -> None:
        self._views = _Views()


@dataclass(frozen=True, slots=True)
class Peer:
    """How parts of another node's slot are brought: `read` returns the bytes that crossed the wire."""

    name: str
    read: Callable[[PartialRead, Deadline], int]
    scratch: Scratch
    deadline_of: Callable[[int], Deadline]
    crossed: Callable[[int], None]  # takes the bytes that crossed the wire; from several threads


class PeerReader:
    """A sealed slot of another node's volume, read in parts. Several parts travel together, so no gap is read over."""

    is_near = False

    def __init__(self, peer: Peer, manifest: Manifest) -> None:
        self._peer = peer
        self._manifest = manifest
        self._proof = _Proof(manifest, 1)  # reads run side by side already
        self._views = _Views()
        self._is_stopped = False

    def reads(self, share: Share) -> list[Read]:
        spans = plan_spans(self._manifest, self._views.landing(share), closes_gaps=False)
        return [partial(self._read, batch) for batch in batches(spans, PEER_READ_NBYTES, self._manifest.chunk_nbytes)]

    def _read(self, batch: Sequence[Span], deadline: Deadline) -> int:
        if self._is_stopped:
            return 0
        peer, manifest = self._peer, self._manifest
        nbytes = sum(span.end - span.begin for span in batch)
        deadline.check(f"read rank {manifest.rank} from {peer.name}")
        file = peer.scratch.take()
        try:
            parts = [self._part(span.begin, span.end) for span in batch]
            wanted = PartialRead(manifest.rank, manifest.identity, manifest.chunk_nbytes, parts, file.path)
            within = deadline.sooner(peer.deadline_of(nbytes).remaining_s())
            peer.crossed(peer.read(wanted, within))
        except BaseException:
            peer.scratch.drop(file)  # the wire may still be writing to it
            raise
        try:
            at = 0
            for span in batch:
                data = file.memory[at : at + span.end - span.begin]
                self._proof.land(data, span.begin, span.runs, f"peer {peer.name}")
                at += len(data)
        finally:
            peer.scratch.give(file)
        return nbytes

    def _part(self, begin: int, end: int) -> Part:
        size = self._manifest.chunk_nbytes
        return Part(begin, end, self._manifest.chunks[begin // size : -(-end // size)])

    def view(self, begin: int, end: int) -> memoryview:
        return self._views.view(f"peer {self._peer.name}", begin, end)

    def stop(self) -> None:
        self._is_stopped = True

    def close(self) -> None:
        self._views = _Views()


class LentReader:
    """A whole snapshot of another node in a file that this node lends to its ranks, mapped until it has been read.

    Raises:
        FileNotFoundError: the file was taken back.
    """

    is_near = True

    def __init__(self, file: Path, peer: str, manifest: Manifest, num_threads: int) -> None:
        with open(file, "rb") as opened:
            self._mapping: native.MappedFile | None = native.map_file(opened.fileno(), manifest.nbytes, writable=False)
        self._where = f"peer {peer}"
        self._manifest = manifest
        self._proof = _Proof(manifest, num_threads)
        self._views = _Views()

    def reads(self, share: Share) -> list[Read]:
        return [partial(self._read, self._views.landing(share))]

    def _read(self, share: Share, deadline: Deadline) -> int:
        assert self._mapping is not None
        memory, nbytes = memoryview(self._mapping), 0
        for span in plan_spans(self._manifest, share, closes_gaps=False):
            deadline.check(f"prove rank {self._manifest.rank} from {self._where}")
            self._proof.land(memory[span.begin : span.end], span.begin, span.runs, self._where)
            nbytes += span.end - span.begin
        memory.release()
        self.stop()
        return nbytes

    def view(self, begin: int, end: int) -> memoryview:
        return self._views.view(self._where, begin, end)

    def stop(self) -> None:
        """Its one read has ended, or will not be: the room goes back before anybody trains."""
        self._mapping = None

    def close(self) -> None:
        self.stop()
        self._views = _Views()


class _Views:
    """Memory for what is to be viewed of a copy whose bytes do not stay near."""

    def __init__(self) -> None:
        self._memory: list[tuple[int, memoryview]] = []  # sorted by where they begin

    def landing(self, share: Share) -> Share:
        """The share with its views landing in memory of this object."""
        self._memory = [
            (begin, numpy.empty(end - begin, dtype=numpy.uint8).data)
            for begin, end in sorted(share.views)
            if end > begin
        ]
        views = [
            (numpy.frombuffer(memory, dtype=numpy.uint8).ctypes.data, memory.nbytes, begin, 1, 0, 0)
            for begin, memory in self._memory
        ]
        table = numpy.concatenate(
            (table_of(share.runs), numpy.array(views, dtype=numpy.int64).reshape(-1, 6).T), axis=1
        )
        return Share(runs=runs_of(table[:, numpy.argsort(table[2], kind="stable")]))

    def view(self, where: str, begin: int, end: int) -> memoryview:
        at = bisect.bisect_right(self._memory, begin, key=lambda view: view[0]) - 1
        start, memory = self._memory[at] if at >= 0 else (begin, memoryview(b""))
        if end - start > memory.nbytes:
            raise _not_asked_for(where, begin, end)
        return memory[begin - start : end - start]


def _not_asked_for(where: str, begin: int, end: int) -> InternalError:
    return InternalError(f"{where}: bytes {begin} to {end} were not asked for as a view, so they are not proven")
