"""A worker's line to its node keeper: signs of life out, agreements and commits in, on a thread of its own.

The training thread only ever touches memory here: it leaves its news and reads the newest answer. A keeper that is
away (its agent is being restarted) is noticed and awaited by this thread alone.

What each step says wakes nobody: a pulse, and what it sets in motion, takes milliseconds of Python, for which training
would stand in every step. It is taken along within a tenth of a second.
"""

from __future__ import annotations

import atexit
import logging
import threading
from collections.abc import Mapping
from typing import Any

from ktrain.base import ids
from ktrain.base.clock import Clock, Deadline
from ktrain.base.control import Caller
from ktrain.base.events import KINDS
from ktrain.base.process import let_training_first
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.cadence import Schedule
from ktrain.checkpoint.policy import Policies
from ktrain.checkpoint.relay import Outbox
from ktrain.errors import ConflictError, DeadlineError, KtrainError

_LOG = logging.getLogger(__name__)
_LOG_POLL_S = 0.01  # between two pulses of a rank that waits for its events to be in the log
_NEWS_S = 0.1  # what need not be known at once is told within this time
_PATIENT = frozenset({"step", "log"})  # kinds of such events
_EVENTS_PER_PULSE = 500


class LogMark:
    """How far a rank's events have come on their way into the run's log. Safe from any thread.

    Attributes:
        num_said: how many this rank has said.
        num_heard: how many of them, from the first on, a head has got, which puts them into the log.
    """

    def __init__(self, wake: threading.Event, clock: Clock) -> None:
        self._wake = wake
        self._clock = clock
        self.num_said = 0
        self.num_heard = 0

    def wait(self, count: int, deadline: Deadline, is_hurried: threading.Event) -> bool:
        """Waits until a head has the first `count` events; false when that was not so in time, or it is hurried."""
        while self.num_heard < count:
            self._wake.set()
            if self._clock.wait(is_hurried, min(_LOG_POLL_S, deadline.remaining_s())) or deadline.expired():
                return self.num_heard >= count
        return True


def keep_known(answer: dict[str, Any], known: Mapping[str, Any]) -> None:
    """Completes the answer of an agent that is new and has not heard from the head yet by what was known before.

    Otherwise the next save might take the slot of a step that the peers have promised to keep.
    """
    for name, nothing in (("committed", {}), ("protect", [])):
        if answer.get(name) is None:
            answer[name] = known.get(name, nothing)


class Pulse:
    """One rank's pulse. `note_*`, `emit` and the readers are safe from any thread."""

    def __init__(
        self, caller: Caller, *, rank: int, epoch: int, policies: Policies, timeouts: Timeouts, clock: Clock
    ) -> None:
        self._caller = caller
        self._rank = rank
        self._epoch = epoch
        self._policies = policies
        self._timeouts = timeouts
        self._clock = clock
        self._instance = ids.random_id()
        self._lock = threading.Lock()  # guards the fields below
        self._answered = threading.Condition(self._lock)
        self._outbox: Outbox[dict[str, Any]] = Outbox()
        self._has_news = False  # that may wait
        self._answer: dict[str, Any] = {}
        self._answers = 0
        self._step = 0
        self._phase = "start"
        self._closed = False
        self._stop: dict[str, Any] | None = None  # the newest announcement; one that was promised is never forgotten
        self._stop_ack: list[Any] | None = None
        self._restore: dict[str, Any] | None = None
        self._stop_wanted: str | None = None
        self.schedule = Schedule(policies.every.memory)
        """The steps to save. Changes reach it under the lock, so that `note_step` comes before or after."""
        self._fenced: KtrainError | None = None
        self._unreachable: KtrainError | None = None
        self._wake = threading.Event()
        self.log = LogMark(self._wake, clock)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ktrain-pulse", daemon=True)

    def start(self) -> None:
        """Starts the thread. A script that ends by an error, too, has its last news sent."""
        atexit.register(self.end)
        self._thread.start()

    def end(self) -> None:
        """Sends the last news and ends the thread. Idempotent."""
        if not self._ended.is_set():
            self._ended.set()
            self._wake.set()
            self._thread.join(self._timeouts.call_s * 2)
            atexit.unregister(self.end)

    # News out

    def emit(self, kind: str, **fields: Any) -> None:
        """An event, on its way to the run's log; kept here until it is there."""
        assert kind in KINDS, kind
        event = {"time": self._clock.wall(), "attempt": self._epoch, "kind": kind, **fields}
        with self._lock:
            self._outbox.add(event)
            self.log.num_said = self._outbox.num_said
            self._has_news = True
        if kind not in _PATIENT:
            self._wake.set()

    def note_phase(self, phase: str) -> None:
        """Says what this rank is at: "start", "restore", "train" or "close"."""
        with self._lock:
            self._phase = phase
        self._wake.set()

    def note_step(self, step: int) -> dict[str, Any] | None:
        """Says that this rank has reached `step`; returns the stop announcement if it is for this very step."""
        with self._lock:
            self._step = step
            self._has_news = True
            stop = self._stop
        return stop if stop is not None and stop["step"] == step else None

    def refuse_stop(self, step: int) -> None:
        """Takes back the promise to stop at `step`: it was not confirmed in time and this rank goes on."""
        with self._lock:
            self._stop_ack = [step, False]
        self._wake.set()

    def note_restore(self, report: Mapping[str, Any]) -> None:
        """Says how far this rank's restore is."""
        with self._lock:
            self._restore = dict(report)
        self._wake.set()

    def note_closed(self) -> None:
        """Says that this rank has ended with success."""
        with self._lock:
            self._closed = True
        self._wake.set()

    def note_sealed(self) -> None:
        """Says that there is a new snapshot on the volume."""
        self._wake.set()

    def request_stop(self, reason: str) -> None:
        """Asks for a save and an end of all ranks. Safe from a signal handler: it leaves a word and takes no lock."""
        self._stop_wanted = reason  # the next beat takes it along

    # Answers in

    @property
    def answer(self) -> dict[str, Any]:
        """The newest answer; empty before the first one."""
        with self._lock:
            return self._answer

    @property
    def stop(self) -> dict[str, Any] | None:
        """The newest announcement of a stop. A keeper or head that came back empty does not unsay it."""
        with self._lock:
            return self._stop

    def check_fence(self) -> None:
        """Raises when this process must do no more.

        Raises:
            ConflictError: a newer attempt of the run has begun.
            KtrainError: what was restored has failed the gate.
        """
        if self._fenced is not None:
            raise self._fenced

    def wait_answer(self, deadline: Deadline, what: str) -> dict[str, Any]:
        """Waits for an answer newer than the call.

        Raises:
            DeadlineError: none came in time; says `what` was waited for and why.
            ConflictError: this process is fenced.
        """
        with self._answered:
            seen = self._answers
            self._wake.set()
            while self._answers == seen:
                self.check_fence()
                if not self._answered.wait(min(0.5, deadline.remaining_s())) and deadline.expired():
                    why = f"; the last failure: {self._unreachable}" if self._unreachable else ""
                    raise DeadlineError(f"rank {self._rank}, {what}: not done within {deadline.total_s:g} s{why}")
            return self._answer

    def flush(self, deadline: Deadline) -> bool:
        """Waits, bounded, until the keeper has all events so far; false when it could not be given them."""
        while self._outbox.num_taken < self._outbox.num_said:
            try:
                self.wait_answer(deadline, "hand over events")
            except KtrainError:
                return False
        return True

    # The thread

    def _run(self) -> None:
        let_training_first()
        last = False
        due = Deadline.after(0.0, self._clock)
        while not last:
            self._clock.wait(self._wake, min(_NEWS_S, due.remaining_s()))
            last = self._ended.is_set()
            news = self._wake.is_set() or self._has_news
            if not (news or last or due.expired()):
                continue
            self._wake.clear()
            due = Deadline.after(self._timeouts.beat_s, self._clock)
            try:
                self._beat(news)
            except ConflictError as error:
                with self._answered:
                    self._fenced = error
                    self._answered.notify_all()
                return
            except KtrainError as error:
                if self._unreachable is None:
                    _LOG.warning("rank %d: %s", self._rank, error)
                self._unreachable = error
            except Exception:  # noqa: BLE001 -- top of the thread: recorded, the next beat tries again
                _LOG.exception("rank %d: the pulse met an unexpected failure", self._rank)

    def _beat(self, news: bool) -> None:
        with self._lock:
            batch = self._outbox.batch(_EVENTS_PER_PULSE)
            self._has_news = self._outbox.num_taken + len(batch) < self._outbox.num_said
            stop = self._stop
            if stop is not None and not stop["confirmed"]:
                # A promise: this rank had not reached the step when it answered, and `note_step` will see it.
                if self._stop_ack is None or self._stop_ack[0] != stop["step"]:
                    self._stop_ack = [stop["step"], self._step < stop["step"]]
            message = {
                "rank": self._rank,
                "epoch": self._epoch,
                "step": self._step,
                "phase": self._phase,
                "closed": self._closed,
                "stop_ack": self._stop_ack,
                "cadence": self.schedule.said,
                "restore": self._restore,
                "stop_wanted": self._stop_wanted,
                "policies": self._policies.to_json(),
                "news": news,
                "instance": self._instance,
                "events_from": self._outbox.num_taken,
                "events_logged": self._outbox.num_logged,
                "events": batch,
            }
        answer = self._caller.call("pulse", message, timeout_s=self._timeouts.call_s)
        self._unreachable = None
        with self._answered:
            self._settle_events(answer)
            keep_known(answer, self._answer)
            kept = self._answer.get("restore")
            new = answer.get("restore")
            if kept is not None and new is not None and new["round"] == kept["round"]:
                answer["restore"] = {**kept, **new}  # the long part comes once per round
            self._answer = answer
            announced = answer.get("stop")
            if announced is not None and announced["step"] is not None:
                self._stop = announced
            change = answer.get("cadence")
            if change is not None and self._policies.every.auto is not None and self.schedule.take(change, self._step):
                self._wake.set()
            if answer.get("refusal"):
                self._fenced = KtrainError(answer["refusal"])
            self._answers += 1
            self._answered.notify_all()
            if self._stop is not None and (self._stop_ack or [None])[0] != self._stop["step"]:
                self._wake.set()

    def _settle_events(self, answer: Mapping[str, Any]) -> None:
        before = self._outbox.num_taken
        self._outbox.settle(answer["events_taken"], answer["events_logged"])
        self.log.num_heard = answer["events_heard"]
        if lost := self._outbox.take_lost():
            message = f"rank {self._rank}: {lost} of its events were lost while they could not be handed on"
            self._outbox.add({"time": self._clock.wall(), "attempt": self._epoch, "kind": "notice", "message": message})
            self.log.num_said = self._outbox.num_said
        has_moved = self._outbox.num_taken != before  # else the keeper has no room: the next beat tries again
        self._has_news = self._has_news or (has_moved and self._outbox.num_taken < self._outbox.num_said)
