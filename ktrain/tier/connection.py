"""A filesystem object of fsspec with an event loop of its own, so that one that hangs takes no other with it."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Callable
from typing import Any

from ktrain.errors import UnavailableError

_LOG = logging.getLogger(__name__)
_CLOSE_S = 1.0
_CANCEL_S = 0.05


class Connection:
    """A filesystem object with an event loop of its own, so that it can be ended without hurting another."""

    def __init__(self, new: Callable[[asyncio.AbstractEventLoop | None], Any], *, is_async: bool) -> None:
        self._new = new
        self._is_async = is_async
        self._loop: asyncio.AbstractEventLoop | None = None  # guarded by _lock
        self._closed = False  # guarded by _lock
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self.free = threading.Event()  # no call's thread is using the object
        self.free.set()

    def filesystem(self) -> Any:
        """The object, made at its first use: that may take a while, so it happens on the call's thread."""
        with self._lock:
            if self._closed:
                raise UnavailableError("the connection is closed")
            if self._is_async and self._loop is None:
                self._loop = asyncio.new_event_loop()
                turn = threading.Thread(target=self._turn, args=(self._loop,), name="ktrain-tier-loop", daemon=True)
                turn.start()
        if self._filesystem is None:
            self._filesystem = self._new(self._loop)
        return self._filesystem

    def close(self) -> None:
        """Cancels what still runs and ends the loop; returns at once. A thread that waits for it wakes up."""
        with self._lock:
            if self._loop is not None and not self._closed:
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._closed = True

    def _turn(self, loop: asyncio.AbstractEventLoop) -> None:
        asyncio.set_event_loop(loop)
        loop.run_forever()  # until close()
        try:
            loop.run_until_complete(self._cancel_until_free())
            client = getattr(self._filesystem, "_s3", None)
            if client is not None:
                loop.run_until_complete(asyncio.wait_for(client.close(), _CLOSE_S))
        except Exception:  # noqa: BLE001 -- top of a thread; the process's end closes what is left open
            _LOG.debug("a connection was not closed in order", exc_info=True)
        finally:
            self._filesystem = None
            loop.close()

    async def _cancel_until_free(self) -> None:
        """Cancels also what begins late: a call that was still making the object would wait for ever otherwise."""
        await _cancel_all()
        while not self.free.is_set():
            await asyncio.sleep(_CANCEL_S)
            await _cancel_all()


async def _cancel_all() -> None:
    """Cancels what has begun: a task cancelled before it began runs no `finally`, so it never wakes its thread."""
    tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and _has_begun(task)]
    for task in tasks:
        task.cancel()
    if tasks:
        await asyncio.wait(tasks, timeout=_CLOSE_S)


def _has_begun(task: asyncio.Task[Any]) -> bool:
    coroutine = task.get_coro()
    return not inspect.iscoroutine(coroutine) or inspect.getcoroutinestate(coroutine) != inspect.CORO_CREATED
