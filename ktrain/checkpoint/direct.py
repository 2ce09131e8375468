"""The head's side of one attempt's restore: from the ranks' questions to the step that all of them apply."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import lineage, quarantine
from ktrain.checkpoint.agreement import RestoreAgreement, RestoreState
from ktrain.checkpoint.cadence import history_of
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.pacer import Pacer, read_last
from ktrain.checkpoint.recall import Outcome, Recall
from ktrain.checkpoint.roster import Attempt, Roster
from ktrain.errors import DeadlineError, UnavailableError
from ktrain.format.manifest import Identity

_TOLD = (RestoreState.LOADING, RestoreState.SETTLED, RestoreState.GO)


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
        self.failures = 0  # from a step until it is set aside, as the ranks' policy says; 0 for never
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
        return quarantine.trial_of((self.restored.step, self.restored.epoch), self.review.trouble, self.failures)

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
            waiting = (RestoreState.GATHERING, RestoreState.PLANNING, RestoreState.LOADING, RestoreState.SETTLED)
            if state in waiting and agreement.deadline is not None and agreement.deadline.expired():
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
        elif state is RestoreState.SETTLED:
            self._go()
        elif state is RestoreState.GO:
            self._say()

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
            recall = self._recall = self._recall or Recall(self._catalog, self.failures)
            volumes, disks, manifests = self._roster.inventories(), self._roster.disks(), self._roster.manifests()
        outcome = recall.plan(volumes, disks, manifests, self._agreement)
        if outcome is None:
            return  # manifests are still on their way from the nodes
        if outcome.candidate is None and outcome.error is None:
            self._catalog.record(self._epoch, "restored", {"step": 0, "epoch": 0, "identity": None})
        last = read_last(self._catalog) if self._pacer.is_auto else None
        with self._lock:
            self._recall = None
            self.review = recall.review
            # Before any rank may apply anything: all of them begin with the same cadence.
            self._pacer.recall(history_of(recall.review.attempts), last)
            for mark in recall.review.fresh:
                self._emit("quarantined", **quarantine.describe(mark))
            for fields in outcome.bad_copies:
                self._emit("bad_copy", **fields)
            self._settle(outcome)

    def _settle(self, outcome: Outcome) -> None:
        agreement = self._agreement
        if outcome.error is not None:
            agreement.fail(*outcome.error)
        elif outcome.candidate is not None:
            agreement.load(outcome.candidate, outcome.manifests)
        else:
            agreement.round += 1
            agreement.state = RestoreState.FRESH
            self._emit("fresh_start", step=0)

    def _go(self) -> None:
        """All ranks have proven theirs: the choice is recorded before anybody can commit on top of it."""
        candidate = self._agreement.candidate
        assert candidate is not None
        identity = candidate.identity
        fields = {"step": identity.step, "epoch": identity.epoch, "identity": identity.to_json()}
        self._catalog.record(self._epoch, "restored", fields)
        with self._lock:
            self.restored = identity
            if all(any(copy.tier == contract.TIER_BUCKET for copy in copies) for copies in candidate.copies.values()):
                self.durable = identity
            self._agreement.state = RestoreState.GO

    def _say(self) -> None:
        with self._lock:
            agreement = self._agreement
            if self._said or agreement.candidate is None or not agreement.done():
                return
            self._said = True
            reports = agreement.reports
            tiers = {str(rank): report["tier"] for rank, report in sorted(reports.items())}
            self._emit(
                "restored",
                step=agreement.candidate.identity.step,
                tier=lineage.slowest(tiers.values()),
                tiers=tiers,
                nbytes=sum(report["nbytes"] for report in reports.values()),
                wire_bytes=sum(report["wire_nbytes"] for report in reports.values()),
                seconds=max(report["seconds"] for report in reports.values()),
                from_epoch=agreement.candidate.identity.epoch,
            )
