"""Readers and collectors at the same time."""

from __future__ import annotations

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.collect import Collector
from ktrain.checkpoint.marks import doomed_name
from ktrain.checkpoint.reading import await_collectors, reading, verify_read
from ktrain.checkpoint.removal import Seen, Terms
from ktrain.checkpoint.retention import Latest
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock, SteppedClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from tests.unit.checkpoint.builders import TIMEOUTS, catalog, identity, put_checkpoint, upload
from tests.unit.checkpoint.meddler import Meddler

TERMS = Terms(Latest(1), 9)


@pytest.fixture
def bucket() -> FakeBucket:
    made = FakeBucket()
    for step in (10, 20, 30):
        put_checkpoint(made, identity(step))
    return made


def marks(bucket: FakeBucket) -> list[str]:
    return [name for name in bucket.objects if name.startswith("marks/")]


def steps(bucket: FakeBucket) -> list[int]:
    return [commit.identity.step for commit in catalog(bucket).listing().commits]


def test_reading_keeps_the_step_and_leaves_no_mark(bucket: FakeBucket) -> None:
    collector = Collector(catalog(bucket), timeouts=TIMEOUTS, clock=FakeClock())
    with reading(catalog(bucket), 10, timeouts=Timeouts(600)) as failure:
        assert failure is None and len(marks(bucket)) == 1
        collector.collect(TERMS)
        assert steps(bucket) == [10, 30]
    assert marks(bucket) == []
    collector.collect(TERMS)
    assert steps(bucket) == [30]


def test_reading_renews_its_mark_while_it_reads(bucket: FakeBucket) -> None:
    clock = SteppedClock()
    collector = Collector(catalog(bucket, clock), timeouts=TIMEOUTS, clock=clock)
    with reading(catalog(bucket), 10, timeouts=TIMEOUTS, clock=clock):
        for _ in range(4):
            clock.wait_for_sleepers(1)
            collector.collect(TERMS)
            text = bucket.objects[marks(bucket)[0]]
            clock.advance(TIMEOUTS.lease_s / 2)
            limit = Deadline.after(10.0)
            while bucket.objects[marks(bucket)[0]] == text:
                limit.check("renewal of the mark")
        assert 10 in steps(bucket)


def test_reading_store_that_cannot_be_written_reads_all_the_same(bucket: FakeBucket) -> None:
    faulty = FaultyTier(bucket, TierFault("write", Fault.FORBIDDEN, name="marks/*"))
    with reading(catalog(faulty), 10, timeouts=TIMEOUTS) as failure:
        assert failure is not None and "403" in str(failure)


def test_reading_of_a_step_that_is_being_removed_waits_until_it_is_gone(bucket: FakeBucket) -> None:
    """The collector looked for readers before this one came: the reader sees its mark, waits, and finds no record."""
    collecting = catalog(bucket)
    collector = Collector(collecting, timeouts=TIMEOUTS, clock=FakeClock())
    plan = collector.plan(Seen.read(collecting), TERMS)
    bucket.objects[doomed_name((10, 1, "0a1b"))] = b"{}"
    late = Meddler(bucket, "list", "marks/", lambda: collector.carry_out(plan, TERMS), when="after")
    with reading(catalog(late), 10, timeouts=TIMEOUTS, clock=FakeClock()):
        assert late.has_acted and 10 in steps(bucket), "the collector has seen the reader, and lets its step stay"
    assert marks(bucket) == []


def test_await_collectors_mark_of_a_dead_collector_holds_up_for_one_lease(bucket: FakeBucket) -> None:
    bucket.objects[doomed_name((10, 1, "0a1b"))] = b"{}"
    clock = FakeClock()
    began = clock.monotonic()
    await_collectors(catalog(bucket), 10, timeouts=TIMEOUTS, clock=clock)
    assert TIMEOUTS.lease_s <= clock.monotonic() - began <= 1.2 * TIMEOUTS.lease_s
    began = clock.monotonic()
    await_collectors(catalog(bucket), 20, timeouts=TIMEOUTS, clock=clock)
    assert clock.monotonic() == began


def test_verify_read_step_that_goes_meanwhile_is_no_damage(bucket: FakeBucket) -> None:
    """Somebody removes the files by hand, and heeds no mark."""
    commit = catalog(bucket).listing().commits[0]

    def remove() -> None:
        for name in [name for name in bucket.objects if "step-00000010" in name]:
            del bucket.objects[name]

    racing = Meddler(bucket, "read", "*/step-00000010/data-*", remove, when="before")
    assert verify_read(catalog(racing), commit, timeouts=TIMEOUTS) == (None, None)


def test_verify_read_missing_file_of_a_committed_step_is_damage(bucket: FakeBucket) -> None:
    commit = catalog(bucket).listing().commits[0]
    del bucket.objects[commit.ranks[1].payload]
    found, _ = verify_read(catalog(bucket), commit, timeouts=TIMEOUTS)
    assert found is not None and [finding.rank for finding in found] == [1]


# Who looks only once


def test_plan_watched_dead_reader_and_dead_upload_go_in_one_run(bucket: FakeBucket) -> None:
    upload(bucket, identity(40), "dead")
    bucket.objects["marks/reader-0a.json"] = b'{"step": 10, "who": "gone", "renew_s": 1.0}'
    found = catalog(bucket)
    found.record(1, "end", {"outcome": "failed"})
    clock, waited = FakeClock(), []
    collector = Collector(found, timeouts=TIMEOUTS, clock=clock, grace_s=TIMEOUTS.storage_s)
    terms = Terms(Latest(1), 9, holds_run=True)
    _, plan = collector.plan_watched(terms, waited.append)
    assert waited == [max(TIMEOUTS.storage_s, TIMEOUTS.lease_s)]
    outcome = collector.carry_out(plan, terms)
    assert sorted(removal.step for removal in outcome.removed) == [10, 20, 40]
    assert marks(bucket) == [] and steps(bucket) == [30]


def test_plan_watched_with_nobody_to_watch_does_not_wait(bucket: FakeBucket) -> None:
    collector = Collector(catalog(bucket), timeouts=TIMEOUTS, clock=FakeClock())
    waited: list[float] = []
    collector.plan_watched(TERMS, waited.append)
    assert waited == []
