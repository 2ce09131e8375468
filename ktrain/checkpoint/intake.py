"""The head's end of the way of events: into the run's log, each once, however often it is brought (ADR 0046)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ktrain.base.events import Event
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.log import EventLog

_MOST_WAITING = 5_000  # events that the log could not write yet, with which the head takes no more from the keepers
_MOST_STREAMS = 100_000  # of which the head remembers the number; those that said nothing for longest are forgotten


@dataclass(slots=True)
class Written:
    """How many of a keeper's events the log has, as far as they have been taken. Not thread-safe.

    Attributes:
        num: how many are written, from the first on.
    """

    num: int = 0
    _waiting: deque[tuple[int, int]] = field(default_factory=deque)  # (number, of the log's own), oldest first

    def note(self, number: int, num_emitted: int) -> None:
        """The first `number` events are written once the log has written `num_emitted`."""
        if number > (self._waiting[-1][0] if self._waiting else self.num):
            self._waiting.append((number, num_emitted))

    def look(self, num_written: int) -> int:
        """How many are written, now that the log has written so many."""
        while self._waiting and self._waiting[0][1] <= num_written:
            self.num = self._waiting.popleft()[0]
        return self.num


class Intake:
    """Puts events into the log. Not thread-safe, but for `emit`; the coordinator holds the lock."""

    def __init__(self, log: EventLog, known: Mapping[str, int] | None = None) -> None:
        """Writes to `log`, which has so many events of each stream in `known` already."""
        self._log = log
        self._counts = dict(known or {})

    def emit(self, event: Event) -> None:
        """Logs an event of the head itself. Safe from any thread."""
        self._log.emit(event)

    @property
    def room(self) -> int:
        """How many events may be taken now."""
        return max(0, _MOST_WAITING - self._log.num_waiting())

    def take(self, events: Iterable[Event], faults: FaultPoints) -> list[Event]:
        """Logs those that the log has not got yet, and returns them."""
        fresh = [event for event in events if self._is_new(event)]
        for event in fresh:
            self._log.emit(event)
            faults.reached("events.logged", step=event.fields.get("step"), rank=event.fields.get("rank"))
        return fresh

    def _is_new(self, event: Event) -> bool:
        if event.origin is None:
            return True
        name, number = event.origin
        count = self._counts.pop(name, 0)
        self._counts[name] = max(count, number + 1)
        if len(self._counts) > _MOST_STREAMS:
            del self._counts[next(iter(self._counts))]
        return number >= count

    def note(self, written: Written, number: int) -> None:
        """A keeper's first `number` events have been taken."""
        written.note(number, self._log.num_emitted)

    def num_written(self, written: Written) -> int:
        """How many of a keeper's events the log has."""
        return written.look(self._log.num_emitted - self._log.num_waiting())
