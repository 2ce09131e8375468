"""Which step a run continues from: pure functions over inventories, commit records and attempts.

The line of a run is the chain of attempts, each of which continued from a step of an earlier one. A snapshot of an
older epoch beyond the step from which a newer, committed attempt continued is off the line and is never chosen,
also when the node that holds it comes back later (design promise 3).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktrain.base import contract
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.format.manifest import Identity
from ktrain.format.record import CommitRecord

Inventories = Mapping[str, Iterable[tuple[int, Identity]]]  # node -> (rank, identity) of what it holds
_TIER_ORDER = {tier: index for index, tier in enumerate(contract.TIERS)}


@dataclass(frozen=True, slots=True)
class Copy:
    """One rank's snapshot in one place.

    `place` is the node's name for memory and disk, and the commit's write id for the bucket.
    """

    tier: str
    place: str
    rank: int
    identity: Identity

    def key(self) -> tuple[str, str, int, int, int]:
        """Names this copy among all copies of the run (a peer's memory is that node's memory)."""
        kind = contract.TIER_MEMORY if self.tier == contract.TIER_PEER else self.tier
        return (kind, self.place, self.rank, self.identity.step, self.identity.epoch)

    def to_json(self) -> dict[str, Any]:
        return {"tier": self.tier, "place": self.place, "rank": self.rank, "identity": self.identity.to_json()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Copy:
        return cls(value["tier"], value["place"], value["rank"], Identity.from_json(value["identity"]))


@dataclass(frozen=True, slots=True)
class Candidate:
    """A complete checkpoint: for every saved rank at least one copy."""

    identity: Identity
    copies: Mapping[int, tuple[Copy, ...]] = field(default_factory=dict)

    def without(self, excluded: Collection[tuple[str, str, int, int, int]]) -> Candidate | None:
        """The candidate that is left when some copies are not to be used; None when a rank has none left."""
        left = {
            rank: tuple(copy for copy in copies if copy.key() not in excluded) for rank, copies in self.copies.items()
        }
        return Candidate(self.identity, left) if all(left.values()) else None


def on_line(identity: Identity, attempts: Sequence[AttemptRecord], committed: Collection[int] = ()) -> bool:
    """False when a newer attempt continued from an earlier step and has committed since.

    `committed` are epochs that are known to have committed although no record says so yet.
    """
    return not any(
        attempt.epoch > identity.epoch
        and (attempt.committed is not None or attempt.epoch in committed)
        and attempt.restored_step is not None
        and attempt.restored_step < identity.step
        for attempt in attempts
    )


def copies_by_rank(inventories: Inventories) -> dict[Identity, dict[int, list[str]]]:
    """Identity -> rank -> names of the nodes that hold a whole snapshot of it."""
    found: dict[Identity, dict[int, list[str]]] = {}
    for node, held in sorted(inventories.items()):
        for rank, identity in held:
            found.setdefault(identity, {}).setdefault(rank, []).append(node)
    return found


def candidates(
    volumes: Inventories,
    disks: Inventories,
    commits: Sequence[CommitRecord],
    attempts: Sequence[AttemptRecord],
) -> list[Candidate]:
    """Complete checkpoints on the line, newest first; each rank's copies: memory of nodes, their disks, the bucket."""
    copies: dict[Identity, dict[int, list[Copy]]] = {}
    for tier, inventories in ((contract.TIER_MEMORY, volumes), (contract.TIER_DISK, disks)):
        for identity, ranks in copies_by_rank(inventories).items():
            for rank, nodes in ranks.items():
                places = [Copy(tier, node, rank, identity) for node in nodes]
                copies.setdefault(identity, {}).setdefault(rank, []).extend(places)
    for commit in commits:
        for files in commit.ranks:
            place = Copy(contract.TIER_BUCKET, commit.write_id, files.rank, commit.identity)
            copies.setdefault(commit.identity, {}).setdefault(files.rank, []).append(place)
    complete = {identity: ranks for identity, ranks in copies.items() if set(ranks) == set(range(identity.world_size))}
    committed = {identity.epoch for identity in complete}
    found = [
        Candidate(identity, {rank: tuple(places) for rank, places in sorted(ranks.items())})
        for identity, ranks in complete.items()
        if on_line(identity, attempts, committed)
    ]
    return sorted(found, key=lambda found: (found.identity.step, found.identity.epoch), reverse=True)


def choose(found: Sequence[Candidate], excluded: Collection[tuple[str, str, int, int, int]]) -> Candidate | None:
    """The newest candidate that still has a usable copy of every rank.

    Newest first is the least total time as long as a lost step costs more than reading the slower tier; measured
    rates may refine it later without a change of protocol, because only the head chooses.
    """
    for candidate in found:
        left = candidate.without(excluded)
        if left is not None:
            return left
    return None


def sources_for(node: str, candidate: Candidate) -> dict[int, list[Copy]]:
    """The candidate's copies as seen from one node, nearest tier first; another node's memory is the peer tier."""
    seen = {}
    for rank, copies in candidate.copies.items():
        near = [
            Copy(contract.TIER_PEER, copy.place, rank, copy.identity)
            if copy.tier == contract.TIER_MEMORY and copy.place != node
            else copy
            for copy in copies
        ]
        seen[rank] = sorted(near, key=lambda copy: _TIER_ORDER[copy.tier])
    return seen


def slowest(tiers: Iterable[str]) -> str:
    """The tier that a restore is named after: the one farthest from the ranks among those that were read."""
    return max(tiers, key=lambda tier: _TIER_ORDER[tier])
