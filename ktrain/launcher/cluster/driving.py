"""A local cluster that a thread of its own drives."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from ktrain.base.clock import Deadline
from ktrain.launcher.cluster.local import LocalCluster

_T = TypeVar("_T")
_LONGEST_WAIT_S = 60.0
_END_S = 30.0


class Driver:
    """Drives a cluster until it is closed; then the cluster is closed as well. Use it in a `with`.

    What the cluster does with its nodes and pods is for its own thread: have it done with `call`. Safe from any thread.
    """

    def __init__(self, cluster: LocalCluster) -> None:
        self.cluster = cluster
        self._ending = threading.Event()
        self._asked: queue.SimpleQueue[tuple[Callable[[], Any], Future[Any]]] = queue.SimpleQueue()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._drive, name="local-cluster")

    def __enter__(self) -> Driver:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def call(self, do: Callable[[], _T], *, timeout_s: float = _END_S) -> _T:
        """Has something done in the cluster's thread, between two steps; returns its result or raises its error.

        Raises:
            TimeoutError: the thread does not come to it.
        """
        future: Future[_T] = Future()
        self._asked.put((do, future))
        self.cluster.wake()
        return future.result(timeout_s)

    def close(self) -> None:
        """Ends the thread and all containers; raises what ended the thread before."""
        self._ending.set()
        if self._thread.is_alive():
            self.cluster.wake()
        deadline = Deadline.after(_END_S)
        self._thread.join(deadline.remaining_s())
        if self._thread.is_alive():
            deadline.check("end of the local cluster")
        if self._failure is not None:
            raise self._failure

    def _drive(self) -> None:
        try:
            while not self._ending.is_set():
                self._answer()
                due_s = self.cluster.step()
                if self._asked.empty():
                    self.cluster.wait(due_s, _LONGEST_WAIT_S)
        except BaseException as error:  # noqa: BLE001 - the thread's top: its owner raises it
            self._failure = error
        finally:
            self.cluster.close()

    def _answer(self) -> None:
        while not self._asked.empty():
            do, future = self._asked.get()
            try:
                future.set_result(do())
            except Exception as error:  # noqa: BLE001 - it is the caller's, who gets it
                future.set_exception(error)
