"""A window is closed once: by the copier, or by who waited for too long."""

from __future__ import annotations

import threading

from ktrain.base.clock import Deadline
from ktrain.snapshot.window import Window
from ktrain.testing.fake_clock import FakeClock


class Clock(FakeClock):
    """Lets a wait end by what `meanwhile` does, or by the time it has."""

    def __init__(self) -> None:
        super().__init__()
        self.meanwhile = lambda: None

    def wait(self, event: threading.Event, timeout_s: float) -> bool:
        self.meanwhile()
        if not event.is_set():
            self.advance(timeout_s)
        return event.is_set()


def test_window_that_the_copier_closes_is_good() -> None:
    window = Window(Clock())
    assert not window.is_over
    assert window.close(None) is None
    assert window.is_over and window.wait(Deadline.after(1.0)) and window.waited_s == 0.0


def test_window_with_a_problem_is_not_good() -> None:
    window = Window(Clock())
    assert window.close("changed") == "changed"
    assert not window.wait(Deadline.after(1.0))
    assert window.close(None) == "changed"  # the first word stays


def test_window_whose_wait_ends_in_time_counts_the_wait() -> None:
    clock = Clock()
    window = Window(clock)

    def copy() -> None:
        clock.advance(2.0)
        assert window.waited_s == 2.0
        window.close(None)
        clock.advance(5.0)

    clock.meanwhile = copy
    assert window.wait(Deadline.after(10.0, clock))
    assert window.waited_s == 2.0


def test_window_that_is_waited_for_too_long_is_given_up_for_the_copier_too() -> None:
    clock = Clock()
    window = Window(clock)
    assert not window.wait(Deadline.after(3.0, clock))
    assert "not made within 3 s" in str(window.close(None))
    assert window.waited_s == 3.0
