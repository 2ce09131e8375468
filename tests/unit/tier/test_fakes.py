"""The fakes that other tests stand on: clocks, the bucket in memory, faults around a tier."""

from __future__ import annotations

import threading

import pytest

from ktrain.base.clock import Deadline
from ktrain.errors import (
    CapacityError,
    ConfigError,
    DeadlineError,
    ForbiddenError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock, SteppedClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, Killed, TierFault


def _soon(clock: FakeClock) -> Deadline:
    return Deadline.after(10.0, clock)


def test_fake_clock_sleep_and_wait_move_time_at_once() -> None:
    clock = FakeClock(start_s=5.0)
    deadline = Deadline.after(3.0, clock)
    clock.sleep(2.0)
    assert deadline.remaining_s() == 1.0
    assert clock.wait(threading.Event(), 1.0) is False
    assert deadline.expired()


def test_fake_clock_wait_for_an_event_that_is_set_takes_no_time() -> None:
    clock, event = FakeClock(), threading.Event()
    event.set()
    before = clock.monotonic()
    assert clock.wait(event, 100.0) is True
    assert clock.monotonic() == before


def test_stepped_clock_sleeper_wakes_when_its_time_has_come_and_not_before() -> None:
    clock = SteppedClock(start_s=0.0)
    woken_at: list[float] = []

    def sleep() -> None:
        clock.sleep(10.0)
        woken_at.append(clock.monotonic())

    thread = threading.Thread(target=sleep)
    thread.start()
    clock.wait_for_sleepers(1)
    clock.advance(9.0)
    clock.wait_for_sleepers(1)
    assert woken_at == []
    clock.advance(1.0)
    thread.join(10)
    assert woken_at == [10.0]


def test_stepped_clock_waiter_is_woken_by_its_event_without_time() -> None:
    clock, event = SteppedClock(), threading.Event()
    seen: list[bool] = []
    thread = threading.Thread(target=lambda: seen.append(clock.wait(event, 10.0)))
    thread.start()
    clock.wait_for_sleepers(1)
    event.set()
    thread.join(10)
    assert seen == [True]


def test_fake_bucket_beyond_its_capacity_is_capacity_error_and_unchanged() -> None:
    clock = FakeClock()
    bucket = FakeBucket(capacity_nbytes=10)
    bucket.write("a", bytes(8), deadline=_soon(clock))
    bucket.write("a", bytes(10), deadline=_soon(clock))
    with pytest.raises(CapacityError, match="found 0 bytes free"):
        bucket.write("b", b"x", deadline=_soon(clock))
    assert bucket.objects == {"a": bytes(10)}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (Fault.NOT_FOUND, NotFoundError),
        (Fault.FORBIDDEN, ForbiddenError),
        (Fault.THROTTLED, UnavailableError),
        (Fault.ERROR, UnavailableError),
        (Fault.UNAVAILABLE, UnavailableError),
        (Fault.HANG, DeadlineError),
        (Fault.IO_ERROR, UnavailableError),
    ],
)
def test_faulty_tier_fault_strikes_the_nth_matching_call_alone(fault: Fault, expected: type[KtrainError]) -> None:
    clock = FakeClock()
    bucket = FakeBucket()
    bucket.objects = {"a": b"1", "b": b"2"}
    tier = FaultyTier(bucket, TierFault("read", fault, nth=2, name="a"), clock=clock)
    assert tier.read("a", deadline=_soon(clock)) == b"1"
    assert tier.read("b", deadline=_soon(clock)) == b"2"
    with pytest.raises(expected) as caught:
        tier.read("a", deadline=_soon(clock))
    assert type(caught.value) is expected
    assert tier.read("a", deadline=_soon(clock)) == b"1"
    assert tier.calls == [("read", "a"), ("read", "b"), ("read", "a"), ("read", "a")]


@pytest.mark.parametrize(
    ("fault", "expected"),
    [(Fault.LOST_REPLY, UnavailableError), (Fault.LATE_REPLY, DeadlineError)],
)
def test_faulty_tier_write_that_took_effect_loses_its_reply(fault: Fault, expected: type[KtrainError]) -> None:
    clock = FakeClock()
    bucket = FakeBucket()
    tier = FaultyTier(bucket, TierFault("create", fault), clock=clock)
    with pytest.raises(expected):
        tier.create("a", b"x", deadline=_soon(clock))
    assert bucket.objects == {"a": b"x"}


@pytest.mark.parametrize(
    ("fault", "stored"),
    [(Fault.FLIP_BIT, b"ab\x62d"), (Fault.TRUNCATE, b"ab")],
)
def test_faulty_tier_write_stores_wrong_bytes_in_silence(fault: Fault, stored: bytes) -> None:
    clock = FakeClock()
    bucket = FakeBucket()
    FaultyTier(bucket, TierFault("write", fault), clock=clock).write("a", b"abcd", deadline=_soon(clock))
    assert bucket.objects == {"a": stored}


def test_faulty_tier_torn_write_stores_half_and_raises() -> None:
    clock = FakeClock()
    bucket = FakeBucket()
    tier = FaultyTier(bucket, TierFault("write", Fault.TORN), clock=clock)
    with pytest.raises(UnavailableError):
        tier.write("a", b"abcd", deadline=_soon(clock))
    assert bucket.objects == {"a": b"ab"}


def test_faulty_tier_lagging_list_lacks_what_is_younger_than_the_lag() -> None:
    clock = FakeClock()
    tier = FaultyTier(FakeBucket(), TierFault("list", Fault.LAGGING, count=9, seconds=5.0), clock=clock)
    tier.write("old", b"x", deadline=_soon(clock))
    clock.advance(5.0)
    tier.write("new", b"x", deadline=_soon(clock))
    assert [stored.name for stored in tier.list("", deadline=_soon(clock))] == ["old"]
    clock.advance(5.0)
    assert [stored.name for stored in tier.list("", deadline=_soon(clock))] == ["new", "old"]


def test_faulty_tier_slow_call_takes_its_seconds_and_is_late_when_these_are_too_many() -> None:
    clock = FakeClock(start_s=0.0)
    tier = FaultyTier(FakeBucket(), TierFault("write", Fault.SLOW, count=2, seconds=4.0), clock=clock)
    tier.write("a", b"x", deadline=Deadline.after(5.0, clock))
    assert clock.monotonic() == 4.0
    with pytest.raises(DeadlineError):
        tier.write("a", b"y", deadline=Deadline.after(3.0, clock))
    tier.heal()
    assert tier.read("a", deadline=_soon(clock)) == b"x"


def test_tier_fault_that_does_not_fit_its_operation_is_config_error() -> None:
    with pytest.raises(ConfigError, match="lost-reply"):
        TierFault("read", Fault.LOST_REPLY)


@pytest.mark.parametrize(("fault", "stored"), [(Fault.KILLED, None), (Fault.KILLED_AFTER, b"x")])
def test_faulty_tier_caller_that_dies_is_caught_by_no_handler_of_its_own(fault: Fault, stored: bytes | None) -> None:
    bucket = FakeBucket()
    tier = FaultyTier(bucket, TierFault("write", fault))
    with pytest.raises(Killed):
        try:
            tier.write("a", b"x", deadline=Deadline.after(1.0))
        except Exception:  # noqa: BLE001 -- what a process does that goes on at any price
            pytest.fail("a dead process handled an error")
    assert bucket.objects.get("a") == stored
    assert tier.has_faults() and tier.num_struck() == 1
    tier.heal()
    assert not tier.has_faults()


def test_fake_clock_wall_that_jumps_leaves_monotonic_time_alone() -> None:
    clock = FakeClock()
    monotonic, wall = clock.monotonic(), clock.wall()
    clock.jump_wall(-3600.0)
    assert (clock.monotonic(), clock.wall()) == (monotonic, wall - 3600.0)
