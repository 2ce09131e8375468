"""A rank's wait for the last drain, at the end of training: as long as something moves, and no longer (ADR 0013)."""

from __future__ import annotations

from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.drain import Furthest
from ktrain.checkpoint.pulse import Pulse
from ktrain.errors import DeadlineError


class LastDrain:
    """Follows what goes into the bucket. Use from one thread.

    Args:
        says: this rank tells the run, once, what is waited for, where the wait is long.
    """

    def __init__(self, pulse: Pulse, *, says: bool, timeouts: Timeouts, clock: Clock) -> None:
        self._pulse = pulse
        self._says = says
        self._limit_s = timeouts.drain_s
        self._long_s = timeouts.lease_s
        self._clock = clock
        self._begun_s = clock.monotonic()
        self._furthest = Furthest(clock)

    def wait(self, what: str) -> None:
        """Returns with the next answer of the head.

        Raises:
            DeadlineError: nothing moved for `drain_s`; says `what` was waited for and how far it had come.
            ConflictError: this process is fenced.
        """
        left_s = max(0.0, self._limit_s - self._furthest.quiet_s())
        try:
            answer = self._pulse.wait_answer(Deadline.after(left_s, self._clock), what)
        except DeadlineError as error:
            raise self._late(what, f"; {error}") from error
        word = answer.get("draining") or {}
        bucket = answer.get("committed", {}).get(contract.TIER_BUCKET, [-1])[0]
        self._furthest.take((bucket, word.get("step", -1), word.get("nbytes", 0)))
        if self._furthest.quiet_s() >= self._limit_s:
            raise self._late(what, "")
        if self._says and self._clock.monotonic() - self._begun_s > self._long_s:
            self._says = False
            self._pulse.emit("notice", message=f"the end of training waits to {what}: {_state(answer)}")

    def _late(self, what: str, why: str) -> DeadlineError:
        return DeadlineError(
            f"close: could not {what}: nothing moved for {self._limit_s:g} s; {_state(self._pulse.answer)}{why}"
        )


def _state(answer: dict[str, Any]) -> str:
    word, bucket = answer.get("draining") or {}, answer.get("committed", {}).get(contract.TIER_BUCKET)
    there = "the bucket has no step yet" if bucket is None else f"the bucket has step {bucket[0]}"
    way = "; nothing is on its way"
    if "step" in word:
        ranks = f"{word['num_ranks']} of {word['world_size']} ranks"
        way = f"; step {word['step']} is on its way, {word['nbytes']} bytes, {ranks}"
    return there + way + (f"; last failure: {word['failure']}" if word.get("failure") else "")
