"""Clocks for tests: time that moves only when somebody says so."""

from __future__ import annotations

import threading

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.errors import DeadlineError

_START_S = 1_000.0
_WALL_AHEAD_S = 1_700_000_000.0


class FakeClock:
    """A clock that moves itself: whoever sleeps or waits moves the time on at once and never blocks.

    For code of one thread, and for threads that do not wait for one another. Safe from any thread. A wait
    for an event that another real thread is about to set returns false without giving it a chance; use
    `SteppedClock` for these.
    """

    def __init__(self, start_s: float = _START_S) -> None:
        self._now_s = start_s  # guarded by _lock
        self._wall_ahead_s = _WALL_AHEAD_S  # guarded by _lock
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        with self._lock:
            return self._now_s

    def wall(self) -> float:
        with self._lock:
            return self._now_s + self._wall_ahead_s

    def sleep(self, seconds: float) -> None:
        self.advance(seconds)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        if event.is_set():
            return True
        self.advance(timeout_s)
        return event.is_set()

    def advance(self, seconds: float) -> None:
        """Moves the time on."""
        assert seconds >= 0, seconds
        with self._lock:
            self._now_s += seconds

    def jump_wall(self, seconds: float) -> None:
        """Sets the wall clock forward or back, as an administrator or a time server does; monotonic time goes on."""
        with self._lock:
            self._wall_ahead_s += seconds


class SteppedClock:
    """A clock that stands still until the test calls `advance`; sleepers and waiters block until then.

    Make a thread, `wait_for_sleepers(1)`, look, `advance(seconds)`: the thread goes on. Safe from any thread.
    """

    def __init__(self, start_s: float = _START_S) -> None:
        self._now_s = start_s  # guarded by _moved
        self._num_sleepers = 0  # guarded by _moved
        self._moved = threading.Condition()

    def monotonic(self) -> float:
        with self._moved:
            return self._now_s

    def wall(self) -> float:
        return self.monotonic() + _WALL_AHEAD_S

    def sleep(self, seconds: float) -> None:
        self.wait(threading.Event(), seconds)

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        with self._moved:
            until_s = self._now_s + timeout_s
            self._num_sleepers += 1
            self._moved.notify_all()
            try:
                # An event does not tell this clock that it was set, so it is looked at in short turns of real
                # time.
                while not event.is_set() and self._now_s < until_s:
                    self._moved.wait(0.002)
            finally:
                self._num_sleepers -= 1
            return event.is_set()

    def advance(self, seconds: float) -> None:
        """Moves the time on and wakes whoever waited for it."""
        assert seconds >= 0, seconds
        with self._moved:
            self._now_s += seconds
            self._moved.notify_all()

    def wait_for_sleepers(self, count: int, *, real_timeout_s: float = 10.0) -> None:
        """Returns once at least `count` threads sleep or wait on this clock.

        Raises:
            DeadlineError: they do not within `real_timeout_s` of real time.
        """
        limit = Deadline.after(real_timeout_s, SYSTEM_CLOCK)
        with self._moved:
            while self._num_sleepers < count:
                if limit.expired():
                    raise DeadlineError(
                        f"stepped clock: expected {count} sleepers within {real_timeout_s:g} s, found"
                        f" {self._num_sleepers}"
                    )
                self._moved.wait(limit.remaining_s())
