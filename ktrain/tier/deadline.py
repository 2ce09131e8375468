"""Blocking calls that their caller leaves at its deadline.

Some clients of some stores never return: s3fs waits more than 60 s for a stopped server whatever its own
timeouts say (2026-11-23), and a hung network disk blocks in the kernel, where no signal helps. So each call
runs on a daemon thread of its own (about 0.1 ms), and the caller waits for it no longer
than its deadline says.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.errors import DeadlineError, UnavailableError

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")


class Call:
    """One call, seen from the thread that works on it."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = threading.Event()
        self.given_up = False  # set once, by the caller that left
        self.result: Any = None
        self.error: BaseException | None = None

    def check(self) -> None:
        """Ends work whose caller has gone: ask it between pieces and before bytes become visible.

        The caller may change its buffer after it has gone, so what is read from then on must never be shown.

        Raises:
            DeadlineError: nobody waits for this call any more.
        """
        if self.given_up:
            raise DeadlineError(f"{self.what}: given up by its caller")


class BoundedCalls:
    """Runs calls side by side under deadlines; safe from any thread.

    At most `limit` threads work at a time, further callers wait for a place until their own deadline.
    When `late_limit` calls have been given up and still have not returned, new ones are refused: threads must
    not pile up behind a store that hangs.
    """

    def __init__(self, *, limit: int = 32, late_limit: int = 16) -> None:
        self._limit = limit
        self._late_limit = late_limit
        self._changed = threading.Condition()
        self._running: set[Call] = set()  # guarded by _changed
        self._closed = False  # guarded by _changed

    def run(self, what: str, work: Callable[[Call], _T], *, deadline: Deadline) -> _T:
        """Returns what `work` returns, or raises what it raises, before the deadline.

        Raises:
            DeadlineError: it did not return in time; its thread is left behind, `Call.check` tells it to end.
            UnavailableError: too many earlier calls hang, or this object is closed.
        """
        deadline.check(what)
        call = Call(what)
        self._admit(call, deadline)
        thread = threading.Thread(target=self._work, args=(call, work), name=f"ktrain-tier: {what}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:  # no more threads in this process
            self._forget(call)
            raise UnavailableError(f"{what}: no thread could be started: {error}") from error
        returned = False
        try:
            # Real work takes real time, also where a test's clock counts the deadline.
            returned = SYSTEM_CLOCK.wait(call.done, deadline.remaining_s())
        finally:  # also when the wait itself is interrupted
            if not returned:
                with self._changed:
                    call.given_up, call.error = True, None
        if not returned:
            _LOG.warning("%s: not done within %g s, left behind", what, deadline.total_s)
            raise DeadlineError(
                f"{what}: no answer within {deadline.total_s:g} s; the outcome is unknown: look or retry"
            )
        if call.error is not None:
            # The error must not be reachable from the frames that it knows: such a cycle would keep the caller's
            # buffer, perhaps a leased slot, until the garbage collector comes by.
            failure, call.error = call.error, None
            try:
                raise failure
            finally:
                del failure
        result: _T = call.result
        return result

    def late(self) -> list[str]:
        """The calls that were given up and have not returned yet, for people."""
        with self._changed:
            return sorted(call.what for call in self._running if call.given_up)

    def close(self) -> None:
        """Refuses further calls; those in progress go on."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _admit(self, call: Call, deadline: Deadline) -> None:
        with self._changed:
            while True:
                if self._closed:
                    raise UnavailableError(f"{call.what}: the tier is closed")
                late = sorted(other.what for other in self._running if other.given_up)
                if len(late) >= self._late_limit:
                    raise UnavailableError(
                        f"{call.what}: {len(late)} earlier calls still hang (first: {late[0]}); check the store"
                    )
                if len(self._running) < self._limit:
                    self._running.add(call)
                    return
                if not self._changed.wait(deadline.remaining_s()):
                    raise DeadlineError(
                        f"{call.what}: {self._limit} calls were in progress for {deadline.total_s:g} s; retry later"
                    )

    def _work(self, call: Call, work: Callable[[Call], Any]) -> None:
        try:
            call.result = work(call)
        except BaseException as error:  # noqa: BLE001 -- top of a thread: the caller gets whatever happened
            with self._changed:
                if not call.given_up:  # else nobody asks, and the error would hold the buffer: it knows this frame
                    call.error = error
            if call.given_up:
                _LOG.debug("%s: ended after it was given up: %s", call.what, error)
        finally:
            self._forget(call)
            call.done.set()

    def _forget(self, call: Call) -> None:
        with self._changed:
            self._running.discard(call)
            self._changed.notify()
