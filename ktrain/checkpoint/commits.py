"""What is committed in each tier of the attempt that runs. Pure state; guarded by its owner's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from ktrain.base import contract
from ktrain.checkpoint import lineage
from ktrain.checkpoint.lineage import Inventories
from ktrain.checkpoint.replication import Replication
from ktrain.checkpoint.roster import Attempt, Roster
from ktrain.format.manifest import Identity


class Commits:
    """Tier -> newest committed identity. Commits of the memory tiers follow from the nodes' inventories alone."""

    def __init__(self, attempt: Attempt, replication: Replication, emit: Callable[..., None]) -> None:
        self._attempt = attempt
        self._emit = emit
        self.replication = replication
        self._newest: dict[str, Identity] = {}
        self._followed: tuple[int, Identity | None, Identity | None] | None = None
        self.first_is_recorded = False  # the run directory knows that this attempt has committed
        self.durable_is_recorded = False  # it knows that this attempt has committed in the bucket

    @property
    def epoch(self) -> int:
        """Of the attempt."""
        return self._attempt.epoch

    @property
    def memory(self) -> Identity | None:
        return self._newest.get(contract.TIER_MEMORY)

    @property
    def peer(self) -> Identity | None:
        return self._newest.get(contract.TIER_PEER)

    @property
    def bucket(self) -> Identity | None:
        return self._newest.get(contract.TIER_BUCKET)

    @property
    def disk(self) -> Identity | None:
        return self._newest.get(contract.TIER_DISK)

    def all(self) -> dict[str, Identity]:
        """Tier -> newest committed identity; tiers without one are absent."""
        return dict(self._newest)

    def needed(self) -> list[Identity]:
        """What no node may overwrite: the newest in memory, the newest among peers, and the one that peers take next.

        Not the one among peers where the bucket has a newer one, and not a step that is lost.
        """
        peer, bucket = self.peer, self.bucket
        is_passed = peer is not None and bucket is not None and (peer.step, peer.epoch) < (bucket.step, bucket.epoch)
        needed = (self.memory, None if is_passed else peer, self.replication.wanted)
        return [identity for identity in needed if identity is not None and identity != self.replication.lost]

    def to_json(self) -> dict[str, list[int]]:
        """Tier -> [step, epoch]."""
        return {tier: [identity.step, identity.epoch] for tier, identity in self._newest.items()}

    def follow(self, roster: Roster, restored: Identity | None) -> None:
        """Derives anew where a beat has changed something.

        Nearly all beats of a large job say what the last ones said, and a join of all inventories takes milliseconds.
        """
        known = roster.num_changes, restored, self.replication.wanted
        if known != self._followed:
            self._followed = known
            self.derive(roster.inventories(), roster.disks(), restored)

    def derive(self, volumes: Inventories, disks: Inventories, restored: Identity | None) -> None:
        """Finds what is complete on volumes and disks: of this attempt's epoch, or what it continued from."""
        home = self._attempt.home
        wanted: dict[int, list[str]] = {}
        for identity, ranks in self._of_the_line(volumes, restored, (contract.TIER_MEMORY, contract.TIER_PEER)):
            if identity == self.replication.wanted:
                wanted = ranks
            if any(node not in ranks.get(rank, ()) for rank, node in home.items()):
                continue
            self._advance(contract.TIER_MEMORY, identity)
            if self.replication.counts(identity) and all(len(set(ranks[rank])) > 1 for rank in home):
                self._advance(contract.TIER_PEER, identity)
        if not self.replication.is_held(self.peer):
            self.replication.look(wanted, home)

        for identity, ranks in self._of_the_line(disks, restored, (contract.TIER_DISK,)):
            if all(node in ranks.get(rank, ()) for rank, node in home.items()):
                self._advance(contract.TIER_DISK, identity)

    def _of_the_line(
        self, inventories: Inventories, restored: Identity | None, tiers: tuple[str, ...]
    ) -> Iterator[tuple[Identity, dict[int, list[str]]]]:
        """What may be committed anew in one of the tiers, and which nodes hold it by rank."""
        epoch, world_size = self._attempt.epoch, len(self._attempt.home)
        known = [self._newest.get(tier) for tier in tiers]
        least = min((-1, -1) if newest is None else (newest.step, newest.epoch) for newest in known)
        # First of all entries those that can tell something new: few of the many thousand.
        fresh = {
            node: [
                (rank, at)
                for rank, at in held
                if (at.step, at.epoch) > least and (at.epoch == epoch or at == restored) and at.world_size == world_size
            ]
            for node, held in inventories.items()
        }
        yield from lineage.copies_by_rank(fresh).items()

    def _advance(self, tier: str, identity: Identity) -> None:
        known = self._newest.get(tier)
        if known is None or (known.step, known.epoch) < (identity.step, identity.epoch):
            self._newest[tier] = identity
            if identity.epoch == self._attempt.epoch:
                self._emit("committed", step=identity.step, tier=tier)

    def note_bucket(self, identity: Identity) -> None:
        """The bucket holds a committed checkpoint of this identity, which is of this attempt's line."""
        known = self.bucket
        if known is None or (known.step, known.epoch) < (identity.step, identity.epoch):
            self._newest[contract.TIER_BUCKET] = identity

    def may_be_continued(self, identity: Identity, restored: Identity | None) -> bool:
        """False for a step of an older attempt that this one did not continue from, once it has committed itself."""
        memory, epoch = self.memory, self._attempt.epoch
        if identity.epoch == epoch or memory is None or memory.epoch != epoch:
            return True
        return restored is not None and identity.step <= restored.step

    def wanted_on_disk(self, *, every: int) -> dict[str, Any] | None:
        """What each node is to have on its own disk, where it has one; None while what is there is recent enough."""
        memory, disk = self.memory, self.disk
        if memory is None or (disk is not None and memory.step - disk.step < every):
            return None
        return {"identity": memory.to_json()}

    def unrecorded_first(self) -> dict[str, Any] | None:
        """What the run directory must learn of this attempt's first commit; None when it knows, or there is none."""
        memory = self.memory
        if self.first_is_recorded or memory is None or memory.epoch != self._attempt.epoch:
            return None
        return {"step": memory.step, "tier": contract.TIER_MEMORY}
