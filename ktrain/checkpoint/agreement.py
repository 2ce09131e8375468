"""Two agreements among the ranks of an attempt, as pure state machines driven by the head.

Restore: every rank has loaded and proven the same step before any rank applies it (design promise 3).
Stop: a save that is not on schedule is announced for a step that no rank has reached; it holds only after every
rank has promised so, because ranks report late.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.checkpoint.lineage import Candidate

CopyKey = tuple[str, str, int, int, int]
# Rounds in which a copy in the bucket that cannot be read is tried. (A peer's has waited already.) Three rounds with a
# store that hangs would not fit into the patience of a restore, and an older step would never be looked at.
_BUCKET_TRIES = 2


class RestoreState(StrEnum):
    """Where the restore of an attempt is."""

    GATHERING = "gathering"  # not every rank has asked yet
    PLANNING = "planning"  # all asked; the head chooses a step and brings the manifests together
    WEIGHING = "weighing"  # ranks say what they would read, and read nothing
    FILLING = "filling"  # all have said; nodes may bring payloads from the bucket near before any rank reads
    LOADING = "loading"  # ranks read and prove their parts
    SETTLED = "settled"  # all have proven theirs; the head records the choice
    GO = "go"  # every rank applies
    FRESH = "fresh"  # there never was a durable commit: step 0
    FAILED = "failed"


@dataclass(slots=True)
class RestoreAgreement:
    """The ranks' agreement on one step. Not thread-safe; its owner holds the lock."""

    world_size: int
    timeout_s: float
    state: RestoreState = RestoreState.GATHERING
    round: int = 0
    candidate: Candidate | None = None
    manifests: str = ""  # of all saved ranks, packed
    error: dict[str, str] | None = None
    excluded: set[CopyKey] = field(default_factory=set)  # copies that failed in this attempt
    corrupt: set[CopyKey] = field(default_factory=set)  # those among them that are proven bad
    unreachable: Counter[CopyKey] = field(default_factory=Counter)  # rounds in which a copy could not be reached
    reports: dict[int, dict[str, Any]] = field(default_factory=dict)  # rank -> {"round", "status", ...}
    deadline: Deadline | None = None

    def report(self, rank: int, report: Mapping[str, Any], deadline: Deadline) -> None:
        """Takes what a rank says: status "waiting", "wants" (with how much of what), "ready", "failed" (with the
        copies that failed) or "applied".
        """
        if self.deadline is None:
            self.deadline = deadline  # the patience begins with the first rank that asks
        self.reports[rank] = dict(report)
        if self.state is RestoreState.GATHERING:
            self.round = max(self.round, int(report["round"]))
            if self._all("waiting", "wants", "ready", "failed"):
                self.state = RestoreState.PLANNING
            elif self._all("ready", "applied"):
                self.state = RestoreState.GO  # a new head, and the one before had said so: some have applied already
        elif self.state is RestoreState.WEIGHING and self._all_of_round("wants"):
            self.state = RestoreState.FILLING
        elif self.state is RestoreState.LOADING and self._all_of_round("ready", "failed"):
            self._settle()

    def _all(self, *statuses: str) -> bool:
        return len(self.reports) == self.world_size and all(
            said["status"] in statuses for said in self.reports.values()
        )

    def _all_of_round(self, *statuses: str) -> bool:
        return self._all(*statuses) and all(said["round"] == self.round for said in self.reports.values())

    def _settle(self) -> None:
        failed = [said for said in self.reports.values() if said["status"] == "failed"]
        entries = [entry for said in failed for entry in said["copies"]]
        self.corrupt |= {tuple(entry["key"]) for entry in entries if entry["corrupt"]}
        self.unreachable.update({tuple(entry["key"]) for entry in entries if not entry["corrupt"]})
        given_up = {
            key for key, rounds in self.unreachable.items() if key[0] != contract.TIER_BUCKET or rounds >= _BUCKET_TRIES
        }
        self.excluded |= self.corrupt | given_up
        self.state = RestoreState.PLANNING if failed else RestoreState.SETTLED

    def weigh(self, candidate: Candidate, manifests: str) -> None:
        """Begins a round in which the ranks only say what they want of a chosen checkpoint."""
        self.load(candidate, manifests)
        self.state = RestoreState.WEIGHING

    def load(self, candidate: Candidate, manifests: str) -> None:
        """Begins a new round on a chosen checkpoint."""
        self.round += 1
        self.candidate, self.manifests, self.state = candidate, manifests, RestoreState.LOADING

    def fail(self, kind: str, message: str) -> None:
        """Ends the agreement; every rank raises this error."""
        self.error = {"kind": kind, "message": message}
        self.round += 1
        self.state = RestoreState.FAILED

    def done(self) -> bool:
        """True once every rank has applied the choice (or starts fresh)."""
        return self.state in (RestoreState.GO, RestoreState.FRESH) and self._all("applied")

    def late_ranks(self) -> list[int]:
        """Ranks whose answer the current state waits for."""
        if self.state is RestoreState.GATHERING:
            return sorted(set(range(self.world_size)) - set(self.reports))
        if self.state in (RestoreState.WEIGHING, RestoreState.LOADING):
            return sorted(rank for rank, said in self.reports.items() if said["round"] != self.round)
        return []


@dataclass(slots=True)
class StopAgreement:
    """The step at which every rank saves and stops. Not thread-safe; its owner holds the lock."""

    reason: str
    step: int | None = None
    confirmed: bool = False
    promised: set[int] = field(default_factory=set)
    lead: int = 2  # steps between the newest one heard of and the announced one

    def advance(self, steps: Mapping[int, int], acks: Mapping[int, tuple[int, bool]], ranks: Collection[int]) -> None:
        """Takes the ranks' newest steps and their answers (announced step, promised?) and moves on.

        A rank that had already reached the announced step answers no, and a later step is announced, ever further
        ahead: ranks that step faster than word travels are caught all the same.
        """
        if self.confirmed or not ranks or not set(ranks) <= set(steps):
            return
        answers = {rank: acks[rank] for rank in ranks if rank in acks and acks[rank][0] == self.step}
        if self.step is None or any(not promised for _, promised in answers.values()):
            self.step = max(max(steps[rank] for rank in ranks), self.step or 0) + self.lead
            self.lead *= 2
            return
        self.promised = {rank for rank, (_, promised) in answers.items() if promised}
        self.confirmed = self.promised == set(ranks)

    def hear(self, views: Mapping[int, Mapping[str, Any]], ranks: Collection[int]) -> None:
        """Takes what the ranks last said; one that has closed takes part no more."""
        running = [rank for rank in ranks if not views.get(rank, {}).get("closed", False)]
        steps = {rank: int(view["step"]) for rank, view in views.items()}
        acks = {
            rank: (int(view["stop_ack"][0]), bool(view["stop_ack"][1]))
            for rank, view in views.items()
            if view["stop_ack"]
        }
        self.advance(steps, acks, running)

    def to_json(self) -> dict[str, Any]:
        return {"step": self.step, "confirmed": self.confirmed, "reason": self.reason}
