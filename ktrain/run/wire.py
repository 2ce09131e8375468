"""Keeps a Ray cluster alive for the run, beside training: a new generation whenever the last one is gone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Any

from ktrain.base import contract, events
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.events import Event
from ktrain.base.job import WorkDir
from ktrain.base.settings import Timeouts
from ktrain.errors import KtrainError

_LOG = logging.getLogger(__name__)
_WATCH_S = 1.0
_GENERATIONS_PER_HEAD = 100_000
_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)


class WireKeeper:
    """Owns the run's Ray head in a thread of its own; says once that it failed and once that it is back."""

    def __init__(  # noqa: PLR0913 -- two callbacks instead of a reference to the whole head
        self,
        work: WorkDir,
        *,
        set_wire: Callable[[dict[str, Any] | None], None],
        emit: Callable[[Event], None],
        timeouts: Timeouts,
        host: str = "127.0.0.1",
        head_number: int = 1,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        """`host` is the address that nodes reach.

        `head_number` counts the heads of this launch, so that generations go up also across a head's death.
        """
        self._first_generation = head_number * _GENERATIONS_PER_HEAD
        self._work = work
        self._set_wire = set_wire
        self._emit = emit
        self._timeouts = timeouts
        self._host = host
        self._clock = clock
        self._closed = threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="ktrain-wire", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the cluster. Idempotent."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join(self._timeouts.lease_s)

    def _run(self) -> None:
        try:
            from ktrain.replicate.ray_cluster import RayHead
        except ImportError as error:
            self._say_failed(f"Ray is not installed ({error}); replicas are not made")
            return
        folder = self._work.path / "head"
        folder.mkdir(mode=0o700, exist_ok=True)
        head = RayHead(folder, host=self._host, token=self._work.read_token(), clock=self._clock)
        failures = 0
        try:
            while not self._closed.is_set():
                if head.alive():
                    self._clock.wait(self._closed, _WATCH_S)
                    continue
                if head.cluster is not None:
                    self._set_wire(None)
                    self._say_failed("the Ray cluster is gone; a new one is being started, training goes on")
                failures = self._try_start(head, failures)
        except Exception:  # noqa: BLE001 -- top of the thread
            _LOG.exception("wire: unexpected failure")
            self._say_failed("the keeper of the Ray cluster met an unexpected failure; see the head's log")
        finally:
            self._set_wire(None)
            head.close()

    def _try_start(self, head: Any, failures: int) -> int:
        try:
            cluster = head.start(deadline=Deadline.after(self._timeouts.start_s, self._clock))
        except (KtrainError, OSError) as error:
            self._say_failed(str(error))
            self._clock.wait(self._closed, _RETRY_S[min(failures, len(_RETRY_S) - 1)])
            return failures + 1
        said = cluster.to_json()
        self._set_wire({**said, "generation": self._first_generation + said["generation"]})
        if self._failed:
            self._failed = False
            self._emit(events.make("tier_recovered", tier=contract.TIER_PEER, clock=self._clock))
        return 0

    def _say_failed(self, reason: str) -> None:
        if not self._failed:
            self._failed = True
            self._emit(events.make("tier_failed", tier=contract.TIER_PEER, reason=reason, clock=self._clock))
