"""The head's side of checkpoints: joins what the nodes report into commits, restores, drains and stops.

Everything is derived from the nodes' inventories, which each beat carries whole, so that a head that died can be
replaced by an empty one; and everything that a node is to do is told as a wanted state, so that no message can be lost.
Beats are answered from memory; storage is touched only by the coordinator's own thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.control import Handler
from ktrain.base.events import Event, make
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import lineage
from ktrain.checkpoint.agreement import RestoreAgreement, RestoreState, StopAgreement
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.commit import Drain, collect, commit_drain
from ktrain.checkpoint.policy import Policies
from ktrain.checkpoint.recall import Recall
from ktrain.errors import ConflictError, KtrainError
from ktrain.format.manifest import Identity
from ktrain.replicate.placement import ring

_LOG = logging.getLogger(__name__)
_DRAIN_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(frozen=True, slots=True)
class RankProgress:
    """What the head knows of a rank. Durations are measured where the silence is, never by comparing two clocks."""

    node: str
    host: str
    step: int
    phase: str  # "start", "restore", "train", "close"
    silent_s: float  # since the rank's process was last heard of
    step_silent_s: float  # since its step or phase last moved
    closed: bool


@dataclass(slots=True)
class _Member:
    """A node keeper: an agent, or in plain python the keeper inside a rank's process."""

    node: str
    host: str
    instance: str
    heard_s: float
    wire: str | None = None
    held: tuple[tuple[int, Identity], ...] = ()
    ranks: dict[int, dict[str, Any]] = field(default_factory=dict)
    manifests: dict[tuple[int, Identity], str] = field(default_factory=dict)
    events_taken: int = 0
    freed: bool = False


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
        self._members: dict[str, _Member] = {}
        self._committed: dict[str, Identity] = {}
        self._first_commit_recorded = False
        self._durable_recorded = False
        self._drain: Drain | None = None
        self._drain_failures = 0
        self._drain_after_s = 0.0
        self._policies = Policies()
        self._restore: RestoreAgreement | None = None
        self._restored: Identity | None = None
        self._restored_said = False
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
            self._restore = RestoreAgreement(len(self._home), self._timeouts.restore_s)

    def adopt_attempt(self, epoch: int, assignment: Mapping[str, Sequence[int]]) -> None:
        """Takes over an attempt that is running; the nodes' next beats tell the rest."""
        restored = next((found.restored for found in self._catalog.attempts() if found.epoch == epoch), None)
        with self._lock:
            self._enter(epoch, assignment)
            self._restore = RestoreAgreement(len(self._home), self._timeouts.restore_s)
            if restored is not None:
                self._restored_said = True
                if restored.get("identity"):
                    self._restored = Identity.from_json(restored["identity"])

    def _enter(self, epoch: int, assignment: Mapping[str, Sequence[int]]) -> None:
        self._epoch = epoch
        self._assignment = {node: tuple(ranks) for node, ranks in assignment.items()}
        self._home = {rank: node for node, ranks in self._assignment.items() for rank in ranks}
        bucket = self._committed.get(contract.TIER_BUCKET)
        self._committed = {} if bucket is None else {contract.TIER_BUCKET: bucket}
        self._first_commit_recorded = False
        self._drain = None
        self._drain_after_s = 0.0
        self._restored = None
        self._restored_said = False
        for member in self._members.values():
            member.ranks = {}

    def end_attempt(self) -> None:
        """Ends the attempt: nothing more is drained or agreed until the next one begins."""
        with self._lock:
            self._restore = None
            self._drain = None
            self._home = {}
            self._assignment = {}

    def forget_node(self, node: str) -> None:
        """A node is lost with its volume: what it held does not count any more."""
        with self._lock:
            self._members = {name: member for name, member in self._members.items() if member.node != node}

    def holdings(self) -> dict[str, dict[int, int]]:
        """Node -> rank -> newest step it holds in memory."""
        with self._lock:
            found: dict[str, dict[int, int]] = {}
            for member in self._members.values():
                ranks = found.setdefault(member.node, {})
                for rank, identity in member.held:
                    ranks[rank] = max(ranks.get(rank, 0), identity.step)
            return found

    def nodes(self) -> dict[str, float]:
        """Node -> seconds since its keeper was last heard of."""
        now = self._clock.monotonic()
        with self._lock:
            return {member.node: now - member.heard_s for member in self._members.values()}

    def progress(self) -> dict[int, RankProgress]:
        """Rank -> what is known of it; ranks that never reported are absent."""
        now = self._clock.monotonic()
        with self._lock:
            return {
                rank: RankProgress(
                    node=member.node,
                    host=member.host,
                    step=said["step"],
                    phase=said["phase"],
                    silent_s=said["silent_s"] + now - member.heard_s,
                    step_silent_s=said["moved_s"] + now - member.heard_s,
                    closed=said["closed"],
                )
                for member in self._members.values()
                for rank, said in member.ranks.items()
            }

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
        """True when every node that is still heard of has freed its volume."""
        with self._lock:
            return all(member.freed for member in self._members.values())

    def all_closed(self) -> bool:
        """True when every rank has closed with success."""
        with self._lock:
            closed = {rank for member in self._members.values() for rank, said in member.ranks.items() if said["closed"]}
            return bool(self._home) and closed >= set(self._home)

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
                raise ConflictError(f"beat of {said['member']}: it is in epoch {said['epoch']}, this head is in epoch {self._epoch}")
            member = self._take(said)
            if int(said["epoch"]) == self._epoch:
                self._take_ranks(member, said)
            self._derive()
            answer = self._answer(member, said)
        self._wake.set()
        return answer

    def _take(self, said: dict[str, Any]) -> _Member:
        now = self._clock.monotonic()
        member = self._members.get(said["member"])
        if member is None or member.instance != said["instance"]:
            member = _Member(node=said["node"], host=said["host"], instance=said["instance"], heard_s=now)
            self._members[said["member"]] = member
        member.heard_s = now
        member.wire = said["wire"]
        member.freed = said["freed"]
        member.held = tuple((int(rank), Identity.from_json(identity)) for rank, identity in said["held"])
        for entry in said["manifests"]:
            member.manifests[(int(entry["rank"]), Identity.from_json(entry["identity"]))] = entry["text"]
        first = int(said["events_from"])
        for index, value in enumerate(said["events"], start=first):
            if index >= member.events_taken:  # a beat whose answer was lost is sent again
                member.events_taken = index + 1
                self._emit_event(Event.from_json(value))
        return member

    def _take_ranks(self, member: _Member, said: dict[str, Any]) -> None:
        member.ranks = {int(rank): view for rank, view in said["ranks"].items() if int(rank) in self._home}
        for rank, view in member.ranks.items():
            if view.get("policies") and rank == 0:
                self._policies = Policies.from_json(view["policies"])
            if view["stop_wanted"]:
                self.request_stop(view["stop_wanted"])
            if view.get("restore") and self._restore is not None:
                self._restore.report(rank, view["restore"], Deadline.after(self._timeouts.restore_s, self._clock))
        if self._drain is not None:
            for report in said["drained"]:
                self._drain.take(report)
        if self._stop is not None and self._home:
            views = {rank: view for each in self._members.values() for rank, view in each.ranks.items()}
            running = [rank for rank in self._home if not views.get(rank, {}).get("closed", False)]
            steps = {rank: int(view["step"]) for rank, view in views.items()}
            acks = {rank: (int(view["stop_ack"][0]), bool(view["stop_ack"][1])) for rank, view in views.items() if view.get("stop_ack")}
            self._stop.advance(steps, acks, running)

    def _derive(self) -> None:
        """Commits of the memory tiers follow from the inventories alone."""
        if not self._home:
            return
        inventories: dict[str, list[tuple[int, Identity]]] = {}
        for member in self._members.values():
            inventories.setdefault(member.node, []).extend(member.held)
        for identity, ranks in lineage.memory_copies(inventories).items():
            if identity.world_size != len(self._home) or not (identity.epoch == self._epoch or identity == self._restored):
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

    def _answer(self, member: _Member, said: dict[str, Any]) -> dict[str, Any]:
        memory = self._committed.get(contract.TIER_MEMORY)
        protect = {(identity.step, identity.epoch) for identity in self._committed.values()}
        if self._drain is not None:
            protect.add((self._drain.identity.step, self._drain.identity.epoch))
        if self._restore is not None and self._restore.candidate is not None and not self._restore.done():
            protect.add((self._restore.candidate.identity.step, self._restore.candidate.identity.epoch))
        peers = {other.node: other.wire for other in self._members.values() if other.wire is not None}
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
            "drain": None if self._drain is None or self._drain.complete() else self._drain.to_json(),
            "restore": self._restore_answer(member, said),
            "want_manifests": [] if self._recall is None else self._recall.wanted_from(member.node),
            "stop": None if self._stop is None else self._stop.to_json(),
            "wire": self._wire,
            "free": self._free,
            "events_taken": member.events_taken,
        }

    def _wanted_replicas(self, member: _Member, memory: Identity | None, peers: Mapping[str, str]) -> list[dict[str, Any]]:
        if memory is None or member.wire is None:
            return []
        have = set(member.held)
        owners = [owner for owner, keepers in ring(sorted(self._assignment)).items() if member.node in keepers and owner in peers]
        return [
            {"rank": rank, "identity": memory.to_json(), "source": peers[owner], "owner": owner}
            for owner in owners
            for rank in self._assignment[owner]
            if (rank, memory) not in have
        ]

    def _restore_answer(self, member: _Member, said: dict[str, Any]) -> dict[str, Any] | None:
        agreement = self._restore
        if agreement is None:
            return None
        answer: dict[str, Any] = {"round": agreement.round, "state": agreement.state.value, "error": agreement.error}
        if agreement.candidate is not None and agreement.state in (RestoreState.LOADING, RestoreState.SETTLED, RestoreState.GO):
            answer["identity"] = agreement.candidate.identity.to_json()
            if said["restore_round"] != agreement.round:  # the long part goes out once per round
                sources = lineage.sources_for(member.node, agreement.candidate)
                answer["sources"] = {rank: [copy.to_json() for copy in copies] for rank, copies in sources.items()}
                answer["manifests"] = agreement.manifests
        return answer

    # The thread that talks to storage

    _recall: Recall | None = None

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
            agreement, epoch = self._restore, self._epoch
            if agreement is None or agreement.state in (RestoreState.FRESH, RestoreState.FAILED):
                return
            state = agreement.state
            overdue = agreement.deadline is not None and agreement.deadline.expired() and not agreement.done()
            if overdue and state is not RestoreState.GO:
                agreement.fail("deadline", self._late(agreement))
                return
        if state is RestoreState.PLANNING:
            self._plan_restore(agreement)
        elif state is RestoreState.SETTLED and agreement.candidate is not None:
            identity = agreement.candidate.identity
            self._catalog.record(epoch, "restored", {"step": identity.step, "epoch": identity.epoch, "identity": identity.to_json()})
            with self._lock:
                self._restored = identity
                if all(any(copy.tier == contract.TIER_BUCKET for copy in copies) for copies in agreement.candidate.copies.values()):
                    self._committed.setdefault(contract.TIER_BUCKET, identity)
                agreement.state = RestoreState.GO
        elif state is RestoreState.GO:
            self._say_restored(agreement)

    def _late(self, agreement: RestoreAgreement) -> str:
        late = [f"rank {rank} on {self._home.get(rank, 'an unknown node')}" for rank in agreement.late_ranks()]
        return (
            f"restore of epoch {self._epoch}, phase {agreement.state}: not done within {agreement.timeout_s:g} s; "
            f"late: {', '.join(late) or 'the head itself'}"
        )

    def _plan_restore(self, agreement: RestoreAgreement) -> None:
        """Chooses the step and brings its manifests together; without one decides between fresh and an error."""
        if self._recall is None:
            self._recall = Recall(self._catalog)
        with self._lock:
            inventories: dict[str, list[tuple[int, Identity]]] = {}
            for member in self._members.values():
                inventories.setdefault(member.node, []).extend(member.held)
            manifests = {(member.node, *key): text for member in self._members.values() for key, text in member.manifests.items()}
        outcome = self._recall.plan(inventories, manifests, agreement)
        if outcome is None:
            return  # manifests are still on their way from the nodes
        with self._lock:
            for fields in outcome.bad_copies:
                self._emit("bad_copy", **fields)
            if outcome.error is not None:
                agreement.fail(*outcome.error)
            elif outcome.candidate is not None:
                agreement.load(outcome.candidate, outcome.manifests)
            self._recall = None
        if outcome.error is None and outcome.candidate is None:
            self._catalog.record(self._epoch, "restored", {"step": 0, "epoch": 0, "identity": None})
            with self._lock:
                agreement.round += 1
                agreement.state = RestoreState.FRESH
                self._emit("fresh_start", step=0)

    def _say_restored(self, agreement: RestoreAgreement) -> None:
        with self._lock:
            if self._restored_said or not agreement.done() or agreement.candidate is None:
                return
            self._restored_said = True
            said = agreement.reports
            tiers = {str(rank): report["tier"] for rank, report in sorted(said.items())}
            self._emit(
                "restored",
                step=agreement.candidate.identity.step,
                tier=lineage.slowest(tiers.values()),
                tiers=tiers,
                nbytes=sum(report["nbytes"] for report in said.values()),
                wire_bytes=sum(report["wire_nbytes"] for report in said.values()),
                seconds=max(report["seconds"] for report in said.values()),
                from_epoch=agreement.candidate.identity.epoch,
            )

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
            drain = self._drain
            if drain is None:
                return
            if drain.failure is None and self._clock.monotonic() - drain.started_s > self._timeouts.drain_s:
                drain.failure = f"not done within {self._timeouts.drain_s:g} s"
            if drain.failure is not None:
                self._drain_failed(drain, drain.failure)
                return
            if not drain.complete():
                return
        try:
            commit_drain(self._catalog, drain, clock=self._clock)
        except KtrainError as error:
            with self._lock:
                self._drain_failed(drain, f"{error.kind}: {error}")
            return
        self._drain_done(drain)

    def _begin_drain(self) -> None:
        memory, bucket = self._committed.get(contract.TIER_MEMORY), self._committed.get(contract.TIER_BUCKET)
        if self._drain is not None or memory is None or memory == bucket or self._clock.monotonic() < self._drain_after_s:
            return
        last = self._stop is not None or any(
            said["phase"] == "close" for member in self._members.values() for said in member.ranks.values()
        )
        far = bucket is None or memory.step - bucket.step >= self._policies.every.bucket or memory.step < bucket.step
        if far or last:
            self._drain = Drain(identity=memory, started_s=self._clock.monotonic())

    def _drain_failed(self, drain: Drain, reason: str) -> None:
        if self._drain_failures == 0:
            self._emit("tier_failed", tier=contract.TIER_BUCKET, step=drain.identity.step, reason=reason)
        wait_s = _DRAIN_RETRY_S[min(self._drain_failures, len(_DRAIN_RETRY_S) - 1)]
        self._drain_failures += 1
        self._drain_after_s = self._clock.monotonic() + wait_s
        self._drain = None if self._drain is drain else self._drain

    def _drain_done(self, drain: Drain) -> None:
        identity = drain.identity
        with self._lock:
            if self._drain is drain:
                self._drain = None
            if self._drain_failures:
                self._emit("tier_recovered", tier=contract.TIER_BUCKET)
            self._drain_failures = 0
            self._committed[contract.TIER_BUCKET] = identity
            nbytes = sum(files.nbytes for files in drain.files.values())
            seconds = self._clock.monotonic() - drain.started_s
            self._emit("committed", step=identity.step, tier=contract.TIER_BUCKET, nbytes=nbytes, seconds=seconds)
            keep, epoch = self._policies.keep.bucket, self._epoch
        if not self._durable_recorded:
            self._catalog.record(epoch, "durable", {"step": identity.step})
            self._durable_recorded = True
        for commit in collect(self._catalog, keep=keep):
            self._emit("collected", tier=contract.TIER_BUCKET, step=commit.identity.step)


