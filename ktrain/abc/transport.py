"""How a node brings another node's snapshots into its own volume."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ktrain.base.clock import Deadline
from ktrain.format.manifest import Identity


@dataclass(frozen=True, slots=True)
class Receipt:
    """Proof that a snapshot lies verified and sealed in the receiver's volume."""

    rank: int
    identity: Identity
    nbytes: int
    wire_nbytes: int  # what crossed the wire: 0 where the copy was there already, more than nbytes after a bad chunk
    seconds: float
    manifest_digest: str

    def to_json(self) -> dict[str, Any]:
        return {
            "rank": self.rank,
            "identity": self.identity.to_json(),
            "nbytes": self.nbytes,
            "wire_nbytes": self.wire_nbytes,
            "seconds": self.seconds,
            "manifest_digest": self.manifest_digest,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Receipt:
        return cls(**{**value, "identity": Identity.from_json(value["identity"])})


class Transport(Protocol):
    """Pulls snapshots between the volumes of two nodes.

    A protocol of three calls, so that a faster wire can stand beside Ray. The receiver pulls and owns all it
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

        Every chunk is proven by the manifest before the slot is sealed; on any error nothing is sealed.
        What `protect` names by (step, epoch) is not overwritten to make room, nor what is newer than the snapshot.

        Raises:
            NotFoundError: the source does not hold that snapshot.
            CorruptionError: a chunk was wrong twice; the source's copy or the way to it is bad.
            CapacityError: no slot is free, or the volume is full.
            UnavailableError: the source could not be reached, or the wire broke.
            DeadlineError: it took too long.
        """

    def close(self) -> None:
        """Ends the wire and every process it started. May be called again."""
