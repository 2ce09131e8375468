"""How a node brings another node's snapshots into its own volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ktrain.base.clock import Deadline
from ktrain.format.manifest import Identity


@dataclass(frozen=True, slots=True)
class BadOwn:
    """Bytes of a payload in a slot of the receiver's own that do not match their digests."""

    rank: int  # whose share it is; of copies beside a share: `abc.source.copies_beside` of the rank
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a snapshot lies verified and sealed in the receiver's volume."""

    rank: int
    identity: Identity
    nbytes: int
    wire_nbytes: int  # what crossed the wire: 0 where the copy was there already, more than nbytes after a bad chunk
    seconds: float
    manifest_digest: str
    own_nbytes: int = 0  # of nbytes, copied from what the receiver's own slots hold of the same snapshot
    wire_s: float = 0.0  # of seconds, for what crossed the wire
    bad_own: tuple[BadOwn, ...] = ()  # what of the own slots was found bad on the way

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "identity": self.identity.to_json(),
            "nbytes": self.nbytes,
            "wire_nbytes": self.wire_nbytes,
            "seconds": self.seconds,
            "manifest_digest": self.manifest_digest,
            "own_nbytes": self.own_nbytes,
            "wire_s": self.wire_s,
            "bad_own": [[bad.rank, bad.begin, bad.end] for bad in self.bad_own],
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Receipt:
        bad = tuple(BadOwn(int(rank), int(begin), int(end)) for rank, begin, end in value["bad_own"])
        return cls(**{**value, "identity": Identity.from_json(value["identity"]), "bad_own": bad})


@dataclass(frozen=True, slots=True)
class Part:
    """Whole chunks of a payload, with the digests that prove them."""

    begin: int
    end: int  # a chunk's border, or the end of the payload
    chunks: Sequence[int]

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class PartialRead:
    """What a reader wants of a snapshot, and where it is to be written.

    The digests are the reader's: what the source says of its snapshot is not asked.
    """

    rank: int
    identity: Identity
    chunk_nbytes: int
    parts: Sequence[Part]  # sorted, apart from each other
    file: Path  # of the reader, on this node; the parts are written one behind the other from its first byte

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def __str__(self) -> str:
        return f"rank {self.rank}, step {self.identity.step}, epoch {self.identity.epoch}"

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "identity": self.identity.to_json(),
            "chunk_nbytes": self.chunk_nbytes,
            "parts": [[part.begin, part.end, list(part.chunks)] for part in self.parts],
            "file": str(self.file),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PartialRead:
        parts = [Part(int(begin), int(end), tuple(chunks)) for begin, end, chunks in value["parts"]]
        identity = Identity.from_json(value["identity"])
        return cls(int(value["rank"]), identity, int(value["chunk_nbytes"]), parts, Path(value["file"]))


class Transport(Protocol):
    """Pulls snapshots between the volumes of two nodes, whole or in parts.

    A protocol of five calls, so that a faster wire can stand beside Ray. The receiver pulls and owns all it
    takes: nothing has to be given back when the source dies. Safe from any thread.
    """

    name: str

    def address(self) -> str | None:
        """What a peer needs to pull from this node; None while there is no wire."""

    def pull(
        self,
        source: str,
        rank: int,
        identity: Identity,
        *,
        protect: Sequence[tuple[int, int]],
        deadline: Deadline,
    ) -> Receipt:
        """Brings the snapshot of (rank, identity) from the node at `source` into a slot of the own volume.

        What the own slots hold of the same snapshot need not cross the wire (ADR 0025). Every chunk is proven by the
        manifest before the slot is sealed; on any error nothing is sealed. What `protect` names by (step, epoch) is not
        overwritten to make room, nor what is newer than the snapshot.

        Raises:
            NotFoundError: the source does not hold that snapshot.
            CorruptionError: a chunk was wrong twice; the source's copy or the way to it is bad.
            CapacityError: no slot is free, or the volume is full.
            UnavailableError: the source could not be reached, or the wire broke.
            DeadlineError: it took too long.
        """

    def read(self, source: str, wanted: PartialRead, *, deadline: Deadline) -> int:
        """Brings parts of a snapshot from the node at `source` into a file of the reader; no slot is taken.

        Every chunk is proven by the reader's digests; a piece that arrived bad is asked for once more. After an error
        some parts may be written, and a call that was given up may still be writing.

        Returns:
            the bytes that crossed the wire.

        Raises:
            NotFoundError: the source does not hold that snapshot.
            CorruptionError: a chunk was wrong twice; the source's copy or the way to it is bad.
            UnavailableError: the source could not be reached, the wire broke, or the file cannot be written.
            DeadlineError: it took too long.
        """

    def release(self, rank: int) -> None:
        """Gives up the slots of a rank, so that another process of the node may write or remove them; never raises.

        What is sealed there stays. A slot that is pulled into in this moment is not given up.
        """

    def close(self) -> None:
        """Ends the wire and every process it started. May be called again."""
