from __future__ import annotations

import pickle
import threading

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.retry import BusyError, Retries, RetryBudget
from ktrain.errors import ForbiddenError, UnavailableError
from ktrain.testing.fake_clock import FakeClock


class Flaky:
    """Fails so often, then answers."""

    def __init__(self, num_failures: int, error: Exception | None = None) -> None:
        self.left = num_failures
        self.error = error or BusyError("busy")
        self.num_calls = 0

    def __call__(self) -> str:
        self.num_calls += 1
        if self.left:
            self.left -= 1
            raise self.error
        return "done"


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


def retries(clock: FakeClock, budget: RetryBudget | None = None, *, max_tries: int = 8, draw: float = 1.0) -> Retries:
    return Retries(budget or RetryBudget(), max_tries=max_tries, clock=clock, draw=lambda: draw)


def test_retries_busy_call_is_made_again_after_pauses_that_double(clock: FakeClock) -> None:
    begin = clock.monotonic()
    assert retries(clock).run(Flaky(4), deadline=Deadline.after(60, clock)) == "done"
    assert clock.monotonic() - begin == pytest.approx(0.1 + 0.2 + 0.4 + 0.8)


def test_retries_pauses_are_jittered_down_to_nothing(clock: FakeClock) -> None:
    begin = clock.monotonic()
    assert retries(clock, draw=0.0).run(Flaky(4), deadline=Deadline.after(60, clock)) == "done"
    assert clock.monotonic() == begin


def test_retries_pause_is_never_shorter_than_the_store_asked_for(clock: FakeClock) -> None:
    begin = clock.monotonic()
    flaky = Flaky(2, BusyError("slow down", retry_after_s=7.0, answered=True))
    assert retries(clock, draw=0.0).run(flaky, deadline=Deadline.after(60, clock)) == "done"
    assert clock.monotonic() - begin == 14.0


def test_retries_pause_beyond_the_deadline_is_not_begun(clock: FakeClock) -> None:
    begin = clock.monotonic()
    flaky = Flaky(1, BusyError("slow down", retry_after_s=61.0))
    with pytest.raises(BusyError):
        retries(clock).run(flaky, deadline=Deadline.after(60, clock))
    assert clock.monotonic() == begin and flaky.num_calls == 1


@pytest.mark.parametrize("error", [UnavailableError("unknown"), ForbiddenError("no"), ValueError("ours")])
def test_retries_other_errors_are_not_tried_again(clock: FakeClock, error: Exception) -> None:
    flaky = Flaky(1, error)
    with pytest.raises(type(error)):
        retries(clock).run(flaky, deadline=Deadline.after(60, clock))
    assert flaky.num_calls == 1


def test_retries_end_after_the_tries_of_one_call(clock: FakeClock) -> None:
    flaky = Flaky(100)
    with pytest.raises(BusyError):
        retries(clock, RetryBudget(initial=1000), max_tries=3).run(flaky, deadline=Deadline.after(600, clock))
    assert flaky.num_calls == 3


def test_budget_bounds_the_retries_of_all_calls_together(clock: FakeClock) -> None:
    budget = RetryBudget(initial=10)
    calls = [Flaky(1000) for _ in range(50)]
    for call in calls:
        with pytest.raises(BusyError):
            retries(clock, budget).run(call, deadline=Deadline.after(600, clock))
    assert sum(call.num_calls for call in calls) == 50 + 10


def test_budget_earns_a_retry_for_ten_successes_and_never_more_than_at_first() -> None:
    budget = RetryBudget(initial=2)
    assert [budget.try_take() for _ in range(3)] == [True, True, False]
    for _ in range(10):
        budget.earn()
    assert [budget.try_take() for _ in range(2)] == [True, False]
    for _ in range(1000):
        budget.earn()
    assert sum(budget.try_take() for _ in range(10)) == 2


def test_budget_of_many_threads_is_spent_once() -> None:
    budget = RetryBudget(initial=100)
    taken: list[bool] = []

    def take() -> None:
        taken.extend(budget.try_take() for _ in range(50))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(taken) == 100


def test_busy_error_survives_pickling() -> None:
    again = pickle.loads(pickle.dumps(BusyError("busy", 3.0, True)))
    assert (str(again), again.retry_after_s, again.answered, again.kind) == ("busy", 3.0, True, "unavailable")
