"""The head's side of checkpoints: joins what the nodes report into commits, restores, drains and stops.

Everything is derived from the nodes' inventories, which each beat carries whole, so that a head that died can be
replaced by an empty one; and everything that a node is to do is told as a wanted state, so that no message can be lost.
Beats are answered from memory; storage is touched only by the coordinator's own thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.base.control import Handler
from ktrain.base.events import Event, make
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import lineage
from ktrain.checkpoint.agreement import StopAgreement
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.commit import collect, commit_drain
from ktrain.checkpoint.direct import RestoreDirector
from ktrain.checkpoint.drain import Drain, DrainSchedule
from ktrain.checkpoint.policy import Policies
from ktrain.checkpoint.roster import Member, RankProgress, Roster
from ktrain.errors import ConflictError, KtrainError
from ktrain.format.manifest import Identity
from ktrain.replicate.placement import ring

_LOG = logging.getLogger(__name__)


class Coordinator:
    """Commit, restore, drain and stop of one run, attempt after attempt. Safe from any thread."""

    def __init__(
        self,
        catalog: RunCatalog,
        *,
        timeouts: Timeouts,
        emit: Callable[[Event], None],
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._catalog = catalog
        self._timeouts = timeouts
        self._emit_event = emit
        self._clock = clock
        self._lock = threading.RLock()  # guards everything below; never held across storage calls
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._epoch = 0
        self._assignment: dict[str, tuple[int, ...]] = {}
        self._home: dict[int, str] = {}
        self._roster = Roster()
        self._committed: dict[str, Identity] = {}
        self._first_commit_recorded = False
        self._durable_recorded = False
        self._drains = DrainSchedule(timeouts=timeouts, emit=self._emit, clock=clock)
        self._faults = FaultPoints([], epoch=0)
        self._policies = Policies()
        self._restore: RestoreDirector | None = None
        self._stop: StopAgreement | None = None
        self._wire: dict[str, Any] | None = None
        self._free = False

    # For the head

    def handlers(self) -> dict[str, Handler]:
        """Calls that node keepers make."""
        return {"beat": self._beat}

    def begin_attempt(self, epoch: int, assignment: Mapping[str, Sequence[int]]) -> None:
        """Starts an attempt: `assignment` says which ranks run on which node. Older epochs are fenced from here on."""
        with self._lock:
            self._enter(epoch, assignment)

    def adopt_attempt(self, epoch: int, assignment: Mapping[str, Sequence[int]]) -> None:
        """Takes over an attempt that is running; the nodes' next beats tell the rest."""
        known = next((found.restored for found in self._catalog.attempts() if found.epoch == epoch), None)
        with self._lock:
            self._enter(epoch, assignment)
            if known is not None and self._restore is not None:
                self._restore.adopt(known)

    def _enter(self, epoch: int, assignment: Mapping[str, Sequence[int]]) -> None:
        self._epoch = epoch
        self._assignment = {node: tuple(ranks) for node, ranks in assignment.items()}
        self._home = {rank: node for node, ranks in self._assignment.items() for rank in ranks}
        bucket = self._committed.get(contract.TIER_BUCKET)
        self._committed = {} if bucket is None else {contract.TIER_BUCKET: bucket}
        self._first_commit_recorded = False
        self._drains.reset()
        self._faults = FaultPoints.from_environment(epoch)
        self._roster.forget_ranks()
        self._restore = RestoreDirector(
            self._catalog,
            self._roster,
            epoch=epoch,
            home=self._home,
            timeouts=self._timeouts,
            lock=self._lock,
            emit=self._emit,
            clock=self._clock,
        )

    def end_attempt(self) -> None:
        """Ends the attempt: nothing more is drained or agreed until the next one begins."""
        with self._lock:
            self._restore = None
            self._drains.reset()
            self._home = {}
            self._assignment = {}

    def forget_node(self, node: str) -> None:
        """A node is lost with its volume: what it held does not count any more."""
        with self._lock:
            self._roster.forget(node)

    def holdings(self) -> dict[str, dict[int, int]]:
        """Node -> rank -> newest step it holds in memory."""
        with self._lock:
            return self._roster.holdings()

    def nodes(self) -> dict[str, float]:
        """Node -> seconds since its keeper was last heard of."""
        with self._lock:
            return self._roster.silences(self._clock.monotonic())

    def progress(self) -> dict[int, RankProgress]:
        """Rank -> what is known of it; ranks that never reported are absent."""
        with self._lock:
            return self._roster.progress(self._clock.monotonic())

    def committed(self) -> dict[str, tuple[int, int]]:
        """Tier -> newest committed (step, epoch) of this attempt's line."""
        with self._lock:
            return {tier: (identity.step, identity.epoch) for tier, identity in self._committed.items()}

    def request_stop(self, reason: str) -> None:
        """Asks all ranks to save at a step that none has reached, and to leave."""
        with self._lock:
            if self._stop is None:
                self._stop = StopAgreement(reason)
                self._emit("stop_requested", reason=reason)

    def set_wire(self, wire: dict[str, Any] | None) -> None:
        """Tells the nodes which Ray cluster carries the peers' bytes; None where there is none."""
        with self._lock:
            self._wire = wire

    def free_volumes(self) -> None:
        """After success: the nodes may free what this run holds in memory."""
        with self._lock:
            self._free = True

    def volumes_freed(self) -> bool:
        """True when every node that was heard of has freed its volume."""
        with self._lock:
            return self._roster.all_freed()

    def start(self) -> None:
        """Starts the thread that talks to storage."""
        self._thread = threading.Thread(target=self._work, name="ktrain-coordinator", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread; a call to storage in progress is waited for within its own deadline. Idempotent."""
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(self._timeouts.storage_s)
            self._thread = None

    def _emit(self, kind: str, **fields: Any) -> None:
        self._emit_event(make(kind, self._epoch, clock=self._clock, **fields))

    # One beat of one node

    def _beat(self, said: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            if int(said["epoch"]) > self._epoch:
                raise ConflictError(
                    f"beat of {said['member']}: it is in epoch {said['epoch']}, this head is in epoch {self._epoch}"
                )
            member, fresh = self._roster.take(said, self._clock.monotonic())
            for event in fresh:
                self._emit_event(event)
            if int(said["epoch"]) == self._epoch:
                self._take_ranks(member, said)
            self._derive()
            answer = self._answer(member, said)
        self._wake.set()
        return answer

    def _take_ranks(self, member: Member, said: dict[str, Any]) -> None:
        member.ranks = {int(rank): view for rank, view in said["ranks"].items() if int(rank) in self._home}
        for rank, view in member.ranks.items():
            if view.get("policies") and rank == 0:
                self._policies = Policies.from_json(view["policies"])
            if view["stop_wanted"]:
                self.request_stop(view["stop_wanted"])
            if view["restore"] and self._restore is not None:
                self._restore.take(rank, view["restore"])
        self._drains.take(said["drained"])
        if self._stop is not None and self._home:
            views = self._roster.views()
            running = [rank for rank in self._home if not views.get(rank, {}).get("closed", False)]
            steps = {rank: int(view["step"]) for rank, view in views.items()}
            acks = {
                rank: (int(view["stop_ack"][0]), bool(view["stop_ack"][1]))
                for rank, view in views.items()
                if view["stop_ack"]
            }
            self._stop.advance(steps, acks, running)

    def _derive(self) -> None:
        """Commits of the memory tiers follow from the inventories alone."""
        if not self._home:
            return
        restored = None if self._restore is None else self._restore.restored
        for identity, ranks in lineage.memory_copies(self._roster.inventories()).items():
            if identity.world_size != len(self._home) or not (identity.epoch == self._epoch or identity == restored):
                continue
            at_home = all(home in ranks.get(rank, ()) for rank, home in self._home.items())
            at_peer = all(set(ranks.get(rank, ())) - {home} for rank, home in self._home.items())
            if at_home:
                self._advance(contract.TIER_MEMORY, identity)
            if at_peer:
                self._advance(contract.TIER_PEER, identity)

    def _advance(self, tier: str, identity: Identity) -> None:
        known = self._committed.get(tier)
        if known is None or (known.step, known.epoch) < (identity.step, identity.epoch):
            self._committed[tier] = identity
            if identity.epoch == self._epoch:
                self._emit("committed", step=identity.step, tier=tier)

    def _answer(self, member: Member, said: dict[str, Any]) -> dict[str, Any]:
        memory = self._committed.get(contract.TIER_MEMORY)
        protect = {(identity.step, identity.epoch) for identity in self._committed.values()}
        drain = self._drains.current
        if drain is not None:
            protect.add((drain.identity.step, drain.identity.epoch))
        if self._restore is not None and self._restore.needed is not None:
            protect.add((self._restore.needed.step, self._restore.needed.epoch))
        peers = self._roster.wires()
        return {
            "run": self._catalog.run_id,
            "epoch": self._epoch,
            "world_size": len(self._home),
            "ranks": list(self._assignment.get(member.node, ())),
            "committed": {tier: [identity.step, identity.epoch] for tier, identity in self._committed.items()},
            "protect": sorted(protect),
            "kept_slots": self._policies.keep.kept,
            "peers": peers,
            "pull": self._wanted_replicas(member, memory, peers),
            "drain": None if drain is None or drain.complete() else drain.to_json(),
            "restore": None if self._restore is None else self._restore.answer(member.node, int(said["restore_round"])),
            "want_manifests": [] if self._restore is None else self._restore.wanted_from(member.node),
            "stop": None if self._stop is None else self._stop.to_json(),
            "wire": self._wire,
            "free": self._free,
            "events_taken": member.events_taken,
        }

    def _wanted_replicas(
        self, member: Member, memory: Identity | None, peers: Mapping[str, str]
    ) -> list[dict[str, Any]]:
        if memory is None or member.wire is None:
            return []
        have = set(member.held)
        owners = [
            owner
            for owner, keepers in ring(sorted(self._assignment)).items()
            if member.node in keepers and owner in peers
        ]
        return [
            {"rank": rank, "identity": memory.to_json(), "source": peers[owner], "owner": owner}
            for owner in owners
            for rank in self._assignment[owner]
            if (rank, memory) not in have
        ]

    # The thread that talks to storage

    def _work(self) -> None:
        while not self._closed.is_set():
            self._clock.wait(self._wake, self._timeouts.beat_s)
            self._wake.clear()
            try:
                self._work_once()
            except KtrainError as error:
                _LOG.warning("coordinator: %s: %s", error.kind, error)
            except Exception:  # noqa: BLE001 -- top of the thread: recorded, and the next round tries again
                _LOG.exception("coordinator: unexpected failure")
                self._emit("notice", message="the coordinator met an unexpected failure; see the head's log")

    def _work_once(self) -> None:
        self._work_restore()
        self._work_first_commit()
        self._work_drain()

    def _work_restore(self) -> None:
        with self._lock:
            director = self._restore
        if director is None:
            return
        director.work()
        with self._lock:
            if director.durable is not None:
                self._committed.setdefault(contract.TIER_BUCKET, director.durable)

    def _work_first_commit(self) -> None:
        """The first commit of an attempt moves the line: it is recorded, so that older epochs beyond are off it."""
        with self._lock:
            memory = self._committed.get(contract.TIER_MEMORY)
            if self._first_commit_recorded or memory is None or memory.epoch != self._epoch:
                return
            epoch = self._epoch
        self._catalog.record(epoch, "committed", {"step": memory.step, "tier": contract.TIER_MEMORY})
        with self._lock:
            self._first_commit_recorded = self._epoch == epoch

    def _work_drain(self) -> None:
        with self._lock:
            self._begin_drain()
            drain = self._drains.try_complete()
        if drain is None:
            return
        try:
            commit_drain(self._catalog, drain, clock=self._clock, faults=self._faults)
        except KtrainError as error:
            with self._lock:
                self._drains.failed(drain, f"{error.kind}: {error}")
            return
        self._drain_done(drain)

    def _begin_drain(self) -> None:
        last = self._stop is not None or any(said["phase"] == "close" for said in self._roster.views().values())
        self._drains.begin(
            self._committed.get(contract.TIER_MEMORY),
            self._committed.get(contract.TIER_BUCKET),
            every=self._policies.every.bucket,
            last=last,
        )

    def _drain_done(self, drain: Drain) -> None:
        with self._lock:
            self._drains.done(drain)
            self._committed[contract.TIER_BUCKET] = drain.identity
            keep, epoch = self._policies.keep.bucket, self._epoch
        if not self._durable_recorded:
            self._catalog.record(epoch, "durable", {"step": drain.identity.step})
            self._durable_recorded = True
        for commit in collect(self._catalog, keep=keep):
            self._emit("collected", tier=contract.TIER_BUCKET, step=commit.identity.step)
