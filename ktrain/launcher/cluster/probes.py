"""Startup, readiness and liveness probes: when to ask, and what the answers come to."""

from __future__ import annotations

import http.client
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any, Protocol

from ktrain.base.clock import Clock
from ktrain.launcher.cluster.processes import Process

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")  # of a container


class Attempt(Protocol):
    """One question under way."""

    def answer(self) -> bool | None:
        """None until it is known."""

    def cancel(self) -> None:
        """Gives it up."""


class Probe:
    """One probe of one run of a container; `passed` and `failed` hold what the thresholds made of the answers."""

    def __init__(
        self, spec: Mapping[str, Any], ask: Callable[[Mapping[str, Any]], Attempt], clock: Clock, *, passed: bool
    ) -> None:
        """`passed` is what holds before the first answer."""
        self.passed = passed
        self.failed = False
        self._ask = ask
        self._clock = clock
        self._spec = spec
        self._period_s = float(spec.get("periodSeconds") or 10)
        self._timeout_s = float(spec.get("timeoutSeconds") or 1)
        self._next_s = clock.monotonic() + float(spec.get("initialDelaySeconds") or 0)
        self._attempt: Attempt | None = None
        self._until_s = 0.0
        self._in_a_row = 0  # successes above zero, failures below

    def advance(self) -> None:
        """Asks when it is time, and takes the answer."""
        now = self._clock.monotonic()
        if self._attempt is not None:
            answer = self._attempt.answer()
            if answer is None and now < self._until_s:
                return
            if answer is None:
                self._attempt.cancel()
            self._attempt = None
            self._count(bool(answer))
        if now >= self._next_s:
            self._attempt = self._ask(self._spec)
            self._until_s = now + self._timeout_s
            self._next_s = max(self._next_s + self._period_s, now)

    def due_s(self) -> float:
        """When it has to be advanced next, unless an answer comes before."""
        return self._until_s if self._attempt is not None else self._next_s

    def stop(self) -> None:
        """Gives up a question under way."""
        if self._attempt is not None:
            self._attempt.cancel()
            self._attempt = None

    def _count(self, success: bool) -> None:
        if success:
            self._in_a_row = max(self._in_a_row, 0) + 1
            if self._in_a_row >= int(self._spec.get("successThreshold") or 1):
                self.passed, self.failed = True, False
            return
        self._in_a_row = min(self._in_a_row, 0) - 1
        if -self._in_a_row >= int(self._spec.get("failureThreshold") or 3):
            self.failed, self.passed = True, False


class ExecAttempt:
    """A command in the container; 0 is yes."""

    def __init__(self, process: Process) -> None:
        self._process = process

    def answer(self) -> bool | None:
        ended = self._process.ended()
        return None if ended is None else ended.exit_code == 0

    def cancel(self) -> None:
        self._process.kill()


class NetworkAttempt:
    """A connection that is tried in another thread."""

    def __init__(self, future: Future[bool]) -> None:
        self._future = future

    def answer(self) -> bool | None:
        return self._future.result() if self._future.done() and not self._future.cancelled() else None

    def cancel(self) -> None:
        self._future.cancel()


def connects(address: str, port: int, timeout_s: float) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection((address, port), timeout=timeout_s).close()
    except OSError:
        return False
    return True


def answers(address: str, port: int, path: str, timeout_s: float) -> bool:
    """Whether a GET is answered with 200 to 399."""
    connection = http.client.HTTPConnection(address, port, timeout=timeout_s)
    try:
        connection.request("GET", path)
        return 200 <= connection.getresponse().status < 400
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
