"""The manifest: what a snapshot is, where each shard lies in its payload, and the proof of every byte.

Invariant: the entries fill the payload from the end of its header without holes, in file order, so that
ranges follow from dtypes and boxes; the chunk digests cover every byte of the payload, the header included.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ktrain import native
from ktrain.base.collector import without_collections
from ktrain.errors import CorruptionError
from ktrain.format import columns, document
from ktrain.format.digest import chunks_from_text, chunks_to_text, digest_text, to_text
from ktrain.format.payload import Entry

if TYPE_CHECKING:
    from typing_extensions import Buffer

KIND = "ktrain.manifest"
# A member of `objects` that no part can be named like: the checkpoint was imported and may lack parts (ADR 0014).
IMPORTED = "ktrain.imported"

_RUN = re.compile(r"[0-9A-Za-z][0-9A-Za-z._-]{0,127}")  # also a folder name, so nothing that walks


@dataclass(frozen=True, slots=True)
class Identity:
    """What a snapshot is of. Only snapshots of equal identity join into a checkpoint. `run`: its id."""

    run: str
    step: int
    epoch: int
    world_size: int

    def to_json(self) -> dict[str, Any]:
        return {"run": self.run, "step": self.step, "epoch": self.epoch, "world_size": self.world_size}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Identity:
        """The opposite of `to_json`.

        Raises:
            CorruptionError: the value is no identity.
        """
        return cls.from_members(document.Members("identity", value))

    @classmethod
    def from_members(cls, members: document.Members) -> Identity:
        run = members.text("run")
        if _RUN.fullmatch(run) is None:
            raise members.corrupt(f"run: expected a run's id, found {run[:40]!r}")
        identity = cls(run, members.integer("step"), members.integer("epoch"), members.integer("world_size", least=1))
        members.finish()
        return identity

    def __str__(self) -> str:
        return f"step {self.step} of epoch {self.epoch} (run {self.run}, {self.world_size} ranks)"


@dataclass(frozen=True, slots=True)
class Manifest:
    """The index of one rank's snapshot.

    `chunks` are CRC-64/NVME digests of the payload file, one per `chunk_nbytes`, the last one short.
    `objects` is tagged JSON (`format.objects`). `origin` holds free facts for people; no decision that must
    be right rests on it. `format` is the version in which it is written, and was read. `table` is
    `columns.write(entries)`, where that is at hand; it saves its time. `read_from` is the digest of the file that
    it was read from; None where it was made.
    """

    identity: Identity
    rank: int
    plan_digest: str
    nbytes: int
    chunk_nbytes: int
    chunks: tuple[int, ...]
    entries: tuple[Entry, ...]
    objects: dict[str, Any]
    origin: dict[str, Any]
    format: int = document.FORMAT
    table: document.Written | None = field(default=None, compare=False, repr=False)
    read_from: str | None = field(default=None, init=False, compare=False, repr=False)

    def to_bytes(self) -> bytes:
        """The manifest file; equal manifests give equal bytes.

        Raises:
            ConfigError: `objects` or `origin` is no plain JSON, or `format` is of a newer ktrain.
        """
        write = _WRITERS[document.check_version(KIND, self.format)]
        return document.seal(KIND, write(self), self.format)

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, known: Manifest | None = None) -> Manifest:
        """Reads and proves a manifest file.

        Args:
            known: one that was read before, and is given back where these are the bytes that it was read from.

        Raises:
            CorruptionError: it is torn, changed, or says what cannot be.
            ConfigError: a newer ktrain wrote it.
        """
        digest = digest_text(data)
        if known is not None and known.read_from == digest:
            return known
        with without_collections():
            members = document.unseal(KIND, data)
            manifest = _READERS[members.version](members)
        object.__setattr__(manifest, "read_from", digest)  # not by __init__: a changed copy was read from nothing
        return manifest

    def digest(self) -> str:
        """The digest of the manifest file (of `to_bytes()`, which is made for it)."""
        return digest_text(self.to_bytes())

    def payload_digest(self) -> str:
        """The digest of the whole payload file, joined from the chunks."""
        total = 0
        for index, chunk in enumerate(self.chunks):
            nbytes = min(self.chunk_nbytes, self.nbytes - index * self.chunk_nbytes)
            total = native.crc64_combine(total, chunk, nbytes)
        return to_text(total)

    def cover(self, begin: int, end: int) -> tuple[int, int]:
        """The smallest range of whole chunks around `[begin, end)`: what must be at hand to prove it."""
        size = self.chunk_nbytes
        first = begin // size * size
        return first, min(-(-end // size) * size, self.nbytes) if end > begin else first


def _write_1(manifest: Manifest) -> dict[str, Any]:
    return {
        "identity": manifest.identity.to_json(),
        "rank": manifest.rank,
        "plan_digest": manifest.plan_digest,
        "nbytes": manifest.nbytes,
        "chunk_nbytes": manifest.chunk_nbytes,
        "chunks": chunks_to_text(manifest.chunks),
        "data_begin": manifest.entries[0].begin if manifest.entries else manifest.nbytes,
        "tensors": manifest.table or columns.write(manifest.entries),
        "objects": manifest.objects,
        "origin": manifest.origin,
    }


def _read_1(members: document.Members) -> Manifest:
    identity = Identity.from_members(members.inner("identity"))
    nbytes, chunk_nbytes = members.integer("nbytes"), members.integer("chunk_nbytes", least=1)
    begin = members.integer("data_begin")
    manifest = Manifest(
        identity=identity,
        rank=members.integer("rank"),
        plan_digest=members.digest("plan_digest"),
        nbytes=nbytes,
        chunk_nbytes=chunk_nbytes,
        chunks=chunks_from_text(members.text("chunks")),
        entries=columns.from_json(members.inner("tensors"), begin=begin),
        objects=members.object("objects"),
        origin=members.object("origin"),
        format=members.version,
    )
    members.finish()
    _require_consistent(manifest, members, begin)
    return manifest


# By version (ADR 0016). A row is added for each new one, and never removed.
_WRITERS: dict[int, Callable[[Manifest], dict[str, Any]]] = {1: _write_1}
_READERS: dict[int, Callable[[document.Members], Manifest]] = {1: _read_1}


def verify_payload(
    manifest: Manifest, payload: Buffer, begin: int = 0, end: int | None = None, num_threads: int = 1
) -> None:
    """Digests every chunk that `[begin, end)` of a payload touches.

    Args:
        payload: the whole payload; only the chunks in question are read.

    Raises:
        CorruptionError: a chunk does not match, or the payload has another size.
    """
    view = memoryview(payload).cast("B")
    if view.nbytes != manifest.nbytes:
        raise CorruptionError(
            f"{_whose(manifest)}: expected a payload of {manifest.nbytes} bytes, found {view.nbytes}; take another copy"
        )
    first, last = manifest.cover(begin, manifest.nbytes if end is None else end)
    verify_chunks(manifest, view[first:last], first, num_threads=num_threads)


def verify_chunks(manifest: Manifest, piece: Buffer, begin: int, *, num_threads: int = 1) -> None:
    """Proves a piece of a payload that is whole chunks (see `Manifest.cover`), the first one at byte `begin`.

    Raises:
        CorruptionError: a chunk does not match.
    """
    bad = _bad_chunks(manifest, piece, begin, num_threads)
    if bad:
        ranges = _merge(manifest, bad)
        raise CorruptionError(
            f"{_whose(manifest)}: {len(bad)} chunks do not match their digests, bytes "
            f"{', '.join(f'{a} to {b}' for a, b in ranges[:5])}{' and more' if ranges[5:] else ''} "
            f"of {manifest.nbytes}; take another copy"
        )


def bad_ranges(manifest: Manifest, payload: Buffer, num_threads: int = 1) -> list[tuple[int, int]]:
    """The byte ranges of a payload that do not match their digests, merged; what it lacks is bad too."""
    view, size = memoryview(payload).cast("B")[: manifest.nbytes], manifest.chunk_nbytes
    at_hand = manifest.nbytes if view.nbytes == manifest.nbytes else view.nbytes // size * size
    lacking = range(-(-at_hand // size), len(manifest.chunks))
    return _merge(manifest, [*_bad_chunks(manifest, view[:at_hand], 0, num_threads), *lacking])


def bad_ranges_in(manifest: Manifest, piece: Buffer, begin: int, num_threads: int = 1) -> list[tuple[int, int]]:
    """Like `bad_ranges` for a piece of whole chunks (see `Manifest.cover`), the first one at byte `begin`."""
    return _merge(manifest, _bad_chunks(manifest, piece, begin, num_threads))


def _bad_chunks(manifest: Manifest, piece: Buffer, begin: int, num_threads: int) -> list[int]:
    assert begin % manifest.chunk_nbytes == 0, f"byte {begin} begins no chunk"
    found = native.digest_chunks(piece, chunk_nbytes=manifest.chunk_nbytes, num_threads=num_threads)
    first = begin // manifest.chunk_nbytes
    expected = manifest.chunks[first : first + len(found)]
    return [first + k for k, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b]


def _merge(manifest: Manifest, chunks: Iterable[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for chunk in chunks:
        begin = chunk * manifest.chunk_nbytes
        end = min(begin + manifest.chunk_nbytes, manifest.nbytes)
        if ranges and ranges[-1][1] == begin:
            ranges[-1] = (ranges[-1][0], end)
        else:
            ranges.append((begin, end))
    return ranges


def _require_consistent(manifest: Manifest, members: document.Members, begin: int) -> None:
    num_chunks = -(-manifest.nbytes // manifest.chunk_nbytes)
    if len(manifest.chunks) != num_chunks:
        raise members.corrupt(
            f"chunks: expected {num_chunks} digests for {manifest.nbytes} bytes, found {len(manifest.chunks)}"
        )
    if manifest.rank >= manifest.identity.world_size:
        raise members.corrupt(f"rank: expected one of {manifest.identity.world_size} ranks, found rank {manifest.rank}")
    end = manifest.entries[-1].end if manifest.entries else begin
    if end != manifest.nbytes:
        raise members.corrupt(f"nbytes: expected {end}, where the last tensor ends, found {manifest.nbytes}")


def _whose(manifest: Manifest) -> str:
    return f"payload of rank {manifest.rank}, {manifest.identity}"
