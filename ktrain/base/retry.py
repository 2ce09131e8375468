"""When to ask again, how long to wait before, and how often in all.

Invariant: retries never multiply load. All calls of one piece of work draw on one budget, which allows some retries at
first and then one for so many successes; and nothing below may retry on its own (ADR 0013).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import TypeVar

from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.errors import UnavailableError

_T = TypeVar("_T")
_BASE_S = 0.1
_CAP_S = 20.0


class BusyError(UnavailableError):
    """The other side could not answer now, and may in a moment: throttled, failing, restarting, cut off.

    Attributes:
        retry_after_s: what it asked for; 0 where it asked for nothing.
        answered: the other side said so itself; else the connection broke.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0, answered: bool = False) -> None:
        super().__init__(message, retry_after_s, answered)
        self.retry_after_s = retry_after_s
        self.answered = answered

    def __str__(self) -> str:
        return str(self.args[0])


class RetryBudget:
    """Retries that the calls of one piece of work may make together. Safe from any thread.

    Where n calls succeed there are at most `initial + n / successes_per_retry` retries, however many threads make them.
    """

    def __init__(self, *, initial: int = 10, successes_per_retry: int = 10) -> None:
        self._price = successes_per_retry
        self._limit = initial * successes_per_retry
        self._left = self._limit  # in successes; guarded by _lock
        self._lock = threading.Lock()

    def try_take(self) -> bool:
        """Takes one retry; false when none is left."""
        with self._lock:
            if self._left < self._price:
                return False
            self._left -= self._price
            return True

    def earn(self) -> None:
        """Notes a success."""
        with self._lock:
            self._left = min(self._limit, self._left + 1)


class Retries:
    """Tries calls that meet a busy other side again: exponential pauses with full jitter, under a shared budget.

    Full jitter spreads clients that failed at the same moment over the whole pause (M. Brooker, "Exponential Backoff
    And Jitter", AWS Architecture Blog, 2015). Safe from any thread.
    """

    def __init__(
        self,
        budget: RetryBudget,
        *,
        max_tries: int,
        clock: Clock = SYSTEM_CLOCK,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._budget = budget
        self._max_tries = max_tries
        self._clock = clock
        self._draw = draw  # from [0, 1)

    def run(self, work: Callable[[], _T], *, deadline: Deadline) -> _T:
        """What `work` returns; a BusyError of it is retried while tries, budget and deadline allow."""
        num_failures = 0
        while True:
            try:
                result = work()
            except BusyError as error:
                num_failures += 1
                pause_s = max(error.retry_after_s, self._draw() * min(_CAP_S, _BASE_S * 2.0 ** (num_failures - 1)))
                if num_failures >= self._max_tries or pause_s >= deadline.remaining_s() or not self._budget.try_take():
                    raise
                self._clock.sleep(pause_s)
            else:
                self._budget.earn()
                return result
