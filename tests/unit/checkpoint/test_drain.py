from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from ktrain.checkpoint.drain import Drain, DrainSchedule
from ktrain.checkpoint.roster import Member
from ktrain.format.record import RankFiles
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


def uploaded(drain: Drain, rank: int) -> dict[str, Any]:
    """What a keeper says when it is done with a rank."""
    done = upload(FakeBucket(), drain.identity, drain.write_id)
    files = {name: getattr(done.files[rank], name) for name in RankFiles.__slots__}
    return report(drain, rank, plan_digest=done.plan_digests[rank], files=files)


def report(drain: Drain, rank: int, **fields: Any) -> dict[str, Any]:
    return {"write_id": drain.write_id, "identity": drain.identity.to_json(), "rank": rank, **fields}


def keeper(
    node: int, clock: FakeClock, *, holds: Iterable[int], speaks: Iterable[int] = (), instance: str = ""
) -> Member:
    held = tuple((rank, identity(10)) for rank in holds)
    name = f"node-{node}"
    return Member(
        name, name, instance or f"instance-{node}", clock.monotonic(), held=held, ranks={rank: {} for rank in speaks}
    )


def pair(clock: FakeClock) -> list[Member]:
    """Two nodes with one rank each, which keep each other's replica."""
    return [keeper(node, clock, holds=(0, 1), speaks=[node]) for node in (0, 1)]


def wanted(schedule: DrainSchedule) -> dict[str, list[int]]:
    """Node's instance -> ranks that it is to upload."""
    found = {name: schedule.wanted_from(name) for name in ("instance-0", "instance-1", "instance-0b")}
    return {name: want["ranks"] for name, want in found.items() if want is not None}


def test_schedule_completes_when_every_rank_has_reported(schedule: DrainSchedule) -> None:
    drain = begin(schedule, identity(10))
    reports = [uploaded(drain, rank) for rank in (0, 1)]
    schedule.take("a", reports[:1])
    schedule.take("a", [{**reports[1], "write_id": "another"}])
    assert schedule.try_complete() is None
    schedule.take("a", reports)  # the first one again: its answer was lost
    assert schedule.try_complete() is drain
    assert schedule.done(drain) and schedule.current is None
    assert schedule.last_done == identity(10)


def test_schedule_failure_is_said_once_and_waits_longer_each_time(
    schedule: DrainSchedule, clock: FakeClock, log: Log
) -> None:
    waits = []
    for _ in range(7):
        drain = begin(schedule, identity(10))
        assert drain is not None
        schedule.assign(pair(clock))
        schedule.take("instance-0", [report(drain, 0, failure="rank 0: 503")])
        schedule.take("instance-1", [report(drain, 1, failure="rank 1: 503")])
        schedule.assign(pair(clock))
        assert schedule.try_complete() is None and schedule.current is None
        begun = clock.monotonic()
        while begin(schedule, identity(10)) is None:
            clock.advance(0.5)
        waits.append(clock.monotonic() - begun)
    assert waits == [1.0, 2.0, 5.0, 10.0, 30.0, 30.0, 30.0]
    assert [fields["reason"] for fields in log.of("tier_failed")] == ["rank 0: 503"]
    schedule.done(schedule.current)  # type: ignore[arg-type]
    assert len(log.of("tier_recovered")) == 1


def test_schedule_drain_that_stands_still_is_given_up_naming_the_ranks(
    schedule: DrainSchedule, clock: FakeClock, log: Log
) -> None:
    drain = begin(schedule, identity(10))
    for sent in range(1, 5):  # slow, and longer than `drain_s` in all
        clock.advance(TIMEOUTS.drain_s * 0.9)
        schedule.take("a", [report(drain, 0, sent_nbytes=sent)])
        assert schedule.try_complete() is None and schedule.current is drain
    clock.advance(TIMEOUTS.drain_s * 0.9)
    schedule.take("a", [report(drain, 0, sent_nbytes=4)])  # nothing new
    clock.advance(TIMEOUTS.drain_s * 0.2)
    assert schedule.try_complete() is None and schedule.current is None
    assert "ranks [0, 1] uploaded nothing more" in log.of("tier_failed")[0]["reason"]


def test_schedule_drain_that_was_dropped_means_nothing(schedule: DrainSchedule, log: Log) -> None:
    drain = begin(schedule, identity(10))
    schedule.drop_unless(lambda at: at.step != 10)
    assert not schedule.done(drain)
    assert log.of("committed") == []


def test_assign_gives_each_rank_to_the_keeper_that_its_process_speaks_through(
    schedule: DrainSchedule, clock: FakeClock
) -> None:
    begin(schedule, identity(10))
    schedule.assign(pair(clock))
    assert wanted(schedule) == {"instance-0": [0], "instance-1": [1]}
    assert schedule.wanted_from("instance-0")["again"] == []  # type: ignore[index]


def test_assign_silent_node_is_waited_for_one_lease_then_its_peer_takes_over(
    schedule: DrainSchedule, clock: FakeClock
) -> None:
    begin(schedule, identity(10))
    nodes = pair(clock)
    schedule.assign(nodes)
    clock.advance(TIMEOUTS.lease_s * 0.9)
    nodes[1].heard_s = clock.monotonic()
    schedule.assign(nodes)
    assert wanted(schedule) == {"instance-0": [0], "instance-1": [1]}
    clock.advance(TIMEOUTS.lease_s * 0.2)
    schedule.assign(nodes)
    assert wanted(schedule) == {"instance-1": [0, 1]}
    assert schedule.wanted_from("instance-1")["again"] == [0]  # type: ignore[index]


def test_assign_restarted_keeper_uploads_its_rank_again(schedule: DrainSchedule, clock: FakeClock) -> None:
    begin(schedule, identity(10))
    nodes = pair(clock)
    schedule.assign(nodes)
    nodes[0] = keeper(0, clock, holds=(0, 1), speaks=[0], instance="instance-0b")
    schedule.assign(nodes)
    assert wanted(schedule) == {"instance-0b": [0], "instance-1": [1]}
    assert schedule.wanted_from("instance-0b")["again"] == [0]  # type: ignore[index]


def test_assign_bad_copy_is_uploaded_by_the_peer_at_once(schedule: DrainSchedule, clock: FakeClock) -> None:
    drain = begin(schedule, identity(10))
    schedule.assign(pair(clock))
    schedule.take("instance-0", [report(drain, 0, failure="rank 0: bad bytes", bad_copy=True)])
    schedule.assign(pair(clock))
    assert wanted(schedule) == {"instance-1": [0, 1]}
    schedule.take("instance-1", [report(drain, 0, failure="rank 0: bad bytes too", bad_copy=True), uploaded(drain, 1)])
    schedule.assign(pair(clock))
    assert schedule.try_complete() is None and schedule.current is None


def test_assign_store_that_failed_one_node_is_asked_by_another_only_after_it_answered_it(
    schedule: DrainSchedule, clock: FakeClock
) -> None:
    drain = begin(schedule, identity(10))
    schedule.assign(pair(clock))
    schedule.take("instance-0", [report(drain, 0, failure="rank 0: no route")])
    schedule.assign(pair(clock))
    assert wanted(schedule) == {"instance-0": [0], "instance-1": [1]}, "node 0 does not try again, node 1 is at work"
    schedule.take("instance-1", [uploaded(drain, 1)])
    schedule.assign(pair(clock))
    assert wanted(schedule) == {"instance-1": [0, 1]}
    schedule.take("instance-1", [uploaded(drain, 0)])
    assert schedule.try_complete() is drain


def test_assign_snapshot_that_nobody_holds_any_more_ends_the_drain(
    schedule: DrainSchedule, clock: FakeClock, log: Log
) -> None:
    begin(schedule, identity(10))
    alone = keeper(1, clock, holds=[1], speaks=[1])
    schedule.assign([alone])
    clock.advance(TIMEOUTS.lease_s + 1)
    alone.heard_s = clock.monotonic()
    schedule.assign([alone])
    assert schedule.try_complete() is None and schedule.current is None
    assert "holds rank 0" in log.of("tier_failed")[0]["reason"]


def test_assign_where_the_store_shows_halves_nobody_takes_over(clock: FakeClock, log: Log) -> None:
    schedule = DrainSchedule(timeouts=TIMEOUTS, emit=log, clock=clock, takes_over=False)
    begin(schedule, identity(10))
    nodes = pair(clock)
    schedule.assign(nodes)
    clock.advance(TIMEOUTS.lease_s + 1)
    nodes[1].heard_s = clock.monotonic()
    schedule.assign(nodes)
    assert schedule.try_complete() is None and schedule.current is None
    assert "fell silent" in log.of("tier_failed")[0]["reason"]


def test_schedule_of_a_new_head_goes_on_with_what_keepers_upload(schedule: DrainSchedule, clock: FakeClock) -> None:
    of_old_head = Drain(identity(10), 0.0)
    schedule.take("instance-0", [uploaded(of_old_head, 0)])
    drain = begin(schedule, identity(10))
    assert drain.write_id == of_old_head.write_id and drain.is_adopted, "it may be committed already"
    schedule.take("instance-0", [uploaded(of_old_head, 0)])  # said with each beat
    schedule.take("instance-1", [uploaded(of_old_head, 1)])
    assert schedule.try_complete() is drain


def test_schedule_after_a_failure_takes_a_write_id_of_its_own(schedule: DrainSchedule, clock: FakeClock) -> None:
    first = begin(schedule, identity(10))
    schedule.failed(first, "503")
    schedule.take("instance-0", [uploaded(first, 0)])
    clock.advance(60)
    assert begin(schedule, identity(10)).write_id != first.write_id


def test_drain_names_of_two_tries_differ() -> None:
    assert Drain(identity(1), 0.0).write_id != Drain(identity(1), 0.0).write_id


def test_quiet_a_drain_that_begins_again_has_not_moved_until_it_comes_farther(
    schedule: DrainSchedule, clock: FakeClock
) -> None:
    drain = begin(schedule, identity(10))
    schedule.take("a", [report(drain, 0, sent_nbytes=500)])
    assert schedule.quiet_s() == 0 and schedule.to_json()["nbytes"] == 500
    clock.advance(7.0)
    schedule.failed(drain, "503")
    assert schedule.to_json() == {"failure": "503"}
    clock.advance(1.0)
    again = begin(schedule, identity(10))
    schedule.take("a", [report(again, 0, sent_nbytes=400)])
    assert schedule.quiet_s() == 8
    schedule.take("a", [report(again, 0, sent_nbytes=501)])
    assert schedule.quiet_s() == 0
    assert schedule.to_json() == {"failure": "503", "step": 10, "nbytes": 501, "num_ranks": 0, "world_size": 2}
