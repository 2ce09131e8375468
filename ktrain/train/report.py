"""What happened to a run, from its events alone: one row per attempt, and totals. Imports no torch.

Times are those of the events: they are written by several processes, so differences below a clock's error
mean nothing. A step is useful when no later attempt went back before it; the useful share is the time of
the useful steps over the time in which somebody ran the run (a pause after an orderly end counts for
nobody).
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby, pairwise
from typing import Any

from ktrain.base.events import Event

_FAULT_KINDS = frozenset({"fault_injected", "failure", "worker_exit", "hang", "node_lost"})
_RUN_KINDS = frozenset({"run_started", "run_ended"})
_ORDERLY = ("succeeded", "stopped")
_COLUMNS = (
    "attempt",
    "restored from",
    "at step",
    "steps lost",
    "back after",
    "steps done",
    "useful",
    "ended",
)


@dataclass(frozen=True, slots=True)
class AttemptRow:
    """One attempt. `None` means that the events do not say."""

    number: int
    restored_tier: str | None  # None: it began at step 0, or never got so far
    restored_step: int | None
    steps_lost: int  # steps that earlier attempts had done and that were done again, or have to be
    recovery_s: float | None  # from the failure before it to its first step
    last_step: int | None
    num_steps: int
    useful_share: float  # of its own wall time
    ended: str  # "succeeded", "stopped", "running", or what failed


@dataclass(frozen=True, slots=True)
class Report:
    """A run in numbers; prints as a table, and shows itself in a notebook."""

    attempts: tuple[AttemptRow, ...]
    outcome: str  # "succeeded", "stopped", "failed", "running"
    step: int  # the newest step on the line
    loss: float | None  # of that step
    wall_s: float
    useful_share: float
    steps_lost: int
    num_failures: int
    wire_nbytes: int  # bytes of snapshots that crossed the transport between nodes, both ways

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Report:
        """The report of an event log; its order does not matter."""
        ordered = sorted(events, key=lambda event: event.time)
        stories = _stories(ordered)
        outcome = _outcome(ordered)
        rows = []
        for index, story in enumerate(stories):
            before, after = stories[:index], stories[index + 1 :]
            still_open = not after and outcome == "running"
            rows.append(_row(story, before, after, still_open=still_open))
        kept = [pair for index, story in enumerate(stories) for pair in _kept(story, stories[index + 1 :])]
        wall_s = _wall_s(ordered)
        newest = max((event for event, _ in kept), key=lambda event: _step(event), default=None)
        loss = None if newest is None else newest.fields.get("loss")
        return cls(
            attempts=tuple(rows),
            outcome=outcome,
            step=0 if newest is None else _step(newest),
            loss=None if loss is None else float(loss),
            wall_s=wall_s,
            useful_share=_share(sum(seconds for _, seconds in kept), wall_s),
            steps_lost=sum(row.steps_lost for row in rows),
            num_failures=sum(1 for row in rows if row.ended not in (*_ORDERLY, "running")),
            wire_nbytes=sum(_wire_nbytes(event) for event in ordered),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def to_text(self) -> str:
        """The table and one line of totals, as plain text in columns."""
        table = [_COLUMNS, *(_cells(row) for row in self.attempts)]
        widths = [max(len(cells[column]) for cells in table) for column in range(len(_COLUMNS))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip() for cells in table
        ]
        lines.insert(1, "  ".join("-" * width for width in widths))
        return "\n".join([*lines, "", self._summary()])

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in _COLUMNS)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(row)) + "</tr>" for row in self.attempts
        )
        return (
            f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table><p>{html.escape(self._summary())}</p>"
        )

    def __str__(self) -> str:
        return self.to_text()

    def _summary(self) -> str:
        parts = [f"{self.outcome} at step {self.step}"]
        if self.loss is not None:
            parts.append(f"loss {self.loss:.4f}")
        parts.append(_count(len(self.attempts), "attempt"))
        parts.append(_count(self.num_failures, "failure"))
        parts.append(f"{_count(self.steps_lost, 'step')} lost")
        parts.append(f"{self.useful_share:.1%} of {self.wall_s:.1f} s useful")
        if self.wire_nbytes:
            parts.append(f"{self.wire_nbytes / 1e6:.1f} MB between nodes")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class _Story:
    """The events of one attempt, in the order of time."""

    number: int
    events: tuple[Event, ...]

    @property
    def begin(self) -> float:
        return self.events[0].time

    @property
    def end(self) -> float:
        return self.events[-1].time

    @property
    def steps(self) -> list[Event]:
        return [event for event in self.events if event.kind == "step"]

    @property
    def restored(self) -> Event | None:
        """Where it began: the last restore of the attempt."""
        return next((event for event in reversed(self.events) if event.kind in ("restored", "fresh_start")), None)

    @property
    def start_step(self) -> int | None:
        """The step it went on from; None when it never got so far."""
        event = self.restored
        if event is None:
            steps = self.steps
            return _step(steps[0]) - 1 if steps else None
        return _step(event) if event.kind == "restored" else 0

    def failed_at(self) -> float:
        """When it stopped making steps, as far as the events tell."""
        steps = self.steps
        last_step_at = steps[-1].time if steps else self.begin
        faults = [
            event.time - float(event.fields.get("silent_s", 0.0)) for event in self.events if event.kind in _FAULT_KINDS
        ]
        since = [time for time in faults if time >= last_step_at]
        return min(since) if since else max([last_step_at, *faults])


def _stories(ordered: Sequence[Event]) -> list[_Story]:
    own = [event for event in ordered if event.attempt > 0 and event.kind not in _RUN_KINDS]
    own.sort(key=lambda event: event.attempt)  # stable: within an attempt the order of time stays
    return [_Story(number, tuple(events)) for number, events in groupby(own, key=lambda event: event.attempt)]


def _row(story: _Story, before: Sequence[_Story], after: Sequence[_Story], *, still_open: bool) -> AttemptRow:
    steps, start = story.steps, story.start_step
    line = [event for index, earlier in enumerate(before) for event, _ in _kept(earlier, before[index + 1 :])]
    reached = max(map(_step, line), default=0)
    recovery_s = None
    if before and steps and _ending(before[-1], still_open=False) not in _ORDERLY:
        recovery_s = max(0.0, steps[0].time - before[-1].failed_at())
    restored = story.restored
    return AttemptRow(
        number=story.number,
        restored_tier=restored.fields.get("tier") if restored is not None and restored.kind == "restored" else None,
        restored_step=start,
        steps_lost=max(0, reached - start) if start is not None else 0,
        recovery_s=recovery_s,
        last_step=_step(steps[-1]) if steps else None,
        num_steps=len(steps),
        useful_share=_share(sum(seconds for _, seconds in _kept(story, after)), story.end - story.begin),
        ended=_ending(story, still_open=still_open),
    )


def _kept(story: _Story, after: Sequence[_Story]) -> list[tuple[Event, float]]:
    """The attempt's steps that no later attempt went back before, each with the seconds it took."""
    line = min((later.start_step for later in after if later.start_step is not None), default=None)
    restored = story.restored
    previous = restored.time if restored is not None else story.begin
    kept = []
    for event in story.steps:
        if line is None or _step(event) <= line:
            kept.append((event, max(0.0, event.time - previous)))
        previous = event.time
    return kept


def _ending(story: _Story, *, still_open: bool) -> str:
    ended = next((event for event in reversed(story.events) if event.kind == "attempt_ended"), None)
    outcome = None if ended is None else _said_outcome(ended)
    if outcome in _ORDERLY:
        return outcome
    failures = [event for event in story.events if event.kind == "failure"]
    if failures and (ended is not None or not still_open):
        return _describe(failures[-1])
    if ended is not None:
        return str(ended.fields.get("cause") or outcome)
    return "running" if still_open else "vanished without a word"


def _describe(failure: Event) -> str:
    fields = failure.fields
    where = f"rank {fields['rank']}" if fields.get("rank") is not None else fields.get("node")
    text = " of ".join(str(part) for part in (fields.get("cause", "failure"), where) if part is not None)
    reason = str(fields.get("reason") or "").strip().splitlines()
    return f"{text}: {reason[-1][:80]}" if reason else text


def _outcome(ordered: Sequence[Event]) -> str:
    """How the run stands: the end of the run, or of its newest attempt where no launcher starts another."""
    starts = [event for event in ordered if event.kind == "attempt_started"]
    alone = bool(starts) and starts[-1].fields.get("launcher") == "none"
    telling = ("run_started", "run_ended", "attempt_started", *(("attempt_ended",) if alone else ()))
    last = next((event for event in reversed(ordered) if event.kind in telling), None)
    if last is None or last.kind in ("run_started", "attempt_started"):
        return "running"
    return _said_outcome(last)


def _said_outcome(event: Event) -> str:
    return str(event.fields.get("outcome", "failed"))


def _wall_s(ordered: Sequence[Event]) -> float:
    """Seconds from the first to the last event, without the pauses between an end and the next start."""
    if not ordered:
        return 0.0
    pauses_s, ended = 0.0, False
    for earlier, later in pairwise(ordered):
        ended = earlier.kind == "run_ended" or (ended and earlier.kind != "run_started")
        if ended and later.kind == "run_started":
            pauses_s += later.time - earlier.time
    return ordered[-1].time - ordered[0].time - pauses_s


def _wire_nbytes(event: Event) -> int:
    if event.kind == "replicated":
        return int(event.fields.get("nbytes", 0))
    return int(event.fields.get("wire_bytes") or 0) if event.kind == "restored" else 0


def _step(event: Event) -> int:
    return int(event.fields["step"])


def _share(part: float, whole: float) -> float:
    return min(1.0, part / whole) if whole > 0 else 0.0


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cells(row: AttemptRow) -> tuple[str, ...]:
    return (
        str(row.number),
        row.restored_tier or "-",
        "-" if row.restored_step is None else str(row.restored_step),
        str(row.steps_lost),
        "-" if row.recovery_s is None else f"{row.recovery_s:.1f} s",
        str(row.num_steps),
        f"{row.useful_share:.0%}",
        row.ended,
    )
