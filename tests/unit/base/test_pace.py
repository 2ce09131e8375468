from __future__ import annotations

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.pace import Pace
from ktrain.errors import DeadlineError
from ktrain.testing.fake_clock import FakeClock


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def test_pace_keeps_the_rate_after_a_short_burst(clock: FakeClock) -> None:
    pace, begin = Pace(100.0, clock), clock.monotonic()
    for _ in range(100):
        pace.take(50, deadline=Deadline.after(600, clock))
    # 99 pieces before the last one take 49.5 s; a quarter of a second may be borrowed
    assert clock.monotonic() - begin == pytest.approx(49.5 - 0.25)


def test_pace_idle_time_is_not_saved_up(clock: FakeClock) -> None:
    pace = Pace(100.0, clock)
    pace.take(100, deadline=Deadline.after(600, clock))
    clock.advance(3600)
    begin = clock.monotonic()
    for _ in range(11):
        pace.take(100, deadline=Deadline.after(600, clock))
    assert clock.monotonic() - begin == pytest.approx(10 - 0.25)


def test_pace_small_object_waits_for_what_went_before_and_no_longer(clock: FakeClock) -> None:
    pace, begin = Pace(100.0, clock), clock.monotonic()
    pace.take(1000, deadline=Deadline.after(600, clock))
    pace.take(1, deadline=Deadline.after(600, clock))
    assert clock.monotonic() - begin == pytest.approx(10 - 0.25)


def test_pace_that_cannot_let_pass_in_time_says_so_and_takes_nothing(clock: FakeClock) -> None:
    pace = Pace(100.0, clock)
    pace.take(10_000, deadline=Deadline.after(600, clock))
    for _ in range(3):
        with pytest.raises(DeadlineError, match="100 bytes per second"):
            pace.take(10_000, deadline=Deadline.after(5, clock))
    clock.advance(100)
    pace.take(1, deadline=Deadline.after(0.1, clock))


def test_pace_without_a_rate_lets_all_pass(clock: FakeClock) -> None:
    begin = clock.monotonic()
    Pace(None, clock).take(1 << 60, deadline=Deadline.after(0.0, clock))
    assert clock.monotonic() == begin
