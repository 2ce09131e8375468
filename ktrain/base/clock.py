"""The only sleeper and the only reader of time.

Deadlines use the monotonic clock of this process; wall time is only ever written to events, never compared
between hosts.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Protocol

from ktrain.errors import DeadlineError


class Clock(Protocol):
    """Source of time; `ktrain.testing.FakeClock` stands in for it in tests."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back; only differences mean anything."""

    def wall(self) -> float:
        """Seconds since the epoch, UTC; for people and logs."""

    def sleep(self, seconds: float) -> None:
        """Blocks the calling thread."""

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        """Waits for the event; true if it was set within `timeout_s`."""


class SystemClock:
    """The real time of this machine."""

    def monotonic(self) -> float:
        return time.monotonic()

    def wall(self) -> float:
        return time.time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        return event.wait(timeout_s)


SYSTEM_CLOCK = SystemClock()


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time by which something must have happened, and the words to say when it has not."""

    at_s: float
    total_s: float
    clock: Clock = SYSTEM_CLOCK

    @classmethod
    def after(cls, seconds: float, clock: Clock = SYSTEM_CLOCK) -> Deadline:
        return cls(at_s=clock.monotonic() + seconds, total_s=seconds, clock=clock)

    def remaining_s(self) -> float:
        """Seconds left, never below zero."""
        return max(0.0, self.at_s - self.clock.monotonic())

    def expired(self) -> bool:
        return self.remaining_s() <= 0.0

    def check(self, what: str) -> None:
        """Raises DeadlineError once the time is over; `what` names the thing that is late."""
        if self.expired():
            raise DeadlineError(f"{what}: not done within {self.total_s:g} s")

    def sooner(self, seconds: float) -> Deadline:
        """The earlier of this deadline and `seconds` from now."""
        at = self.clock.monotonic() + seconds
        return self if self.at_s <= at else Deadline(at, seconds, self.clock)
