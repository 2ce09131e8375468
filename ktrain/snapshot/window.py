"""The time in which training must leave alone what is being copied. One thread copies, another trains."""

from __future__ import annotations

import threading

from ktrain.base.clock import Clock, Deadline


class Window:
    """Opened when it is made; closed by the copier, or given up by who waits for it too long.

    Only a window that the copier closed with None lets its snapshot be sealed: then nothing was changed while it was
    open, as far as can be seen.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._over = threading.Event()
        self._lock = threading.Lock()  # guards the fields below
        self._outcome: list[str | None] = []  # one entry once it is over
        self._waits_since: float | None = None
        self._waited_s = 0.0

    @property
    def is_over(self) -> bool:
        return self._over.is_set()

    @property
    def waited_s(self) -> float:
        """Seconds that training stood waiting, up to now or to the end of the window."""
        with self._lock:
            since = self._waits_since
            return self._waited_s + (0.0 if since is None or self._outcome else self._clock.monotonic() - since)

    def close(self, problem: str | None) -> str | None:
        """Ends the window, unless it is over; returns why the copy must not be used, None where it is good."""
        with self._lock:
            if not self._outcome:
                self._outcome.append(problem)
                if self._waits_since is not None:
                    self._waited_s += self._clock.monotonic() - self._waits_since
            self._over.set()
            return self._outcome[0]

    def wait(self, deadline: Deadline) -> bool:
        """Returns when training may go on: true where the copy is good, false where it was given up.

        It is given up here when the deadline is over.
        """
        if self._over.is_set():
            return self._outcome == [None]
        with self._lock:
            self._waits_since = self._clock.monotonic()
        if not self._clock.wait(self._over, deadline.remaining_s()):
            self.close(f"the copy was not made within {deadline.total_s:g} s, and training went on")
        with self._lock:
            self._waits_since = None
            return self._outcome == [None]
