"""Two checkpoints compared tensor by tensor: by their digests where these decide, by their bytes where they do not.

Invariant: a tensor is called equal or different on the ground of proven bytes alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktrain.checkpoint.catalog import RunCatalog
from ktrain.errors import CorruptionError, NotFoundError
from ktrain.format import dtype as dtypes
from ktrain.format.manifest import Manifest, verify_chunks
from ktrain.format.payload import Entry
from ktrain.format.record import CommitRecord
from ktrain.format.shard import Box, Role

_PIECE_NBYTES = 64 << 20
_CACHED_PIECES = 4

Placed = tuple[int, Entry]  # rank and entry


class Side:
    """One of the two checkpoints, and its bytes."""

    def __init__(self, catalog: RunCatalog, commit: CommitRecord) -> None:
        self.commit = commit
        self.manifests = {files.rank: catalog.read_manifest(commit, files) for files in commit.ranks}
        self._catalog = catalog
        self._names = {files.rank: files.payload for files in commit.ranks}
        self._pieces: dict[tuple[int, int, int], bytes] = {}  # (rank, begin, end) -> proven bytes, the last few

    def tensors(self) -> dict[tuple[str, int], list[Placed]]:
        """(name, rank) -> where it lies; the rank is -1 for a tensor that all ranks share."""
        found: dict[tuple[str, int], list[Placed]] = {}
        for rank, manifest in sorted(self.manifests.items()):
            for entry in manifest.entries:
                owner = rank if entry.shard.role is Role.RANK else -1
                found.setdefault((entry.shard.name, owner), []).append((rank, entry))
        return found

    def read(self, rank: int, begin: int, end: int) -> memoryview:
        """Proven bytes of one rank's payload.

        Raises:
            CorruptionError, NotFoundError: the payload does not match its manifest, or is gone.
        """
        manifest = self.manifests[rank]
        low, high = manifest.cover(begin, end)
        key = (rank, low, high)
        if key not in self._pieces:
            data = self._catalog.tier.read_range(
                self._names[rank], low, high, deadline=self._catalog.transfer_deadline(high - low)
            )
            verify_chunks(manifest, data, low)
            while len(self._pieces) >= _CACHED_PIECES:
                del self._pieces[next(iter(self._pieces))]
            self._pieces[key] = data
        return memoryview(self._pieces[key])[begin - low : end - low]


@dataclass(slots=True)
class Difference:
    """What differs between checkpoints A and B. `unproven`: name -> why its bytes could not be compared."""

    added: list[dict[str, Any]] = field(default_factory=list)  # only in B
    removed: list[dict[str, Any]] = field(default_factory=list)  # only in A
    changed: list[dict[str, Any]] = field(default_factory=list)  # of another dtype, shape or role
    differing: list[str] = field(default_factory=list)  # other bytes
    equal: list[str] = field(default_factory=list)
    unproven: dict[str, str] = field(default_factory=dict)
    objects: list[str] = field(default_factory=list)  # parts with other values that are no tensors
    nbytes_read: int = 0

    def is_empty(self) -> bool:
        return not (self.added or self.removed or self.changed or self.differing or self.objects or self.unproven)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def compare(a: Side, b: Side) -> Difference:
    """Compares two checkpoints, of one run or of two, of any number of ranks."""
    found = Difference(objects=_differing_objects(a.manifests, b.manifests))
    in_a, in_b = a.tensors(), b.tensors()
    for key in sorted(in_a.keys() | in_b.keys()):
        name = key[0] if key[1] < 0 else f"{key[0]} of rank {key[1]}"
        if key not in in_a or key not in in_b:
            side, into = (in_b, found.added) if key not in in_a else (in_a, found.removed)
            into.append({"name": name, **_form(side[key])})
        elif _form(in_a[key]) != _form(in_b[key]):
            found.changed.append({"name": name, "a": _form(in_a[key]), "b": _form(in_b[key])})
        else:
            try:
                same = all(_same(a, b, *pair, found) for pair in _pairs(in_a[key], in_b[key]))
                (found.equal if same else found.differing).append(name)
            except (CorruptionError, NotFoundError) as error:
                found.unproven[name] = str(error)
    return found


def _form(placed: list[Placed]) -> dict[str, Any]:
    shard = placed[0][1].shard
    return {"dtype": shard.dtype, "shape": list(shard.global_shape), "role": shard.role.value}


def _differing_objects(a: Mapping[int, Manifest], b: Mapping[int, Manifest]) -> list[str]:
    """Parts whose values beside tensors differ; of ranks that both have."""
    names = {name for manifest in (*a.values(), *b.values()) for name in manifest.objects}
    both = a.keys() & b.keys()
    return sorted(
        name for name in names if any(a[rank].objects.get(name) != b[rank].objects.get(name) for rank in both)
    )


def _pairs(in_a: list[Placed], in_b: list[Placed]) -> Iterator[tuple[Placed, Placed, Box]]:
    """Boxes of A and of B that share items; together they cover the tensor, since each side does."""
    by_box = {(rank, entry.shard.box): entry for rank, entry in in_b}
    for rank, entry in in_a:
        twin = by_box.get((rank, entry.shard.box))
        if twin is not None:
            yield (rank, entry), (rank, twin), entry.shard.box
            continue
        for other_rank, other in in_b:
            common = entry.shard.box.intersect(other.shard.box)
            if common is not None:
                yield (rank, entry), (other_rank, other), common


def _same(a: Side, b: Side, in_a: Placed, in_b: Placed, common: Box, found: Difference) -> bool:
    (rank_a, entry_a), (rank_b, entry_b) = in_a, in_b
    if entry_a.shard.box == entry_b.shard.box:
        return all(
            _same_bytes(a, b, rank_a, rank_b, low, low + entry_b.begin - entry_a.begin, nbytes, found)
            for low, nbytes in _undecided(a.manifests[rank_a], b.manifests[rank_b], entry_a, entry_b)
        )
    whole_a = a.read(rank_a, entry_a.begin, entry_a.end)
    whole_b = b.read(rank_b, entry_b.begin, entry_b.end)
    found.nbytes_read += len(whole_a) + len(whole_b)
    item = dtypes.item_nbytes(entry_a.shard.dtype)
    runs = _runs(entry_a.shard.box, entry_b.shard.box, common, item)
    return all(whole_a[at : at + nbytes] == whole_b[other : other + nbytes] for at, other, nbytes in runs)


def _undecided(a: Manifest, b: Manifest, entry_a: Entry, entry_b: Entry) -> Iterator[tuple[int, int]]:
    """Ranges of A's payload that digests do not show to be equal: (begin, bytes), a chunk or a piece long."""
    aligned = entry_a.begin == entry_b.begin and a.chunk_nbytes == b.chunk_nbytes
    size = a.chunk_nbytes if aligned else _PIECE_NBYTES
    for low in range(entry_a.begin // size * size, entry_a.end, size):
        begin, end = max(low, entry_a.begin), min(low + size, entry_a.end)
        chunk = low // size
        ends = [min(low + size, manifest.nbytes) for manifest in (a, b)]
        if not (aligned and ends[0] == ends[1] and a.chunks[chunk] == b.chunks[chunk]):
            yield begin, end - begin


def _same_bytes(  # noqa: PLR0913 -- two places and what is counted
    a: Side, b: Side, rank_a: int, rank_b: int, begin_a: int, begin_b: int, nbytes: int, found: Difference
) -> bool:
    manifest = a.manifests[rank_a]
    low, high = manifest.cover(begin_a, begin_a + nbytes)
    if begin_a == begin_b and (begin_a, nbytes) == (low, high - low) and nbytes == manifest.chunk_nbytes:
        return False  # a whole chunk of this tensor alone has two digests: no byte of it needs to be read
    found.nbytes_read += 2 * nbytes
    return a.read(rank_a, begin_a, begin_a + nbytes) == b.read(rank_b, begin_b, begin_b + nbytes)


def _runs(a: Box, b: Box, common: Box, item_nbytes: int) -> Iterator[tuple[int, int, int]]:
    """(offset in A's bytes, offset in B's, bytes) of each stretch of `common` that lies in one piece in both."""
    last = len(common.lengths) - 1
    while last > 0 and common.lengths[last] == a.lengths[last] == b.lengths[last]:
        last -= 1
    nbytes = math.prod(common.lengths[max(last, 0) :]) * item_nbytes
    for index in itertools.product(*map(range, common.lengths[: max(last, 0)])):
        at = [offset + step for offset, step in itertools.zip_longest(common.offsets, index, fillvalue=0)]
        yield _offset(a, at) * item_nbytes, _offset(b, at) * item_nbytes, nbytes


def _offset(outer: Box, at: list[int]) -> int:
    """Items before the one `at` (in the global tensor) within a box that is stored row by row."""
    total = 0
    for begin, length, here in zip(outer.offsets, outer.lengths, at, strict=True):
        total = total * length + here - begin
    return total
