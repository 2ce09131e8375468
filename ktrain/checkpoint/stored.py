"""A committed checkpoint as a reader without a state sees it: which saved bytes make which tensor, proven as they come.

Invariant: no byte leaves `ProvenRanges` that was not digested after it was read (design promise 2). Imports no torch.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy

from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.lineage import on_line
from ktrain.checkpoint.reading import reading
from ktrain.errors import CorruptionError, NotFoundError
from ktrain.format.dtype import item_nbytes
from ktrain.format.manifest import Manifest, bad_ranges_in
from ktrain.format.payload import Entry
from ktrain.format.record import CommitRecord
from ktrain.format.shard import Box, Role

_WINDOW_NBYTES = 8 << 20  # of one request
_KEPT_NBYTES = 64 << 20  # of windows that are near, all ranks together, where ranks are few
_NUM_THREADS = 4


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint. `entries`: saved rank and entry, which together hold all items."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    entries: tuple[tuple[int, Entry], ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * item_nbytes(self.dtype)


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A committed checkpoint with the manifests of all its ranks, proven against the record."""

    catalog: RunCatalog
    commit: CommitRecord
    manifests: Mapping[int, Manifest]

    @classmethod
    def of(cls, catalog: RunCatalog, commit: CommitRecord) -> StoredCheckpoint:
        """The checkpoint of a record.

        Raises:
            CorruptionError: a manifest is not the one that was committed.
        """
        with ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ktrain-manifests") as pool:
            manifests = pool.map(lambda files: catalog.read_manifest(commit, files), commit.ranks)
            return cls(catalog, commit, {manifest.rank: manifest for manifest in manifests})

    def tensors(self, prefix: str) -> list[StoredTensor]:
        """The tensors whose names begin with the prefix, under the rest of their names, in the order of their bytes.

        What is each rank's own is that of the lowest rank that has it, as in a restore on another number of ranks.
        """
        found: dict[str, list[tuple[int, Entry]]] = {}
        for rank in sorted(self.manifests):
            for entry in self.manifests[rank].entries:
                shard = entry.shard
                if not shard.name.startswith(prefix):
                    continue
                rows = found.setdefault(shard.name.removeprefix(prefix), [])
                if not rows or shard.role is not Role.RANK:
                    rows.append((rank, entry))
        tensors = [_tensor(name, rows) for name, rows in found.items()]
        return sorted(tensors, key=lambda tensor: (tensor.entries[0][0], tensor.entries[0][1].begin))


@contextmanager
def open_kept(catalog: RunCatalog, step: int | None, *, timeouts: Timeouts) -> Iterator[StoredCheckpoint]:
    """The newest checkpoint on the run's line, or the newest of a step.

    Collectors are kept off it within the block; where the run lets us write no mark, it is read all the same.

    Raises:
        NotFoundError: there is none, or it was collected in this moment.
        CorruptionError: a manifest is not the one that was committed.
    """
    commit = choose_commit(catalog, step)
    with reading(catalog, commit.identity.step, timeouts=timeouts):
        if commit not in catalog.listing().commits:
            raise NotFoundError(f"run {catalog.tier.url}: {commit.identity} was collected just now; try again")
        yield StoredCheckpoint.of(catalog, commit)


def choose_commit(catalog: RunCatalog, step: int | None) -> CommitRecord:
    """The record of the newest checkpoint on the run's line, or of the newest try at a step.

    Raises:
        NotFoundError: there is none; says which steps there are.
    """
    commits = catalog.listing().commits
    if step is not None:
        wanted = [commit for commit in commits if commit.identity.step == step]
    else:
        attempts, epochs = catalog.attempts(), {commit.identity.epoch for commit in commits}
        wanted = [commit for commit in commits if on_line(commit.identity, attempts, epochs)]
    if not wanted:
        steps = sorted({commit.identity.step for commit in commits})
        what = "checkpoint" if step is None else f"checkpoint of step {step}"
        there = f"committed steps are {steps[-20:]}" if steps else "nothing is committed"
        raise NotFoundError(f"run {catalog.tier.url}: there is no {what}; {there}; see `ktrain ckpt ls`")
    return wanted[-1]


def _tensor(name: str, rows: Sequence[tuple[int, Entry]]) -> StoredTensor:
    """The tensor with as many of its entries as it takes to cover it (replicas hold it several times)."""
    first = rows[0][1].shard
    missing = [Box.whole(first.global_shape)] if math.prod(first.global_shape) else []
    taken = []
    for rank, entry in rows:
        rest = [piece for box in missing for piece in box.subtract(entry.shard.box)]
        if rest != missing:
            taken.append((rank, entry))
        missing = rest
    if missing:
        raise CorruptionError(f"tensor {name!r}: no rank stored the items from {missing[0].offsets}; take another step")
    return StoredTensor(name, first.dtype, first.global_shape, tuple(taken) or (rows[0],))


def ranges_of(tensors: Iterable[StoredTensor]) -> dict[int, list[tuple[int, int]]]:
    """What of the payloads the tensors are made of, by saved rank."""
    found: dict[int, list[tuple[int, int]]] = {}
    for tensor in tensors:
        for rank, entry in tensor.entries:
            found.setdefault(rank, []).append((entry.begin, entry.end))
    return found


def assemble(tensor: StoredTensor, proven: ProvenRanges) -> numpy.ndarray[Any, numpy.dtype[numpy.uint8]]:
    """All bytes of a tensor, row by row, from its entries."""
    item = item_nbytes(tensor.dtype)
    whole = numpy.empty((*tensor.shape, item), dtype=numpy.uint8)
    for rank, entry in tensor.entries:
        box = entry.shard.box
        if not box.numel:
            continue
        target = whole[tuple(slice(at, at + length) for at, length in zip(box.offsets, box.lengths, strict=True))]
        piece = target if target.flags.c_contiguous else numpy.empty_like(target, order="C")
        proven.copy(rank, entry.begin, entry.end, piece.reshape(-1).data)
        if piece is not target:
            target[...] = piece
    return whole.reshape(-1)


def span(entry: Entry, box: Box) -> tuple[int, int]:
    """The shortest byte range of a payload that has all items of a box, which lies inside of the entry's."""
    outer = entry.shard.box
    strides = strides_of(outer.lengths)
    first = sum((at - begin) * stride for at, begin, stride in zip(box.offsets, outer.offsets, strides, strict=True))
    last = first + sum((length - 1) * stride for length, stride in zip(box.lengths, strides, strict=True))
    size = item_nbytes(entry.shard.dtype)
    return (entry.begin + first * size, entry.begin + (last + 1) * size) if box.numel else (entry.begin, entry.begin)


def strides_of(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides in items of a tensor that lies row by row."""
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def _merged(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(ranges):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        elif end > begin:
            merged.append((begin, end))
    return merged


class Near(Protocol):
    """Copies of a checkpoint's payloads that are at hand."""

    def memory(self) -> dict[int, memoryview]:
        """The payloads, by rank; they may be bad."""

    def refuse(self, rank: int, reason: str) -> None:
        """Takes a copy that was proven bad out of use."""


class ProvenRanges:
    """Byte ranges of a checkpoint's payloads, named before they are read. Use `copy` from one thread.

    What is asked for is merged and read in windows of whole chunks, some ahead. The windows that were used last are
    kept, so that ranges that follow one another in a payload cost each window once. Memory stays below 64 MiB, or two
    windows a rank where there are very many ranks.
    """

    def __init__(
        self,
        stored: StoredCheckpoint,
        ranges: Mapping[int, Iterable[tuple[int, int]]],
        *,
        near: Near | None = None,
    ) -> None:
        self._catalog = stored.catalog
        self._files = {files.rank: files for files in stored.commit.ranks}
        self._manifests = stored.manifests
        chunk = max((manifest.chunk_nbytes for manifest in stored.manifests.values()), default=1)
        share = _KEPT_NBYTES // max(1, len(ranges))
        self._window_nbytes = max(chunk, min(_WINDOW_NBYTES, share // 4) // chunk * chunk)
        self._num_kept = max(_KEPT_NBYTES // self._window_nbytes, 2 * len(ranges))
        # Half of what is kept, spread over the ranks: whoever reads all ranks in turn finds what was read ahead.
        self._num_ahead = max(1, min(_NUM_THREADS, self._num_kept // (2 * max(1, len(ranges)))))
        self._windows = {rank: self._cut(rank, wanted) for rank, wanted in ranges.items()}
        self._recent: OrderedDict[tuple[int, int], Future[bytes | memoryview]] = OrderedDict()
        self._pool = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ktrain-ranges")
        self._closed = threading.Event()
        self._sizes: list[int] = []
        self._copies = near
        self._memory = {} if near is None else near.memory()

    @property
    def read_nbytes(self) -> int:
        """Bytes that were read from the run's tier so far."""
        return sum(self._sizes)

    def _cut(self, rank: int, wanted: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
        size = self._window_nbytes
        return [
            (low, min(low + size, end))
            for begin, end in _merged(self._manifests[rank].cover(*each) for each in wanted)
            for low in range(begin, end, size)
        ]

    def copy(self, rank: int, begin: int, end: int, target: memoryview) -> None:
        """Copies proven bytes of a range that was named into `target`.

        Raises:
            CorruptionError: the bytes differ from their digests; names object and range.
            NotFoundError, UnavailableError, DeadlineError: they could not be read.
        """
        windows = self._windows[rank]
        low, high = 0, len(windows)
        while low < high:  # the last window that begins at or before `begin`
            middle = (low + high) // 2
            low, high = (middle + 1, high) if windows[middle][0] <= begin else (low, middle)
        index, at = low - 1, begin
        while at < end:
            start, stop = windows[index]
            assert start <= at < stop, f"rank {rank}: bytes {begin} to {end} were not named"
            data = self._window(rank, index)
            upto = min(end, stop)
            target[at - begin : upto - begin] = memoryview(data)[at - start : upto - start]
            index, at = index + 1, upto

    def _window(self, rank: int, index: int) -> bytes | memoryview:
        for ahead in range(index, min(index + self._num_ahead, len(self._windows[rank]))):
            if (rank, ahead) not in self._recent:
                self._recent[rank, ahead] = self._pool.submit(self._read, rank, *self._windows[rank][ahead])
        self._recent.move_to_end((rank, index))
        future = self._recent[rank, index]
        while len(self._recent) > self._num_kept:
            self._recent.popitem(last=False)
        return future.result()

    def _read(self, rank: int, begin: int, end: int) -> bytes | memoryview:
        if self._closed.is_set():
            return b""
        memory = self._memory.get(rank)
        if memory is not None and self._is_proven(rank, memory, begin, end):
            return memory[begin:end]
        name, manifest = self._files[rank].payload, self._manifests[rank]
        deadline = self._catalog.transfer_deadline(end - begin)
        data = self._catalog.tier.read_range(name, begin, end, deadline=deadline)
        bad = bad_ranges_in(manifest, data, begin)
        if bad:
            raise CorruptionError(
                f"{name}: rank {rank}, {manifest.identity}: bytes {bad[0][0]} to {bad[0][1]} differ from the digest "
                "made at the snapshot; take another step"
            )
        self._sizes.append(end - begin)
        return data

    def _is_proven(self, rank: int, memory: memoryview, begin: int, end: int) -> bool:
        bad = bad_ranges_in(self._manifests[rank], memory[begin:end], begin)
        if bad and self._memory.pop(rank, None) is not None and self._copies is not None:
            self._copies.refuse(rank, f"bytes {bad[0][0]} to {bad[0][1]} differ from the digest made at the snapshot")
        return not bad

    def close(self) -> None:
        """Ends the threads; a read in progress ends by its own deadline. May be called again."""
        self._closed.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._recent.clear()
        self._memory = {}

    def __enter__(self) -> ProvenRanges:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
