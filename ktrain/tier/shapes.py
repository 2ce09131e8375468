"""In one request or in parts: which of both a store takes faster is found out by sending.

A store far away gives one connection a fraction of its rate, so parts side by side win. A server near by, or a gateway
to files, often joins the parts afterwards, and one request wins.
"""

from __future__ import annotations

import threading
from enum import Enum

_LOOKS_AGAIN = 16  # payloads between two looks at the other way
_WEIGHT = 0.5  # of the newest payload, which meets the neighbours of now


class Shape(Enum):
    """How a payload is sent."""

    PARTS = "parts"  # side by side, each sent again by itself
    ONE = "one"  # as one request


class Shapes:
    """What is known of one store. Safe from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rates: dict[Shape, float] = {}  # bytes per second; guarded by _lock
        self._num_chosen = 0  # guarded by _lock

    def choose(self) -> Shape:
        """How the next payload is sent: parts first, then one request, then the faster; at times the other again."""
        with self._lock:
            self._num_chosen += 1
            for shape in Shape:
                if shape not in self._rates:
                    return shape
            fastest, other = sorted(Shape, key=lambda shape: -self._rates[shape])
            again = self._num_chosen % _LOOKS_AGAIN == 0 and self._rates[other] > 0
            return other if again else fastest

    def took(self, shape: Shape, nbytes: int, seconds: float) -> None:
        """A payload was sent in this way."""
        rate = nbytes / max(seconds, 1e-9)
        with self._lock:
            before = self._rates.get(shape) or rate
            self._rates[shape] = before + _WEIGHT * (rate - before)

    def failed(self, shape: Shape) -> None:
        """The store does not take it: it is not tried again."""
        with self._lock:
            self._rates[shape] = 0.0
