"""The head's side of checkpoints: joins what the nodes report into commits, restores, drains and stops.

Everything is derived from the nodes' inventories, which each beat carries whole, so that a head that died can be
replaced by an empty one; and everything that a node is to do is told as a wanted state, so that no message can be lost.
Beats are answered from memory; storage is touched only by the coordinator's own thread.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.base.control import Handler
from ktrain.base.events import make
from ktrain.base.faults import FaultPoints
from ktrain.base.process import let_training_first
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.agreement import StopAgreement
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.commit import commit_drain
from ktrain.checkpoint.commits import Commits
from ktrain.checkpoint.direct import Desk, RestoreDirector
from ktrain.checkpoint.disks import view_of
from ktrain.checkpoint.drain import Drain, DrainSchedule
from ktrain.checkpoint.intake import Intake
from ktrain.checkpoint.pacer import Pacer, write_last
from ktrain.checkpoint.policy import Policies
from ktrain.checkpoint.quarantine import Trial, review
from ktrain.checkpoint.removal import Terms
from ktrain.checkpoint.replication import Replication
from ktrain.checkpoint.roster import Attempt, Member, RankProgress, Roster
from ktrain.checkpoint.sweep import Sweeps
from ktrain.errors import ConflictError, KtrainError
from ktrain.format.manifest import Identity
from ktrain.format.record import Gap

_LOG = logging.getLogger(__name__)
_UNDIVIDED = "what the ranks stored does not make it whole; from now on every node stores all that its ranks hold"


class Coordinator:
    """Commit, restore, drain and stop of one run, attempt after attempt. Safe from any thread."""

    def __init__(
        self,
        catalog: RunCatalog,
        *,
        timeouts: Timeouts,
        intake: Intake,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._catalog = catalog
        self._timeouts = timeouts
        self._intake = intake
        self._clock = clock
        self._lock = threading.RLock()  # guards everything below; never held across storage calls
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._pacer = Pacer(self._emit, timeouts=timeouts, clock=clock)
        self._desk = Desk(catalog, Roster(), self._lock, self._emit, self._pacer, timeouts, clock)
        self._roster = self._desk.roster
        self._attempt = Attempt()
        self._commits = Commits(self._attempt, Replication(timeouts, clock), self._emit)
        whole = bool(getattr(catalog.tier, "shows_whole", False))
        self._drains = DrainSchedule(timeouts=timeouts, emit=self._emit, clock=clock, takes_over=whole)
        self._sweeps = Sweeps(catalog, emit=self._emit, timeouts=timeouts, clock=clock)
        self._faults = FaultPoints([], epoch=0)
        self._policies = Policies()
        self._restore: RestoreDirector | None = None
        self._stop: StopAgreement | None = None
        self._wire: dict[str, Any] | None = None
        self._free = False
        self.trial: Trial | None = None  # of the step that the attempt continued from; replaced whole

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
        found = review(self._catalog, self._catalog.attempts(), limit=0)
        with self._lock:
            self._enter(epoch, assignment)
            if self._restore is not None:
                self._restore.adopt(found)

    def _enter(self, epoch: int, assignment: Mapping[str, Sequence[int]]) -> None:
        self._attempt = Attempt.of(epoch, assignment)
        # What the last attempt had may be off this one's line.
        self._commits = Commits(self._attempt, Replication(self._timeouts, self._clock), self._emit)
        self._drains.new_attempt()
        self._pacer.begin_attempt()
        self._faults = FaultPoints.from_environment(epoch)
        self._roster.forget_ranks()
        self._restore = RestoreDirector(self._desk, self._attempt)
        self.trial = None
        if self._stop is not None:
            self._stop = StopAgreement(self._stop.reason)  # these ranks have promised nothing yet

    def end_attempt(self) -> None:
        """Ends the attempt: nothing more is agreed until the next one begins. What is in memory is still drained."""
        with self._lock:
            self._restore = None
            self._drains.new_attempt()
            self._attempt = Attempt(self._attempt.epoch)

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
            return self._roster.progress(self._clock.monotonic(), self._drains.quiet_s())

    def committed(self) -> dict[str, tuple[int, int]]:
        """Tier -> newest committed (step, epoch) of this attempt's line."""
        with self._lock:
            return {tier: (identity.step, identity.epoch) for tier, identity in self._commits.all().items()}

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
        """True when every node has freed its volume that was heard of since it could have done so."""
        with self._lock:
            return self._roster.all_freed(self._clock.monotonic(), self._timeouts.free_s)

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

    def _emit(self, kind: str, **fields: Any) -> None:
        event = make(kind, self._attempt.epoch, clock=self._clock, **fields)
        self._intake.emit(event)
        self._pacer.take([event])

    # One beat of one node

    def _beat(self, said: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            epoch = self._attempt.epoch
            if int(said["epoch"]) > epoch:
                raise ConflictError(
                    f"beat of {said['member']}: it is in epoch {said['epoch']}, this head is in epoch {epoch}"
                )
            member, brought = self._roster.take(said, self._clock.monotonic(), self._intake.room)
            fresh = self._intake.take(brought, self._faults)
            self._intake.note(member.written, member.inbox.taken)
            for event in brought:  # also what a head before this one has logged: its metrics went with it
                self._sweeps.take(event)
            self._pacer.draining = self._drains.current is not None
            self._pacer.take(event for event in fresh if event.attempt == epoch)
            if self._restore is not None:
                self._restore.take_events(fresh)
            if int(said["epoch"]) == epoch:
                self._take_ranks(member, said)
            self._commits.follow(self._roster, None if self._restore is None else self._restore.restored)
            if len(self._roster.wires().keys() & self._attempt.nodes.keys()) > 1:
                self._commits.replication.choose(self._commits.memory, self._commits.peer)
            answer = self._answer(member, said)
        self._wake.set()
        return answer

    def _take_ranks(self, member: Member, said: dict[str, Any]) -> None:
        member.ranks = {int(rank): view for rank, view in said["ranks"].items() if int(rank) in self._attempt.home}
        for rank, view in member.ranks.items():
            if view.get("policies") and rank == 0:
                self._policies = Policies.from_json(view["policies"])
                self._pacer.declare(self._policies.every)
            if view["stop_wanted"]:
                self.request_stop(view["stop_wanted"])
            if view["restore"] and self._restore is not None:
                self._restore.take(rank, view["restore"])
        self._pacer.hear(member.ranks)
        self._drains.take(member.instance, said["drained"])
        if self._stop is not None:
            self._stop.hear(self._roster.views(), self._attempt.home)

    def _answer(self, member: Member, said: dict[str, Any]) -> dict[str, Any]:
        attempt, restore, drain = self._attempt, self._restore, self._drains.current
        needed = [*self._commits.needed(), None if restore is None else restore.needed]
        return {
            "run": self._catalog.run_id,
            "format": self._catalog.format,
            "epoch": attempt.epoch,
            "world_size": len(attempt.home),
            "node_sizes": list(attempt.node_sizes),
            "ranks": list(attempt.nodes.get(member.node, ())),
            "keeps": list(attempt.kept_by(member.node)),
            "committed": self._commits.to_json(),
            "protect": _protected(*needed, None if drain is None else drain.identity),
            "protect_kept": _protected(*needed),  # no replica waits for a drain, which has its own node's slot
            "kept_slots": self._policies.keep.kept,
            "peers": self._roster.wires(),
            "pull": self._roster.wanted_replicas(member, self._commits.replication.wanted, attempt),
            "drain": self._drains.wanted_from(member.instance),
            "draining": self._drains.to_json(),
            "disk": self._commits.wanted_on_disk(every=self._pacer.every.disk),
            "disk_gone": self._sweeps.disks.gone(attempt.epoch),
            "restore": None if restore is None else restore.answer(member.node, int(said["restore_round"])),
            "fill": None if restore is None else restore.wanted_fills(member),
            "want_manifests": [] if restore is None else restore.wanted_from(member.node),
            "stop": None if self._stop is None else self._stop.to_json(),
            "cadence": self._pacer.to_json(),
            "refusal": None if restore is None else restore.refusal,
            "wire": self._wire,
            "free": self._free,
            "events_taken": member.inbox.taken,
            "events_logged": self._intake.num_written(member.written),
        }

    # The thread that talks to storage

    def _work(self) -> None:
        let_training_first()
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
        _record_first(self._catalog, self._commits, self._lock)
        self._work_drain()
        with self._lock:
            view = view_of(self._attempt, self._commits, self._roster, self._restore, self._policies.keep)
            chosen, epoch = self._pacer.decide(self._roster.views), self._attempt.epoch
        self._sweeps.disks.decide(view)
        if chosen is not None:
            write_last(self._catalog, epoch, *chosen)

    def _work_restore(self) -> None:
        with self._lock:
            director, gate = self._restore, self._policies.gate
            if director is None:
                return
            director.spreading.has_wire = self._wire is not None
        director.gate = gate
        director.work()
        with self._lock:
            if director is self._restore:
                self.trial = director.trial()
                self._attempt = self._attempt.undivided() if director.is_undivided() else self._attempt
            if director.durable is not None and director is self._restore:
                self._commits.note_bucket(director.durable)

    def _work_drain(self) -> None:
        with self._lock:
            self._begin_drain()
            drain = self._drains.try_complete()
        if drain is None:
            return
        metrics = self._sweeps.bucket.metrics.of(drain.identity.step, drain.identity.epoch)
        try:
            commit_drain(self._catalog, drain, clock=self._clock, faults=self._faults, metrics=metrics)
        except KtrainError as error:
            with self._lock:
                self._drains.failed(drain, f"{error.kind}: {error}")
                attempt = self._attempt
                is_gap = isinstance(error, Gap) and bool(attempt.node_sizes)
                if is_gap:
                    self._attempt = attempt.undivided()
                    self._emit("notice", message=f"step {drain.identity.step}: {_UNDIVIDED}")
            if is_gap:
                self._catalog.record(attempt.epoch, "undivided", {"step": drain.identity.step})
            return
        self._drain_done(drain)

    def _begin_drain(self) -> None:
        last = self._stop is not None or any(said["phase"] == "close" for said in self._roster.views().values())
        commits = self._commits
        restored = None if self._restore is None else self._restore.restored
        self._drains.drop_unless(lambda identity: commits.may_be_continued(identity, restored))
        if commits.memory is not None and commits.memory == self._drains.last_done:
            commits.note_bucket(commits.memory)  # drained across the beginning of this attempt, which restored it
        self._drains.begin(commits.memory, commits.bucket, every=self._pacer.every.bucket, last=last)
        self._drains.assign(self._roster.members())

    def _drain_done(self, drain: Drain) -> None:
        with self._lock:
            if not self._drains.done(drain):
                return
            commits, keep, epoch = self._commits, self._policies.keep.in_bucket, self._attempt.epoch
            if drain.identity.epoch != epoch and drain.identity != commits.memory:
                return  # of an attempt before; a restore finds it, and this attempt counts only what is on its line
            commits.note_bucket(drain.identity)
            in_doubt = self._restore is None or self._restore.review.trouble.doubts(drain.identity.step)
        if not commits.durable_is_recorded:
            self._catalog.record(epoch, "durable", {"step": drain.identity.step})
            commits.durable_is_recorded = True
        if not in_doubt:  # else older steps may be the ones that are needed
            self._sweeps.bucket.collect(Terms(keep, epoch, newest=drain.identity))


def _record_first(catalog: RunCatalog, commits: Commits, lock: threading.RLock) -> None:
    """The first commit of an attempt moves the line: it is recorded, so that older epochs beyond are off it."""
    with lock:
        first = commits.unrecorded_first()
    if first is not None:
        catalog.record(commits.epoch, "committed", first)
        commits.first_is_recorded = True


def _protected(*needed: Identity | None) -> list[tuple[int, int]]:
    """(step, epoch) of the snapshots that no node may overwrite now."""
    return sorted({(identity.step, identity.epoch) for identity in needed if identity is not None})
