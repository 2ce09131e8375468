"""Faults that a test puts between a client and the server: refusals, lost replies, closed connections."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field

from ktrain.testing.fake_cluster.requests import Request, Response
from ktrain.testing.fake_cluster.status import Refusal

_REASONS: Mapping[int, tuple[str, str]] = {
    429: ("TooManyRequests", "the server has received too many requests and has asked us to try again later"),
    500: ("InternalError", "Internal error occurred"),
    503: ("ServiceUnavailable", "the server is currently unable to handle the request"),
    504: ("Timeout", "the server was unable to return a response in the time allotted"),
}


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to the next `times` requests of this method whose path contains the text.

    With a status, it is the answer; without one the connection is closed. `performed` says that the request is done
    before: its answer is lost.
    """

    status: int | None = 429
    method: str | None = None
    path: str = ""
    times: int = 1
    retry_after_s: int | None = None
    performed: bool = False
    message: str | None = None  # in the place of the server's usual words

    def matches(self, request: Request) -> bool:
        return self.method in (None, request.method) and self.path in request.path

    def response(self) -> Response | None:
        if self.status is None:
            return None
        reason, usual = _REASONS.get(self.status, ("", "injected"))
        message = usual if self.message is None else self.message
        details = {} if self.retry_after_s is None else {"retryAfterSeconds": self.retry_after_s}
        headers = {} if self.retry_after_s is None else {"Retry-After": str(self.retry_after_s)}
        refusal = Refusal(self.status, message, reason, details, headers)
        return Response(refusal.code, refusal.body(), refusal.headers)


@dataclass(slots=True)
class Faults:
    """The faults that are due, in the order in which they were put. Safe from any thread."""

    _due: list[tuple[Fault, int]] = field(default_factory=list)  # with the times left; guarded by _lock
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def put(self, fault: Fault) -> None:
        with self._lock:
            self._due.append((fault, fault.times))

    def take(self, request: Request) -> Fault | None:
        """The fault that befalls a request, if any."""
        with self._lock:
            for i, (fault, left) in enumerate(self._due):
                if fault.matches(request):
                    self._due[i : i + 1] = [(fault, left - 1)] if left > 1 else []
                    return fault
        return None

    def clear(self) -> None:
        with self._lock:
            self._due.clear()
