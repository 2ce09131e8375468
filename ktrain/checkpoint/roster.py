"""What the head knows of the node keepers, from their last beats. Not thread-safe; the coordinator holds the lock."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktrain.base.events import Event
from ktrain.checkpoint.intake import Written
from ktrain.checkpoint.relay import Inbox
from ktrain.format.manifest import Identity
from ktrain.replicate.placement import kept_for, ring


@dataclass(frozen=True, slots=True)
class Attempt:
    """Which ranks run where in one attempt; `home` is the same by rank.

    `node_sizes`: numbers of ranks of the nodes, in the order of their ranks, as ranks are to divide what several nodes
    hold; empty where each node is to store all of it.
    """

    epoch: int = 0
    nodes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    home: Mapping[int, str] = field(default_factory=dict)
    node_sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, epoch: int, assignment: Mapping[str, Sequence[int]]) -> Attempt:
        nodes = {node: tuple(ranks) for node, ranks in assignment.items()}
        blocks = sorted(ranks for ranks in nodes.values() if ranks)
        is_in_blocks = [rank for block in blocks for rank in block] == list(range(sum(map(len, blocks))))
        home = {rank: node for node, ranks in nodes.items() for rank in ranks}
        return cls(epoch, nodes, home, tuple(map(len, blocks)) if is_in_blocks else ())

    def kept_by(self, node: str) -> dict[int, str]:
        """Ranks of which a node is to keep replicas, each with the node that it runs on."""
        owners = kept_for(ring(sorted(self.nodes)), node)
        return {rank: owner for owner in owners for rank in self.nodes[owner]}

    def undivided(self) -> Attempt:
        """The same where each node stores all that its ranks hold."""
        return replace(self, node_sizes=())


@dataclass(frozen=True, slots=True)
class RankProgress:
    """What the head knows of a rank. Durations are measured where the silence is, never by comparing two clocks."""

    node: str
    host: str
    step: int
    phase: str  # "start", "restore", "train", "close"
    silent_s: float  # since the rank's process was last heard of
    step_silent_s: float  # since its step or phase last moved, or the drain for which it waits
    closed: bool


@dataclass(slots=True)
class Member:
    """A node keeper: an agent, or in plain python the keeper inside a rank's process."""

    node: str
    host: str
    instance: str
    heard_s: float
    wire: str | None = None
    held: tuple[tuple[int, Identity], ...] = ()
    on_disk: tuple[tuple[int, Identity], ...] | None = None  # None before it has looked
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    manifests: dict[tuple[int, Identity], str] = field(default_factory=dict)
    filled: tuple[Mapping[str, Any], ...] = ()  # what it said of its fills: rank, round, reason, nbytes
    inbox: Inbox = field(default_factory=Inbox)  # of its events
    written: Written = field(default_factory=Written)
    freed: bool = False


class Roster:
    """All keepers that were heard of."""

    def __init__(self) -> None:
        self._members: dict[str, Member] = {}
        self.num_changes = 0
        """Counts beats after which volumes and disks hold something else than before, and nodes that are forgotten."""

    def take(self, said: Mapping[str, Any], now_s: float, room: int) -> tuple[Member, list[Event]]:
        """Takes a beat; returns the member and at most `room` of its events that this head has not had from it yet."""
        member = self._members.get(said["member"])
        if member is None or member.instance != said["instance"]:
            before, member = member, Member(said["node"], said["host"], said["instance"], heard_s=now_s)
            if before is not None:  # what that one found lies in the node's volume still
                member.held, member.on_disk = before.held, before.on_disk
            self._members[said["member"]] = member
        member.heard_s = now_s
        member.wire = said["wire"]
        member.freed = said["freed"]
        member.filled = tuple(said["filled"])
        had = member.held, member.on_disk
        if said["has_looked"]:  # else it says nothing of its volume yet
            member.held = tuple((int(rank), Identity.from_json(identity)) for rank, identity in said["held"])
        if said["has_looked"] and said["on_disk"] is not None:
            member.on_disk = tuple((int(rank), Identity.from_json(identity)) for rank, identity in said["on_disk"])
        self.num_changes += (member.held, member.on_disk) != had
        for entry in said["manifests"]:
            member.manifests[(int(entry["rank"]), Identity.from_json(entry["identity"]))] = entry["text"]
        return member, [Event.from_json(value) for _, value in member.inbox.fresh(said, room)]

    def members(self) -> list[Member]:
        """All keepers, by name."""
        return [member for _, member in sorted(self._members.items())]

    def forget(self, node: str) -> None:
        """A node is gone with its volume."""
        self.num_changes += 1
        self._members = {name: member for name, member in self._members.items() if member.node != node}

    def forget_ranks(self) -> None:
        """A new attempt begins: what ranks of the old one said does not count."""
        for member in self._members.values():
            member.ranks = {}
            member.manifests = {}

    def inventories(self) -> dict[str, list[tuple[int, Identity]]]:
        """Node -> what its volume holds, sealed."""
        found: dict[str, list[tuple[int, Identity]]] = {}
        for member in self._members.values():
            found.setdefault(member.node, []).extend(member.held)
        return found

    def disks(self) -> dict[str, list[tuple[int, Identity]]]:
        """Node -> what its own disk holds, whole."""
        found: dict[str, list[tuple[int, Identity]]] = {}
        for member in self._members.values():
            found.setdefault(member.node, []).extend(member.on_disk or ())
        return found

    def all_disks_seen(self, nodes: Iterable[str]) -> bool:
        """True when every keeper of these nodes has said what its disk holds."""
        by_node: dict[str, list[Member]] = {}
        for member in self._members.values():
            by_node.setdefault(member.node, []).append(member)
        return all(node in by_node and all(each.on_disk is not None for each in by_node[node]) for node in nodes)

    def manifests(self) -> dict[tuple[str, int, Identity], str]:
        """Texts of manifests that nodes were asked for."""
        return {
            (member.node, *key): text for member in self._members.values() for key, text in member.manifests.items()
        }

    def views(self) -> dict[int, dict[str, Any]]:
        """Rank -> what it last said."""
        return {rank: view for member in self._members.values() for rank, view in member.ranks.items()}

    def wires(self) -> dict[str, str]:
        """Node -> address for peers, of the nodes that have one."""
        return {member.node: member.wire for member in self._members.values() if member.wire is not None}

    def wanted_replicas(self, member: Member, wanted: Identity | None, attempt: Attempt) -> list[dict[str, Any]]:
        """Snapshots of other nodes' ranks that this node is to keep and has not got yet."""
        if wanted is None or member.wire is None:
            return []
        peers, have = self.wires(), set(member.held)
        return [
            {"rank": rank, "identity": wanted.to_json(), "source": peers[owner], "owner": owner}
            for rank, owner in attempt.kept_by(member.node).items()
            if owner in peers and (rank, wanted) not in have
        ]

    def holdings(self) -> dict[str, dict[int, int]]:
        """Node -> rank -> newest step held."""
        found: dict[str, dict[int, int]] = {}
        for node, held in self.inventories().items():
            ranks = found.setdefault(node, {})
            for rank, identity in held:
                ranks[rank] = max(ranks.get(rank, 0), identity.step)
        return found

    def silences(self, now_s: float) -> dict[str, float]:
        """Node -> seconds since it was last heard of."""
        return {member.node: now_s - member.heard_s for member in self._members.values()}

    def all_freed(self, now_s: float, free_s: float) -> bool:
        """True when every keeper has freed its volume, or is silent for longer than that takes: its node is lost."""
        return all(member.freed or now_s - member.heard_s > free_s for member in self._members.values())

    def progress(self, now_s: float, drain_quiet_s: float) -> dict[int, RankProgress]:
        """Rank -> progress; ranks that never reported are absent. In its "close" a rank waits for the last drain."""
        return {
            rank: RankProgress(
                node=member.node,
                host=member.host,
                step=said["step"],
                phase=said["phase"],
                silent_s=said["silent_s"] + now_s - member.heard_s,
                step_silent_s=min(
                    said["moved_s"] + now_s - member.heard_s,
                    drain_quiet_s if said["phase"] == "close" else math.inf,
                ),
                closed=said["closed"],
            )
            for member in self._members.values()
            for rank, said in member.ranks.items()
        }
