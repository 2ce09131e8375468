from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.last_drain import LastDrain
from ktrain.checkpoint.pulse import Pulse
from ktrain.errors import DeadlineError
from ktrain.testing.fake_clock import FakeClock

TIMEOUTS = Timeouts(patience_s=20)
WHAT = "bring the last step 30 into the bucket"


class Answers:
    """A pulse whose answers come every ten seconds, as long as there are some."""

    def __init__(self, clock: FakeClock, words: Iterator[dict[str, Any]]) -> None:
        self.clock, self.words = clock, words
        self.answer: dict[str, Any] = {}
        self.said: list[str] = []

    def wait_answer(self, deadline: Deadline, what: str) -> dict[str, Any]:
        word = next(self.words, None)
        if word is None or deadline.remaining_s() < 10:
            self.clock.advance(deadline.remaining_s())
            raise DeadlineError(f"{what}: the keeper does not answer")
        self.clock.advance(10.0)
        self.answer = word
        return word

    def emit(self, kind: str, **fields: Any) -> None:
        assert kind == "notice"
        self.said.append(fields["message"])


def sent(nbytes: int, *, bucket: int = 10, failure: str | None = None) -> dict[str, Any]:
    way = {"step": 30, "nbytes": nbytes, "num_ranks": 1, "world_size": 2, "failure": failure}
    return {"committed": {"bucket": [bucket, 1]}, "draining": way}


def follow(words: Iterator[dict[str, Any]], *, says: bool = True) -> tuple[FakeClock, Answers, LastDrain]:
    clock = FakeClock()
    answers = Answers(clock, words)
    return clock, answers, LastDrain(cast("Pulse", answers), says=says, timeouts=TIMEOUTS, clock=clock)


def test_wait_goes_on_as_long_as_something_moves() -> None:
    clock, _, drain = follow(sent(count) for count in range(100))
    begun = clock.monotonic()
    for _ in range(100):
        drain.wait(WHAT)
    assert clock.monotonic() - begun == 1000 > TIMEOUTS.drain_s


@pytest.mark.parametrize("words", [[7] * 99, [7, 0, 7, 3, 6] * 20], ids=["nothing moves", "it begins again and again"])
def test_wait_ends_once_nothing_came_farther_and_says_how_far(words: list[int]) -> None:
    clock, _, drain = follow(sent(count, failure="403 from the bucket") for count in words)
    begun = clock.monotonic()
    with pytest.raises(DeadlineError) as raised:
        for _ in words:
            drain.wait(WHAT)
    assert clock.monotonic() - begun <= TIMEOUTS.drain_s + 20
    for said in (WHAT, "nothing moved for 100 s", "has step 10", "1 of 2 ranks", "403 from the bucket"):
        assert said in str(raised.value)


def test_wait_without_any_answer_ends_and_says_why() -> None:
    clock, _, drain = follow(iter([]))
    begun = clock.monotonic()
    with pytest.raises(DeadlineError, match="the bucket has no step yet; nothing is on its way; .* does not answer"):
        drain.wait(WHAT)
    assert clock.monotonic() - begun == TIMEOUTS.drain_s


@pytest.mark.parametrize("says", [True, False])
def test_wait_that_is_long_is_said_once_by_the_rank_that_says(says: bool) -> None:
    _, answers, drain = follow((sent(count) for count in range(9)), says=says)
    for _ in range(9):
        drain.wait(WHAT)
    assert len(answers.said) == says
    assert all(WHAT in message and "step 30 is on its way" in message for message in answers.said)
