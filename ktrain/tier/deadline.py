"""Blocking calls that their caller leaves at its deadline.

Some clients of some stores never return: s3fs waits more than 60 s for a stopped server whatever its own
timeouts say (2026-11-23), and a hung network disk blocks in the kernel, where no signal helps. So each call
runs on a daemon thread that no other call uses meanwhile, and the caller waits for it no longer than its deadline
says. Threads are used again: to start one took 0.3 ms on a virtual machine, eight times a read of 1 MiB (2026-11-27).
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.errors import DeadlineError, UnavailableError

_LOG = logging.getLogger(__name__)
_IDLE_S = 10.0  # a thread without a call ends after that
_NAME = "ktrain-tier"
_T = TypeVar("_T")


class Call:
    """One call, seen from the thread that works on it."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.done = threading.Event()
        self.given_up = False  # set once, by the caller that left
        self.handing = threading.Lock()
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

    @contextmanager
    def hands_over(self) -> Iterator[None]:
        """A block that writes to memory of the caller, who does not leave in the middle of it.

        It must be short and wait for nothing: the deadline does not end it.

        Raises:
            DeadlineError: the caller has left already.
        """
        with self.handing:
            self.check()
            yield


_Inbox = queue.SimpleQueue[tuple[Call, Callable[[Call], Any]] | None]
"""Of one thread; None ends it."""


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
        self._idle: list[_Inbox] = []  # of threads without a call, the one used last at the end; guarded by _changed
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
        try:
            inbox = self._take_thread()
        except RuntimeError as error:  # no more threads in this process
            self._forget(call)
            raise UnavailableError(f"{what}: no thread could be started: {error}") from error
        inbox.put((call, work))
        returned = False
        try:
            # Real work takes real time, also where a test's clock counts the deadline.
            returned = SYSTEM_CLOCK.wait(call.done, deadline.remaining_s())
        finally:  # also when the wait itself is interrupted
            if not returned:
                with self._changed:
                    call.given_up, call.error = True, None
                with call.handing:  # what is handed over now is not cut off; nothing will be from here on
                    pass
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
        """Refuses further calls and ends idle threads; calls in progress go on. Idempotent."""
        with self._changed:
            self._closed = True
            idle, self._idle = self._idle, []
            self._changed.notify_all()
        for inbox in idle:
            inbox.put(None)

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

    def _take_thread(self) -> _Inbox:
        with self._changed:
            if self._idle:
                return self._idle.pop()
        inbox: _Inbox = queue.SimpleQueue()
        threading.Thread(target=self._serve, args=(inbox,), name=_NAME, daemon=True).start()
        return inbox

    def _serve(self, inbox: _Inbox) -> None:
        """A thread's life: one call after the other, until none comes for a while."""
        thread = threading.current_thread()
        while True:
            try:
                item = inbox.get(timeout=_IDLE_S)
            except queue.Empty:
                with self._changed:
                    if inbox in self._idle:
                        self._idle.remove(inbox)
                        return
                continue  # taken a moment ago: its call is on the way
            if item is None:
                return
            thread.name = f"{_NAME}: {item[0].what}"
            stays = self._work(inbox, *item)
            del item  # the caller's buffer is in it
            if not stays:
                return
            thread.name = _NAME

    def _work(self, inbox: _Inbox, call: Call, work: Callable[[Call], Any]) -> bool:
        """Does one call; false where no other will come."""
        try:
            call.result = work(call)
        except BaseException as error:  # noqa: BLE001 -- top of a thread: the caller gets whatever happened
            with self._changed:
                if not call.given_up:  # else nobody asks, and the error would hold the buffer: it knows this frame
                    call.error = error
            if call.given_up:
                _LOG.debug("%s: ended after it was given up: %s", call.what, error)
        with self._changed:
            stays = not self._closed
            if stays:
                self._idle.append(inbox)
            self._running.discard(call)
            self._changed.notify()
        call.done.set()
        return stays

    def _forget(self, call: Call) -> None:
        with self._changed:
            self._running.discard(call)
            self._changed.notify()
