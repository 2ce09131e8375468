"""What a node holds itself of a peer's snapshot, copied into the slot that keeps a replica of it (ADR 0025).

Invariant: nothing that is found here is trusted. Manifests say where the same boxes of the same tensors lie; a chunk
counts only when it matches the digest in the peer's manifest.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import numpy
import numpy.typing as npt

from ktrain import native
from ktrain.abc.source import copies_beside
from ktrain.abc.transport import BadOwn
from ktrain.base.clock import Deadline
from ktrain.errors import KtrainError
from ktrain.format.dtype import item_nbytes
from ktrain.format.manifest import Manifest, bad_ranges_in
from ktrain.format.payload import Entry
from ktrain.format.shard import Box, Role
from ktrain.snapshot.arena import NodeVolume, SlotReader

DIGEST_THREADS = 1  # training needs the cores more
_PIECE_NBYTES = 32 << 20  # copied and proven between two looks at the deadline
_MAX_SEGMENTS = 4096  # of one box; one that lies in more pieces than that is left to the wire

_Segments = npt.NDArray[numpy.int64]
"""A row each of: offset in the payload, bytes, offset in the payload that it comes from, index of that one's reader."""


class OwnBytes:
    """What a volume holds of one payload, in the shares and copies of its own ranks at the same step.

    A context manager: the slots are under lease until it ends. Use from one thread.
    """

    def __init__(self, volume: NodeVolume, manifest: Manifest) -> None:
        self._manifest = manifest
        self._sources: list[tuple[int, SlotReader]] = []  # with the rank, as `BadOwn` has it
        self._segments = self._find(volume)
        self.bad: list[BadOwn] = []  # found by `copy`

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, reader in self._sources:
            reader.close()

    def copy(self, memory: memoryview, deadline: Deadline) -> list[tuple[int, int]]:
        """Copies what there is into `memory`, the whole payload's, and proves it; then in whole chunks what is missing.

        A chunk that `memory` holds already, from an older step, is not missing either.
        """
        manifest, size = self._manifest, self._manifest.chunk_nbytes
        if not self._segments.size:
            return [(0, manifest.nbytes)]
        missing: list[tuple[int, int]] = []
        piece_nbytes = max(1, _PIECE_NBYTES // size) * size
        for begin in range(0, manifest.nbytes, piece_nbytes):
            deadline.check(f"copy of rank {manifest.rank}, {manifest.identity}: byte {begin}")
            end = min(begin + piece_nbytes, manifest.nbytes)
            found = native.gather_digest(
                memory[begin:end], self._columns(begin, end), chunk_nbytes=size, num_threads=DIGEST_THREADS
            )
            for index, digest in enumerate(found, start=begin // size):
                if digest != manifest.chunks[index]:
                    low, high = index * size, min((index + 1) * size, manifest.nbytes)
                    self._look_at_sources(low, high)
                    joins = missing and missing[-1][1] == low
                    missing.append((missing.pop()[0] if joins else low, high))
        return missing

    def _columns(self, begin: int, end: int) -> tuple[Any, Any, Any]:
        """The segments of a part of the payload, for native code."""
        offset, nbytes, source, index = self._between(begin, end)
        base = numpy.array([_address(reader.memory) for _, reader in self._sources], dtype=numpy.int64)
        return (base[index] + source).data, nbytes.data, (offset - begin).data

    def _between(self, begin: int, end: int) -> _Segments:
        offset, nbytes, source, index = self._segments
        first, last = numpy.searchsorted(offset + nbytes, begin, "right"), numpy.searchsorted(offset, end, "left")
        offset, nbytes, source, index = self._segments[:, first:last]
        low, high = numpy.maximum(offset, begin), numpy.minimum(offset + nbytes, end)
        return numpy.stack((low, high - low, source + low - offset, index))

    def _look_at_sources(self, begin: int, end: int) -> None:
        """Why a chunk is not what it should be: the bytes that it was made from may be bad, or just be others."""
        _, nbytes, source, index = self._between(begin, end)
        if nbytes.sum() < end - begin:
            return  # a part of it is not here
        for at, count, which in zip(source.tolist(), nbytes.tolist(), index.tolist(), strict=True):
            rank, reader = self._sources[which]
            low, high = reader.manifest.cover(at, at + count)
            bad = bad_ranges_in(reader.manifest, reader.memory[low:high], low)
            if bad and rank not in {found.rank for found in self.bad}:
                self.bad.append(BadOwn(rank, *bad[0]))

    def _find(self, volume: NodeVolume) -> _Segments:
        wanted = _Wanted(self._manifest)
        for rank, reader in _readers(volume, self._manifest):
            if wanted.take(reader.manifest, len(self._sources)):
                self._sources.append((rank, reader))
            else:
                reader.close()
            if wanted.is_found:
                break
        return wanted.segments()


def _readers(volume: NodeVolume, manifest: Manifest) -> Iterator[tuple[int, SlotReader]]:
    """What the volume holds of the same snapshot, the likeliest first; what cannot be opened is passed over."""
    ranks = volume.copies.ranks()
    like = manifest.rank % max(1, len(ranks))  # the rank with this one's place on its node divides the same bytes
    for rank in [*ranks[like:], *ranks[:like]]:
        try:
            yield copies_beside(rank), volume.copies.open(rank, manifest.identity)
        except KtrainError:
            continue  # an extra: the wire has it too
    for held in volume.scan():
        if held.identity == manifest.identity and held.rank != manifest.rank:
            try:
                yield held.rank, volume.open(held.rank, held.identity)
            except KtrainError:
                continue


class _Wanted:
    """The boxes of a payload that are still looked for, and the segments that were found."""

    def __init__(self, manifest: Manifest) -> None:
        self._entries: dict[str, list[tuple[Entry, list[Box]]]] = {}
        for entry in manifest.entries:
            if entry.shard.role is not Role.RANK and entry.shard.box.numel:
                self._entries.setdefault(entry.shard.name, []).append((entry, [entry.shard.box]))
        self._rows: list[tuple[int, int, int, int]] = []

    @property
    def is_found(self) -> bool:
        """Whether there is nothing left to look for."""
        return not any(boxes for entries in self._entries.values() for _, boxes in entries)

    def take(self, source: Manifest, index: int) -> bool:
        """Takes what another payload has; whether that is anything."""
        before = len(self._rows)
        for theirs in source.entries:
            for entry, boxes in self._entries.get(theirs.shard.name, ()):
                if boxes and _are_one(entry, theirs):
                    boxes[:] = [rest for box in boxes for rest in self._take_box(box, entry, theirs, index)]
        return len(self._rows) > before

    def _take_box(self, box: Box, entry: Entry, theirs: Entry, index: int) -> list[Box]:
        """What of the box is still to be looked for."""
        common = box.intersect(theirs.shard.box)
        if common is None:
            return [box]
        found = _contiguous(common, theirs, entry)
        if found is None:
            return [box]
        self._rows += [(to, nbytes, at, index) for at, to, nbytes in found]
        return box.around(common)

    def segments(self) -> _Segments:
        """All that was found, sorted."""
        table = numpy.array(sorted(self._rows), dtype=numpy.int64).reshape(-1, 4)
        return numpy.ascontiguousarray(table.T)


def _are_one(entry: Entry, other: Entry) -> bool:
    """Whether both are boxes of one tensor, which all who store any of it hold alike."""
    a, b = entry.shard, other.shard
    return (a.dtype, a.global_shape) == (b.dtype, b.global_shape) and b.role is not Role.RANK


def _contiguous(common: Box, source: Entry, target: Entry) -> list[tuple[int, int, int]] | None:
    """The runs of bytes that both payloads have in a row: offset in each, and bytes. None for too many."""
    item = item_nbytes(source.shard.dtype)
    steps = [_steps(entry.shard.box, item) for entry in (source, target)]
    at = source.begin + _offset(common, source.shard.box, steps[0])
    to = target.begin + _offset(common, target.shard.box, steps[1])
    dims = [dim for dim in zip(common.lengths, *steps, strict=True) if dim[0] > 1]
    run = item
    while dims and dims[-1][1:] == (run, run):
        run *= dims.pop()[0]
    if math.prod(length for length, _, _ in dims) > _MAX_SEGMENTS:
        return None
    found = []
    for index in itertools.product(*(range(length) for length, _, _ in dims)):
        ahead, along = (sum(n * dim[side] for n, dim in zip(index, dims, strict=True)) for side in (1, 2))
        found.append((at + ahead, to + along, run))
    return found


def _steps(box: Box, item: int) -> list[int]:
    """Bytes from one item to the next along each dimension of a box that lies in a row."""
    return [item * math.prod(box.lengths[dim + 1 :]) for dim in range(len(box.lengths))]


def _offset(inner: Box, outer: Box, steps: list[int]) -> int:
    return sum((a - b) * step for a, b, step in zip(inner.offsets, outer.offsets, steps, strict=True))


def _address(memory: memoryview) -> int:
    return int(numpy.frombuffer(memory, dtype=numpy.uint8).ctypes.data)
