"""The head's side of one attempt's restore: from the ranks' questions to the step that all of them apply."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Clock, Deadline
from ktrain.base.events import Event
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import lineage, quarantine
from ktrain.checkpoint.agreement import RestoreAgreement, RestoreState
from ktrain.checkpoint.cadence import history_of
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.gate import Gate, LossGate, Mismatch, OnMismatch, recorded_losses
from ktrain.checkpoint.log import read_backwards
from ktrain.checkpoint.pacer import Pacer, read_last
from ktrain.checkpoint.packed import pack
from ktrain.checkpoint.recall import Outcome, Recall
from ktrain.checkpoint.roster import Attempt, Member, Roster
from ktrain.checkpoint.spreading import Spreading
from ktrain.errors import DeadlineError, KtrainError, UnavailableError
from ktrain.format.manifest import Identity

_TOLD = (
    RestoreState.WEIGHING,
    RestoreState.FILLING,
    RestoreState.LOADING,
    RestoreState.SETTLED,
    RestoreState.GO,
)
_DECIDED = (RestoreState.GO, RestoreState.FRESH, RestoreState.FAILED)


@dataclass(frozen=True, slots=True)
class Desk:
    """What the coordinator shares with those who work for it; `lock` guards the roster."""

    catalog: RunCatalog
    roster: Roster
    lock: threading.RLock
    emit: Callable[..., None]
    pacer: Pacer
    timeouts: Timeouts
    clock: Clock


class RestoreDirector:
    """Directs the restore of one attempt. `work` is for the coordinator's thread, the rest is called under its lock."""

    def __init__(self, desk: Desk, attempt: Attempt) -> None:
        self._catalog = desk.catalog
        self._roster = desk.roster
        self._lock = desk.lock
        self._emit = desk.emit
        self._pacer = desk.pacer
        self._timeouts = desk.timeouts
        self._clock = desk.clock
        self._epoch = attempt.epoch
        self._home = attempt.home
        self._agreement = RestoreAgreement(len(attempt.home), desk.timeouts.restore_s)
        self._recall: Recall | None = None
        self.spreading = Spreading(desk.catalog, attempt, desk.timeouts, desk.clock)
        self.gate = Gate()  # the ranks' policy
        self.refusal: str | None = None  # why the ranks must not go on from what they restored
        self._losses: LossGate | None = None  # from "go" on; a new head leaves the rest of the comparison out
        self._mismatch: Mismatch | None = None  # the first one
        self.review = quarantine.Review()  # what is set aside, as this restore found it
        self._trouble: UnavailableError | DeadlineError | None = None  # why the store could not be asked, last time
        self._said = False
        self.restored: Identity | None = None
        self.durable: Identity | None = None  # what was restored, where the bucket holds it whole

    def adopt(self, review: quarantine.Review) -> None:
        """Another head has directed this restore, or began to; what it recorded is known."""
        self.review = review
        self._pacer.recall(history_of(review.attempts), None)  # the ranks say which cadence they follow
        record = next((found.restored for found in review.attempts if found.epoch == self._epoch), None)
        self._said = record is not None
        if record is not None and record.get("identity"):
            self.restored = Identity.from_json(record["identity"])

    def take(self, rank: int, report: Mapping[str, Any]) -> None:
        """Takes a rank's report."""
        self._agreement.report(rank, report, Deadline.after(self._timeouts.restore_s, self._clock))

    def trial(self) -> quarantine.Trial | None:
        """What the restored step has left before it is set aside; None before there is one, or where it never is."""
        if self.restored is None:
            return None
        if self.refusal is not None:
            return quarantine.Trial(sys.maxsize, failures_left=1)
        key = (self.restored.step, self.restored.epoch)
        return quarantine.trial_of(key, self.review.trouble, self.gate.failures)

    def is_undivided(self) -> bool:
        """Whether the nodes' ranks did not divide things as they were told, in this attempt or the one before."""
        return any(attempt.undivided is not None for attempt in self.review.attempts[-2:])

    def take_events(self, events: Iterable[Event]) -> None:
        """Takes the losses of the first steps, to be compared with those of before."""
        if self._losses is None:
            return
        for event in events:
            if event.kind == "step" and event.attempt == self._epoch:
                self._losses.take(int(event.fields["step"]), event.fields.get("loss"))

    @property
    def needed(self) -> Identity | None:
        """The snapshots that ranks are reading now and that must not be overwritten."""
        candidate = self._agreement.candidate
        return None if candidate is None or self._agreement.done() else candidate.identity

    def wanted_from(self, node: str) -> list[dict[str, Any]]:
        """Manifests that are to be sent from a node's memory."""
        return [] if self._recall is None else self._recall.wanted_from(node)

    def answer(self, node: str, known_round: int) -> dict[str, Any]:
        """The word on the restore for one node; its long part goes out once per round."""
        agreement = self._agreement
        answer: dict[str, Any] = {
            "round": agreement.round,
            "state": agreement.state.value,
            "error": agreement.error,
        }
        if agreement.candidate is not None and agreement.state in _TOLD:
            answer["identity"] = agreement.candidate.identity.to_json()
            if known_round != agreement.round:
                sources = lineage.sources_for(node, agreement.candidate)
                answer["sources"] = {rank: [copy.to_json() for copy in copies] for rank, copies in sources.items()}
                answer["manifests"] = agreement.manifests
        return answer

    def work(self) -> None:
        """Does what the agreement needs from storage.

        Raises:
            UnavailableError, DeadlineError: the store is away; the next call tries again, until the patience ends.
        """
        with self._lock:
            agreement = self._agreement
            state = agreement.state
            if state not in _DECIDED and agreement.deadline is not None and agreement.deadline.expired():
                agreement.fail(*self._late())
                return
        try:
            self._work_on(state)
        except (UnavailableError, DeadlineError) as error:
            self._trouble = error
            raise
        self._trouble = None

    def _work_on(self, state: RestoreState) -> None:
        if state is RestoreState.PLANNING:
            self._plan()
        elif state is RestoreState.FILLING:
            self._load_when_filled()
        elif state is RestoreState.SETTLED:
            self._go()
        elif state is RestoreState.GO:
            self._say()
            self._compare()

    def _late(self) -> tuple[str, str]:
        """Kind and words of the error when the patience has ended."""
        if self._trouble is not None:
            return "unavailable", (
                f"run {self._catalog.tier.url}: cannot tell what to continue from ({self._trouble}), for "
                f"{self._agreement.timeout_s:g} s; nothing was changed, try again"
            )
        late = [f"rank {rank} on {self._home.get(rank, 'an unknown node')}" for rank in self._agreement.late_ranks()]
        return "deadline", (
            f"restore of epoch {self._epoch}, phase {self._agreement.state}: not done within "
            f"{self._agreement.timeout_s:g} s; late: {', '.join(late) or 'the head itself'}"
        )

    def _plan(self) -> None:
        """Chooses the step and brings its manifests together; without one decides between fresh and an error."""
        with self._lock:
            recall = self._recall = self._recall or Recall(self._catalog, self._epoch, self.gate.failures)
            volumes, disks, manifests = self._roster.inventories(), self._roster.disks(), self._roster.manifests()
        outcome = recall.plan(volumes, disks, manifests, self._agreement)
        if outcome is None:
            return  # manifests are still on their way from the nodes
        if outcome.candidate is None and outcome.error is None:
            self._catalog.record(self._epoch, "restored", {"step": 0, "epoch": 0, "identity": None})
        last = read_last(self._catalog) if self._pacer.is_auto else None
        is_weighed = outcome.candidate is not None and self.spreading.opens(outcome.candidate)
        packed = pack(outcome.manifests)
        with self._lock:
            self._recall = None
            self.review = recall.review
            # Before any rank may apply anything: all of them begin with the same cadence.
            self._pacer.recall(history_of(recall.review.attempts), last)
            for mark in recall.review.fresh:
                self._emit("quarantined", **quarantine.describe(mark))
            for fields in outcome.bad_copies:
                self._emit("bad_copy", **fields)
            self._settle(outcome, packed, is_weighed)

    def _settle(self, outcome: Outcome, packed: str, is_weighed: bool) -> None:
        agreement = self._agreement
        if outcome.error is not None:
            agreement.fail(*outcome.error)
        elif outcome.candidate is not None and is_weighed:
            agreement.weigh(outcome.candidate, packed)
        elif outcome.candidate is not None:
            agreement.load(outcome.candidate, packed)
        else:
            agreement.round += 1
            agreement.state = RestoreState.FRESH
            self._emit("fresh_start", step=0)

    def _load_when_filled(self) -> None:
        """Weighs what the ranks want; they read once what the nodes fill is there, or not to be waited for."""
        with self._lock:
            agreement, spreading = self._agreement, self.spreading
            candidate = agreement.candidate
            assert candidate is not None
            if not spreading.is_chosen and spreading.choose(agreement.reports, agreement.round, self._roster):
                return  # the nodes hear of it with their next beats
            if spreading.is_settled(candidate.identity, self._roster):
                agreement.load(spreading.with_fills(candidate, self._roster), agreement.manifests)

    def wanted_fills(self, member: Member) -> dict[str, Any] | None:
        """What a keeper is to bring from the bucket into its volume now."""
        if self._agreement.state is not RestoreState.FILLING or self._agreement.candidate is None:
            return None
        return self.spreading.wanted_from(member, self._agreement.candidate)

    def _go(self) -> None:
        """All ranks have proven theirs: the choice is recorded before anybody can commit on top of it."""
        candidate = self._agreement.candidate
        assert candidate is not None
        identity = candidate.identity
        fields = {"step": identity.step, "epoch": identity.epoch, "identity": identity.to_json()}
        self._catalog.record(self._epoch, "restored", fields)
        with self._lock:
            self.restored = identity
            self._losses = LossGate(self.gate, restored=identity.step)
            if all(any(copy.tier == contract.TIER_BUCKET for copy in copies) for copies in candidate.copies.values()):
                self.durable = identity
            self._agreement.state = RestoreState.GO

    def _compare(self) -> None:
        """Compares the first losses with the recorded ones, once all have applied; the log is read once."""
        with self._lock:
            losses, applied = self._losses, self._agreement.done()
            exact = all(report.get("exact") for report in self._agreement.reports.values())
        if losses is None or self.restored is None or not losses.steps or not applied:
            return
        if not losses.is_known:
            recorded = self._read_losses(self.restored, losses.steps)
            losses.know({step: (loss, exact and same) for step, (loss, same) in recorded.items()})
        with self._lock:
            different = losses.compare()
            for item in different:
                where = {"restored": self.restored.step, "from_epoch": self.restored.epoch}
                self._emit("loss_mismatch", **asdict(item), **where)
            self._mismatch = self._mismatch or next(iter(different), None)
        if self._mismatch is not None and self.gate.then == OnMismatch.STEP_BACK and self.refusal is None:
            self._step_back(self.restored, self._mismatch)

    def _read_losses(self, restored: Identity, steps: range) -> dict[int, tuple[float, bool]]:
        blocks = read_backwards(self._catalog.tier.url, self._catalog.tier, timeouts=self._timeouts, clock=self._clock)
        earlier = [attempt for attempt in self.review.attempts if attempt.epoch != self._epoch]
        try:
            return recorded_losses(blocks, restored, earlier, steps)
        except (KtrainError, OSError) as error:
            message = f"the losses after the restore of step {restored.step} are not compared: {error}"
            with self._lock:
                self._emit("notice", message=message)
            return {}

    def _step_back(self, restored: Identity, found: Mismatch) -> None:
        """Sets the restored step aside, with what was made from it, and has every rank end."""
        reason = f"step {found.step} had loss {found.expected!r} and has {found.found!r} after the restore"
        marks = [
            quarantine.Mark(step, epoch, on=True, reason=reason, attempts=(self._epoch,), after=self._epoch)
            for step, epoch in ((restored.step, restored.epoch), (None, self._epoch))
        ]
        quarantine.add_marks(self._catalog, quarantine.read_marks(self._catalog), marks)
        with self._lock:
            for mark in marks:
                self._emit("quarantined", **quarantine.describe(mark))
            self.refusal = (
                f"the state of step {restored.step} (epoch {restored.epoch}) is not what it was: {reason}; it is set "
                "aside, and the next attempt continues from an older step"
            )

    def _say(self) -> None:
        with self._lock:
            agreement = self._agreement
            if self._said or agreement.candidate is None or not agreement.done():
                return
            self._said = True
            reports, spreading = agreement.reports, self.spreading
            tiers = {str(rank): report["tier"] for rank, report in sorted(reports.items())}
            if spreading.filled(agreement.candidate):  # what was in memory or at a peer had come from there
                tiers = dict.fromkeys(tiers, contract.TIER_BUCKET)
            self._emit(
                "restored",
                step=agreement.candidate.identity.step,
                tier=lineage.slowest(tiers.values()),
                tiers=tiers,
                nbytes=sum(report["nbytes"] for report in reports.values()),
                wanted_nbytes=sum(report["wanted_nbytes"] for report in reports.values()),
                num_reads=sum(report["num_reads"] for report in reports.values()),
                wire_bytes=sum(report["wire_nbytes"] for report in reports.values()),
                bucket_bytes=sum(report["bucket_nbytes"] for report in reports.values())
                + spreading.nbytes(self._roster),
                spread=spreading.reason,
                seconds=max(report["seconds"] for report in reports.values()),
                from_epoch=agreement.candidate.identity.epoch,
            )
