"""A rate that many threads keep together."""

from __future__ import annotations

import threading

from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.errors import DeadlineError

_BURST_S = 0.25


class Pace:
    """Lets bytes pass at `bytes_per_s` on average, after a burst of a quarter of a second; None lets all pass.

    A token bucket, kept as the time at which it will be full (the virtual scheduling form of ITU-T I.371). Who comes
    first passes first, so a small object waits behind the parts before it and no longer. Safe from any thread.
    """

    def __init__(self, bytes_per_s: float | None, clock: Clock = SYSTEM_CLOCK) -> None:
        assert bytes_per_s is None or bytes_per_s > 0, bytes_per_s
        self.bytes_per_s = bytes_per_s
        self._clock = clock
        self._full_at_s = 0.0  # guarded by _lock
        self._lock = threading.Lock()

    def take(self, nbytes: int, *, deadline: Deadline) -> None:
        """Returns when these bytes may go.

        Raises:
            DeadlineError: they may not before the deadline; nothing was taken.
        """
        if self.bytes_per_s is None:
            return
        with self._lock:
            now_s = self._clock.monotonic()
            full_at_s = max(now_s, self._full_at_s)
            wait_s = full_at_s - now_s - _BURST_S
            if wait_s > deadline.remaining_s():
                raise DeadlineError(
                    f"pace: {nbytes} bytes may go in {wait_s:.1f} s at {self.bytes_per_s:g} bytes per second, "
                    f"{deadline.remaining_s():.1f} s of {deadline.total_s:g} s are left"
                )
            self._full_at_s = full_at_s + nbytes / self.bytes_per_s
        if wait_s > 0:
            self._clock.sleep(wait_s)
