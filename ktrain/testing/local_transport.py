"""Pulls between volumes of one process: the peer tier without a wire, for tests of the layers above."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ktrain.abc.transport import PartialRead, Receipt
from ktrain.base.clock import Deadline
from ktrain.errors import DeadlineError, UnavailableError
from ktrain.format.manifest import Identity
from ktrain.replicate.landing import IN_FLIGHT, Piece, Ranges, Wanted, land, land_parts
from ktrain.replicate.source import VolumeSource
from ktrain.snapshot.arena import NodeVolume


@dataclass(slots=True)
class LocalWire:
    """What connects the LocalTransports of a test, and where faults go in."""

    nodes: dict[str, LocalTransport] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)  # nodes that cannot be reached
    # Called with (node, begin, end) before each piece leaves its source; may raise.
    before_piece: Callable[[str, int, int], None] = lambda node, begin, end: None
    # Called with the piece's bytes; what it returns arrives instead.
    on_piece: Callable[[bytes], bytes] = lambda data: data


class LocalTransport:
    """A node on a LocalWire."""

    name = "local"

    def __init__(self, wire: LocalWire, volume: NodeVolume, *, slots: int = 2) -> None:
        self._wire = wire
        self._volume = volume
        self._slots = slots
        self.source = VolumeSource(volume)
        wire.nodes[volume.node] = self

    def address(self) -> str | None:
        node = self._volume.node
        return None if node in self._wire.cut or node not in self._wire.nodes else f"local:{node}"

    def pull(
        self,
        source: str,
        rank: int,
        identity: Identity,
        *,
        protect: Sequence[tuple[int, int]],
        deadline: Deadline,
    ) -> Receipt:
        chunks = _LocalChunks(self._wire, source.removeprefix("local:"))
        return land(self._volume, chunks, Wanted(rank, identity, protect, self._slots), deadline=deadline)

    def read(self, source: str, wanted: PartialRead, *, deadline: Deadline) -> int:
        chunks = _LocalChunks(self._wire, source.removeprefix("local:"))
        return land_parts(chunks, wanted, num_ahead=IN_FLIGHT, deadline=deadline)

    def release(self, rank: int) -> None:
        self._volume.release(rank)

    def close(self) -> None:
        self._wire.nodes.pop(self._volume.node, None)
        self.source.close()


@dataclass(frozen=True, slots=True)
class _LocalChunks:
    wire: LocalWire
    node: str

    def open(self, rank: int, identity: Identity, *, deadline: Deadline) -> tuple[str, bytes]:
        deadline.check(f"pull from {self.node}")
        return self._source().open(rank, identity.to_json())

    def lease(self, rank: int, identity: Identity, *, deadline: Deadline) -> str:
        deadline.check(f"read from {self.node}")
        return self._source().lease(rank, identity.to_json())

    def request(self, handle: str, ranges: Ranges) -> Piece:
        return _LocalPiece(self, handle, ranges)

    def release(self, handle: str) -> None:
        if self.node in self.wire.nodes:
            self.wire.nodes[self.node].source.release(handle)

    def read(self, handle: str, ranges: Ranges) -> bytes:
        self.wire.before_piece(self.node, ranges[0][0], ranges[-1][1])
        source = self._source()
        return self.wire.on_piece(b"".join(source.read(handle, begin, end) for begin, end in ranges))

    def _source(self) -> VolumeSource:
        if self.node in self.wire.cut or self.node not in self.wire.nodes:
            raise UnavailableError(f"pull: node {self.node!r} cannot be reached on this local wire")
        return self.wire.nodes[self.node].source


@dataclass(frozen=True, slots=True)
class _LocalPiece:
    chunks: _LocalChunks
    handle: str
    ranges: Ranges

    def take(self, deadline: Deadline) -> bytes:
        if deadline.expired():
            raise DeadlineError(f"pull from {self.chunks.node}: byte {self.ranges[0][0]}: out of time")
        return self.chunks.read(self.handle, self.ranges)
