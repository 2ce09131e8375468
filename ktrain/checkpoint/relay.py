"""The way of events from a worker over its keeper to the head (ADR 0046).

Invariant: who said or took an event has it until the log has it, so any process on the way may die and be replaced.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ktrain.base import ids
from ktrain.base.clock import Clock
from ktrain.base.events import Event, make
from ktrain.base.faults import FaultPoints

_MOST_EVENTS = 100_000  # of one process: a head that is away for ever must not fill its memory
_MOST_OF_WORKERS = 90_000  # an agent's own words find room beside them
_EVENTS_PER_BEAT = 500

T = TypeVar("T")


class Outbox(Generic[T]):
    """What one stream has said and the log has not got yet, oldest first. Not thread-safe.

    Attributes:
        num_said: how many were said; the next one's number.
        num_taken: how many of them the receiver has, from the first on; less again when it was replaced.
        num_logged: how many of them the log has.
        num_lost: said over the bound since `take_lost` was last called.
    """

    def __init__(self, limit: int = _MOST_EVENTS) -> None:
        self._kept: list[T] = []  # numbers from num_logged on
        self._limit = limit
        self.num_said = 0
        self.num_taken = 0
        self.num_logged = 0
        self.num_lost = 0

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, item: T) -> bool:
        """Keeps one more; false where it is lost, because there is no room."""
        if len(self._kept) >= self._limit:
            self.num_lost += 1
            return False
        self._kept.append(item)
        self.num_said += 1
        return True

    def batch(self, most: int) -> list[T]:
        """What the receiver has not got yet, at most so many; they begin with number `num_taken`."""
        begin = self.num_taken - self.num_logged
        return self._kept[begin : begin + most]

    def settle(self, taken: int, logged: int) -> tuple[list[T], list[T]]:
        """Takes the receiver's word on how many it and the log have; returns what each has got since the last word."""
        before, begin = self.num_taken, self.num_logged
        logged = min(max(logged, begin), self.num_said)
        self.num_taken = min(max(taken, logged), self.num_said)
        newly_taken = self._kept[max(before, begin) - begin : self.num_taken - begin]
        newly_logged = self._kept[: logged - begin]
        del self._kept[: logged - begin]
        self.num_logged = logged
        return newly_taken, newly_logged

    def take_lost(self) -> int:
        """How many were lost, once, as soon as there is room to say it."""
        if not self.num_lost or len(self._kept) >= self._limit:
            return 0
        lost, self.num_lost = self.num_lost, 0
        return lost


class Inbox:
    """How far a receiver has come in one stream. Not thread-safe.

    Attributes:
        taken: how many of the stream are here or have been, from the first on.
    """

    def __init__(self) -> None:
        self.taken = 0

    def fresh(self, said: Mapping[str, Any], room: int) -> list[tuple[int, Any]]:
        """(number, event) of a message that are new here, at most `room`; none where some in front of them are missing.

        What is in the log already need not come here any more.
        """
        self.taken = max(self.taken, int(said["events_logged"]))
        begin = int(said["events_from"])
        if begin > self.taken:
            return []
        number = self.taken
        found = list(enumerate(said["events"], start=begin))[number - begin : number - begin + max(0, room)]
        self.taken += len(found)
        return found


@dataclass(slots=True)
class _Stream:
    """What a keeper knows of one worker's events.

    Attributes:
        epoch: that the worker belongs to.
        inbox: how far this keeper has come.
        heard: how many a head has been given.
        logged: how many the log has.
    """

    epoch: int
    inbox: Inbox
    heard: int = 0
    logged: int = 0


class Relay:
    """A keeper's part of the way: takes workers' events, adds its own, keeps all until logged. Safe from any thread.

    Workers' events beyond the bound are not taken and stay with them; the keeper's own are lost, which a `notice` says.
    """

    def __init__(self, member: str, clock: Clock) -> None:
        self._member = member
        self._clock = clock
        self._own = f"{member}/{ids.random_id()}"
        self._lock = threading.Lock()  # guards everything below
        self._num_own = 0
        self._outbox: Outbox[Event] = Outbox()
        self._streams: dict[str, _Stream] = {}  # by name
        self._faults = FaultPoints([], epoch=0)

    def begin(self, epoch: int) -> None:
        """A new epoch: workers of older ones are fenced, and are not told any more what became of their events."""
        with self._lock:
            self._streams = {name: stream for name, stream in self._streams.items() if stream.epoch >= epoch}
            self._faults = FaultPoints.from_environment(epoch)

    def emit(self, kind: str, epoch: int, **fields: Any) -> None:
        """An event of the keeper itself."""
        with self._lock:
            self._add_own(make(kind, epoch, clock=self._clock, **fields))

    def _add_own(self, event: Event) -> None:
        if self._outbox.add(event.with_origin(self._own, self._num_own)):
            self._num_own += 1

    def take(self, said: Mapping[str, Any]) -> dict[str, int]:
        """Takes the events of a pulse that are new: a pulse whose answer was lost comes again.

        Returns what the worker is to know of its events: how many are here, with a head, and in the log.
        """
        with self._lock:
            name = f"rank-{said['rank']}/{said['epoch']}/{said['instance']}"
            stream = self._streams.setdefault(name, _Stream(int(said["epoch"]), Inbox()))
            stream.logged = max(stream.logged, int(said["events_logged"]))
            stream.heard = max(stream.heard, stream.logged)
            taken = stream.inbox.fresh(said, _MOST_OF_WORKERS - len(self._outbox))
            for number, value in taken:
                self._outbox.add(Event.from_json(value).with_origin(name, number))
            if taken:
                self._faults.reached("events.taken", step=taken[-1][1].get("step"), rank=int(said["rank"]))
            return {"events_taken": stream.inbox.taken, "events_heard": stream.heard, "events_logged": stream.logged}

    def message(self) -> dict[str, Any]:
        """What the next beat tells the head."""
        with self._lock:
            batch = self._outbox.batch(_EVENTS_PER_BEAT)
            about = {"events_from": self._outbox.num_taken, "events_logged": self._outbox.num_logged}
        return {**about, "events": [event.to_json() for event in batch]}

    def settle(self, answer: Mapping[str, Any]) -> None:
        """Takes the head's word on how many it has, and how many are logged."""
        with self._lock:
            heard, logged = self._outbox.settle(int(answer["events_taken"]), int(answer["events_logged"]))
            for name, count in newest_numbers(heard).items():
                if (stream := self._streams.get(name)) is not None:
                    stream.heard = max(stream.heard, count)
            for name, count in newest_numbers(logged).items():
                if (stream := self._streams.get(name)) is not None:
                    stream.logged = max(stream.logged, count)
            if lost := self._outbox.take_lost():
                message = f"{self._member}: {lost} of its own events were lost while the head was away"
                self._add_own(make("notice", clock=self._clock, message=message))


def newest_numbers(events: Sequence[Event]) -> dict[str, int]:
    """Stream -> how many of its events a log has."""
    found: dict[str, int] = {}
    for event in events:
        if event.origin is not None:
            found[event.origin[0]] = max(found.get(event.origin[0], 0), event.origin[1] + 1)
    return found
