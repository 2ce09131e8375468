"""Steps that are set aside because the job keeps failing from them (ADR 0018): pure judgement, and marks in the run.

A mark is only ever added, under a name of its own, and nothing is deleted because of one. Imports neither torch nor
ray.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ktrain.base import contract, ids
from ktrain.checkpoint.catalog import AttemptRecord, RunCatalog
from ktrain.errors import InternalError, KtrainError, NotFoundError
from ktrain.format.manifest import Identity

Key = tuple[int, int]  # (step, epoch that made it)

# What a process says when it fails because another one is gone: never the root of a failure that has another.
ECHO = re.compile(
    r"connection (closed|reset|refused)|broken pipe|gloo|nccl|DistNetworkError|DistStoreError|peer|timed out waiting",
    re.IGNORECASE,
)
_NAME = re.compile(r"/mark-(\d+)-[0-9a-f]+\.json$")


def is_own_fault(error: BaseException) -> bool:
    """Whether an error that ends a rank tells of the job itself: no refusal, no stop, no echo of another's end."""
    if isinstance(error, KtrainError):
        return type(error) in (KtrainError, InternalError)
    return isinstance(error, Exception) and ECHO.search(f"{type(error).__name__}: {error}") is None


@dataclass(frozen=True, slots=True)
class Mark:
    """A word on a step: it is set aside, or (`on` false) trusted again.

    Attributes:
        step: None means every step that the epoch made.
        attempts: epochs of the attempts that failed from it.
        after: newest attempt when this was said; failures up to it do not count again.
    """

    step: int | None
    epoch: int
    on: bool
    reason: str
    attempts: tuple[int, ...] = ()
    after: int = 0

    def covers(self, key: Key) -> bool:
        """Whether this mark is about the step."""
        return self.epoch == key[1] and self.step in (None, key[0])


@dataclass(frozen=True, slots=True)
class Quarantine:
    """All marks of a run, oldest first; `newest` is the number in the name of the last one."""

    marks: tuple[Mark, ...] = ()
    newest: int = 0

    def find(self, step: int, epoch: int) -> Mark | None:
        """The mark that sets this step aside; None where the step may be used."""
        last = next((mark for mark in reversed(self.marks) if mark.covers((step, epoch))), None)
        return last if last is not None and last.on else None

    def holds(self, identity: Identity) -> bool:
        """True where the checkpoint is set aside."""
        return self.find(identity.step, identity.epoch) is not None

    def said_after(self, key: Key) -> int:
        """The newest attempt that a mark about the step has taken into account."""
        return max((mark.after for mark in self.marks if mark.covers(key)), default=0)


@dataclass(frozen=True, slots=True)
class Trouble:
    """Failures of the job's own that the run has not got over.

    Attributes:
        farthest: the step beyond which something has to be committed.
        failures: origin -> epochs of the attempts that failed from it, or from what was made from it on the way.
        origins: epoch of an attempt without a commit beyond `farthest` -> the step that its detour began from.
    """

    farthest: int = 0
    failures: Mapping[Key, tuple[int, ...]] = field(default_factory=dict)
    origins: Mapping[int, Key] = field(default_factory=dict)

    def doubts(self, step: int) -> bool:
        """True while what the run makes may still turn out to be as bad as what it fled from."""
        return bool(self.failures) and step <= self.farthest

    def origin(self, key: Key) -> Key:
        """The step to blame for a failure of an attempt that restored `key`."""
        return self.origins.get(key[1], key)


def find_trouble(attempts: Sequence[AttemptRecord], quarantine: Quarantine) -> Trouble:
    """Reads the history of a run, oldest attempt first."""
    farthest = 0
    failures: dict[Key, tuple[int, ...]] = {}
    origins: dict[int, Key] = {}
    for attempt in attempts:
        restored, committed = _restored(attempt), _committed(attempt)
        farthest = max(farthest, 0 if restored is None else restored[0])  # it was there, whoever had heard of it
        if committed > farthest:
            farthest, failures, origins = committed, {}, {}
            continue
        if restored is None:
            continue
        origin = origins[attempt.epoch] = origins.get(restored[1], restored)
        failed = attempt.end is not None and attempt.end.get("own_fault") is True
        if failed and attempt.epoch > quarantine.said_after(origin):
            failures[origin] = (*failures.get(origin, ()), attempt.epoch)
    return Trouble(farthest, failures, origins)


def _committed(attempt: AttemptRecord) -> int:
    """The newest step that an attempt is known to have committed. Its last step is not: word of it may be lost."""
    return max(int((attempt.committed or {}).get("step") or 0), int((attempt.end or {}).get("committed_step") or 0))


def _restored(attempt: AttemptRecord) -> Key | None:
    identity = (attempt.restored or {}).get("identity")
    return None if not identity else (int(identity["step"]), int(identity["epoch"]))


def due(trouble: Trouble, limit: int, newest: int) -> list[Mark]:
    """The marks to add: origins that have failed `limit` times, with all that was made from them. 0: never."""
    marks = []
    for origin, epochs in sorted(trouble.failures.items()):
        if not 0 < limit <= len(epochs):
            continue
        reason = f"{len(epochs)} attempts failed from it without a commit beyond step {trouble.farthest}"
        marks.append(Mark(*origin, on=True, reason=reason, attempts=epochs, after=newest))
        made = f"made from step {origin[0]} on the way to the same failure"
        detours = [epoch for epoch, came_from in trouble.origins.items() if came_from == origin]
        marks += [Mark(None, epoch, on=True, reason=made, attempts=epochs, after=newest) for epoch in detours]
    return marks


@dataclass(frozen=True, slots=True)
class Trial:
    """What the step that an attempt continued from has left."""

    farthest: int
    failures_left: int  # until it is set aside; at least 1

    def ends_with(self, committed: int | None) -> bool:
        """True where a failure of the job's own sets it aside, after a newest commit of `committed`."""
        return self.failures_left <= 1 and (committed or 0) <= self.farthest


def trial_of(key: Key, trouble: Trouble, limit: int) -> Trial | None:
    """The trial of an attempt that restored `key`; None where nothing is ever set aside."""
    if limit < 1:
        return None
    return Trial(max(trouble.farthest, key[0]), max(1, limit - len(trouble.failures.get(trouble.origin(key), ()))))


# Records


def read_marks(catalog: RunCatalog) -> Quarantine:
    """The marks of the run. One that is torn counts as not written.

    Raises:
        UnavailableError, DeadlineError: the store could not be asked.
    """
    found = catalog.tier.list(f"{contract.QUARANTINE_DIR}/", deadline=catalog.transfer_deadline(0))
    numbers = {stored.name: int(named[1]) for stored in found if (named := _NAME.search(stored.name))}
    marks = []
    for name in sorted(numbers):
        try:
            value = json.loads(catalog.tier.read(name, deadline=catalog.transfer_deadline(0)))
            marks.append(Mark(**{**value, "attempts": tuple(value["attempts"])}))
        except (ValueError, TypeError, KeyError, NotFoundError):
            continue
    return Quarantine(tuple(marks), max(numbers.values(), default=0))


def add_marks(catalog: RunCatalog, known: Quarantine, marks: Iterable[Mark]) -> Quarantine:
    """Writes marks and returns all of them. Two writers at once add both."""
    for number, mark in enumerate(marks, start=known.newest + 1):
        name = f"{contract.QUARANTINE_DIR}/mark-{number:06d}-{ids.random_id()}.json"
        data = json.dumps(asdict(mark)).encode()
        catalog.tier.write(name, data, deadline=catalog.transfer_deadline(0))
        known = Quarantine((*known.marks, mark), number)
    return known


@dataclass(frozen=True, slots=True)
class Review:
    """The state of a run's quarantine before a restore; `fresh` are the marks that this review added."""

    attempts: tuple[AttemptRecord, ...] = ()
    quarantine: Quarantine = Quarantine()
    trouble: Trouble = Trouble()
    fresh: tuple[Mark, ...] = ()


def review(catalog: RunCatalog, attempts: Sequence[AttemptRecord], limit: int) -> Review:
    """Reads the marks, and adds those that the attempts call for."""
    known = read_marks(catalog)
    trouble = find_trouble(attempts, known)
    fresh = due(trouble, limit, max((attempt.epoch for attempt in attempts), default=0))
    return Review(tuple(attempts), add_marks(catalog, known, fresh), trouble, tuple(fresh))


def describe(mark: Mark) -> dict[str, Any]:
    """The fields of a `quarantined` event."""
    return {"step": mark.step, "epoch": mark.epoch, "attempts": list(mark.attempts), "reason": mark.reason}
