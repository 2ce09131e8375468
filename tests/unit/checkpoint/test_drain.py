from __future__ import annotations

from typing import Any

import pytest

from ktrain.checkpoint.drain import Drain, DrainSchedule
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import TIMEOUTS, Log, identity, upload


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def schedule(clock: FakeClock, log: Log) -> DrainSchedule:
    return DrainSchedule(timeouts=TIMEOUTS, emit=log, clock=clock)


def begin(schedule: DrainSchedule, memory: Any, bucket: Any = None, *, every: int = 0, last: bool = False) -> Any:
    schedule.begin(memory, bucket, every=every, last=last)
    return schedule.current


@pytest.mark.parametrize(
    ("memory", "bucket", "every", "last", "due"),
    [
        (None, None, 0, True, False),
        (10, None, 50, False, True),  # the first one is never put off
        (10, 10, 0, True, False),
        (20, 10, 0, False, True),
        (20, 10, 50, False, False),
        (60, 10, 50, False, True),
        (20, 10, 50, True, True),  # the last one before the end is not put off either
        (5, 10, 0, True, False),
    ],
)
def test_schedule_begins_what_is_due(
    schedule: DrainSchedule, memory: int | None, bucket: int | None, every: int, last: bool, due: bool
) -> None:
    newest = None if memory is None else identity(memory)
    stored = None if bucket is None else identity(bucket)
    assert (begin(schedule, newest, stored, every=every, last=last) is not None) == due


def test_schedule_one_drain_at_a_time(schedule: DrainSchedule) -> None:
    first = begin(schedule, identity(10))
    assert begin(schedule, identity(20)) is first


def test_schedule_completes_when_every_rank_has_reported(schedule: DrainSchedule) -> None:
    drain = begin(schedule, identity(10))
    uploaded = upload(FakeBucket(), drain.identity, drain.write_id)
    reports = [
        {
            "write_id": drain.write_id,
            "plan_digest": uploaded.plan_digests[rank],
            "files": {name: getattr(uploaded.files[rank], name) for name in type(uploaded.files[rank]).__slots__},
        }
        for rank in (0, 1)
    ]
    schedule.take(reports[:1])
    schedule.take([{**reports[1], "write_id": "another"}])
    assert schedule.try_complete() is None
    schedule.take(reports)  # the first one again: its answer was lost
    assert schedule.try_complete() is drain
    assert schedule.done(drain) and schedule.current is None


def test_schedule_failure_is_said_once_and_waits_longer_each_time(
    schedule: DrainSchedule, clock: FakeClock, log: Log
) -> None:
    waits = []
    for _ in range(7):
        drain = begin(schedule, identity(10))
        assert drain is not None
        schedule.take([{"write_id": drain.write_id, "failure": "rank 1: 503"}])
        assert schedule.try_complete() is None and schedule.current is None
        begun = clock.monotonic()
        while begin(schedule, identity(10)) is None:
            clock.advance(0.5)
        waits.append(clock.monotonic() - begun)
    assert waits == [1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]
    assert [fields["reason"] for fields in log.of("tier_failed")] == ["rank 1: 503"]
    schedule.done(schedule.current)  # type: ignore[arg-type]
    assert len(log.of("tier_recovered")) == 1


def test_schedule_late_drain_is_given_up_naming_the_ranks(schedule: DrainSchedule, clock: FakeClock, log: Log) -> None:
    begin(schedule, identity(10))
    clock.advance(TIMEOUTS.drain_s + 1)
    assert schedule.try_complete() is None
    assert "ranks [0, 1] did not upload" in log.of("tier_failed")[0]["reason"]


def test_schedule_drain_of_the_attempt_before_means_nothing(schedule: DrainSchedule, log: Log) -> None:
    drain = begin(schedule, identity(10))
    schedule.reset()
    assert not schedule.done(drain)
    assert log.of("committed") == []


def test_drain_names_of_two_tries_differ() -> None:
    assert Drain(identity(1), 0.0).write_id != Drain(identity(1), 0.0).write_id
