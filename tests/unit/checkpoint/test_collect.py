"""Removing from a bucket: what goes, what stays for want of certainty, and who may interrupt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from ktrain.base.events import make
from ktrain.checkpoint.collect import Collector, Outcome, Plan
from ktrain.checkpoint.drain import Drain
from ktrain.checkpoint.marks import MetricBook, doomed_name, metrics_name, pin_name, reader_name
from ktrain.checkpoint.removal import Seen, Terms
from ktrain.checkpoint.retention import Best, Latest, Retention
from ktrain.errors import KtrainError
from ktrain.format.digest import digest_text
from ktrain.format.manifest import Identity
from ktrain.format.record import CommitRecord
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from tests.unit.checkpoint.builders import (
    TIMEOUTS,
    catalog,
    commit_name,
    flip,
    identity,
    put_checkpoint,
    record_of,
    upload,
)
from tests.unit.checkpoint.meddler import Meddler

NEWEST = Latest(1)


@pytest.fixture
def bucket() -> FakeBucket:
    return FakeBucket()


def collect(tier: Any, policy: Retention | None = NEWEST, *, epoch: int = 9, **terms: Any) -> Outcome:
    return Collector(catalog(tier), timeouts=TIMEOUTS, clock=FakeClock()).collect(Terms(policy, epoch, **terms))


def plan(tier: Any, policy: Retention | None = NEWEST, *, epoch: int = 9, **terms: Any) -> Plan:
    found = catalog(tier)
    collector = Collector(found, timeouts=TIMEOUTS, clock=FakeClock())
    return collector.plan(Seen.read(found), Terms(policy, epoch, **terms))


def put(bucket: FakeBucket, *steps: int) -> list[CommitRecord]:
    return [put_checkpoint(bucket, identity(step)) for step in steps]


def steps(outcome: Outcome) -> list[int]:
    return [removal.step for removal in outcome.removed]


def committed(bucket: FakeBucket) -> list[tuple[int, int]]:
    return [(found.identity.step, found.identity.epoch) for found in catalog(bucket).listing().commits]


def names(bucket: FakeBucket, part: str) -> list[str]:
    return [name for name in bucket.objects if part in name]


# By policy


def test_collect_keeps_the_newest_and_removes_every_byte_of_the_rest(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30, 40)
    assert steps(collect(bucket, Latest(2))) == [10, 20]
    assert committed(bucket) == [(30, 1), (40, 1)]
    assert not names(bucket, "step-00000010") + names(bucket, "step-00000020") + names(bucket, "marks/")


def test_collect_uncommits_before_it_removes_data(bucket: FakeBucket) -> None:
    first, _ = put(bucket, 10, 20)
    faulty = FaultyTier(bucket)
    collect(faulty)
    deleted = [name for operation, name in faulty.calls if operation == "delete"]
    assert deleted[0] == commit_name(first) and len(deleted) == 6


def test_plan_changes_nothing(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    before = dict(bucket.objects)
    (removal,) = plan(bucket).removals
    assert (removal.step, removal.why) == (10, "superseded") and bucket.objects == before


def lose_payload(bucket: FakeBucket, drain: Drain) -> None:
    del bucket.objects[drain.files[1].payload]


def cut_payload(bucket: FakeBucket, drain: Drain) -> None:
    bucket.objects[drain.files[0].payload] = bucket.objects[drain.files[0].payload][:-1]


def lose_manifest(bucket: FakeBucket, drain: Drain) -> None:
    del bucket.objects[drain.files[1].manifest]


def flip_manifest(bucket: FakeBucket, drain: Drain) -> None:
    bucket.objects[drain.files[1].manifest] = flip(bucket.objects[drain.files[1].manifest])


@pytest.mark.parametrize("spoil", [lose_payload, cut_payload, lose_manifest, flip_manifest])
def test_collect_newest_that_is_not_proven_removes_nothing(
    bucket: FakeBucket, spoil: Callable[[FakeBucket, Drain], None]
) -> None:
    put(bucket, 10, 20)
    drain = upload(bucket, identity(30))
    bucket.objects[commit_name(record_of(drain))] = record_of(drain).to_bytes()
    spoil(bucket, drain)
    before = dict(bucket.objects)
    assert "cannot be proven" in plan(bucket).doubts[0]
    assert steps(collect(bucket)) == [] and bucket.objects == before


def test_collect_foreign_torn_and_unknown_objects_stay(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30)
    torn = commit_name(put_checkpoint(bucket, identity(5)))
    bucket.objects[torn] = bucket.objects[torn][:-20]
    bucket.objects["checkpoints/step-00000001/notes.txt"] = b"mine"
    bucket.objects["elsewhere/commit-000001-0a1b.json"] = b"{}"
    staying = {name for name in bucket.objects if "step-00000005" in name or "notes" in name or "elsewhere" in name}
    collect(bucket)
    assert staying <= set(bucket.objects) and committed(bucket) == [(30, 1)]


def test_collect_record_that_names_files_of_another_checkpoint_stays(bucket: FakeBucket) -> None:
    first, second, _ = put(bucket, 10, 20, 30)
    borrowed = CommitRecord(first.identity, "cafe", first.plan_digest, second.ranks, 1.5, {})
    bucket.objects[commit_name(borrowed)] = borrowed.to_bytes()
    collect(bucket, Latest(2))
    assert commit_name(borrowed) in bucket.objects and second.ranks[0].payload in bucket.objects


# Doubts


@pytest.mark.parametrize("fault", [Fault.FORBIDDEN, Fault.UNAVAILABLE, Fault.HANG])
@pytest.mark.parametrize("where", ["checkpoints", "attempts", "marks"])
def test_collect_listing_that_fails_removes_nothing(bucket: FakeBucket, where: str, fault: Fault) -> None:
    put(bucket, 10, 20)
    before = dict(bucket.objects)
    with pytest.raises(KtrainError):
        collect(FaultyTier(bucket, TierFault("list", fault, name=f"{where}*"), clock=FakeClock()))
    assert bucket.objects == before


@pytest.mark.parametrize("name", ["*/commit-*", "attempts/*", "marks/*"])
def test_collect_object_that_cannot_be_read_removes_nothing(bucket: FakeBucket, name: str) -> None:
    put(bucket, 10, 20)
    catalog(bucket).record(1, "restored", {"step": 0})
    bucket.objects[reader_name("aa")] = b'{"step": 1, "renew_s": 1}'
    before = dict(bucket.objects)
    with pytest.raises(KtrainError):
        collect(FaultyTier(bucket, TierFault("read", Fault.UNAVAILABLE, name=name)))
    assert bucket.objects == before


def test_collect_listing_that_lacks_what_was_just_committed_removes_nothing(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    outcome = collect(bucket, newest=identity(30))
    assert steps(outcome) == [] and committed(bucket) == [(10, 1), (20, 1)]


@pytest.mark.parametrize("age_s", [0.0, 5.0])
def test_collect_listing_that_lags_removes_nothing_it_would_miss(bucket: FakeBucket, age_s: float) -> None:
    """Step 30 was written a moment ago, or long enough ago to be listed."""
    clock = FakeClock()
    slow = FaultyTier(bucket, TierFault("list", Fault.LAGGING, count=99, seconds=2.0), clock=clock)
    for step in (10, 20):
        put_checkpoint(slow, identity(step))
    clock.advance(10.0)
    put_checkpoint(slow, identity(30))
    clock.advance(age_s)
    assert steps(collect(slow, newest=identity(30))) == ([10, 20] if age_s else [])


def test_collect_attempt_records_that_lag_do_not_cost_the_line(bucket: FakeBucket) -> None:
    """Without attempt 2's records, step 30 of attempt 1 would be the newest, and its own step 15 superseded."""
    put(bucket, 10, 20, 30)
    put_checkpoint(bucket, identity(15, 2))
    assert steps(collect(bucket, newest=identity(15, 2), epoch=2)) == []
    assert (15, 2) in committed(bucket)


def test_collect_by_an_attempt_that_is_not_the_newest_removes_nothing(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    catalog(bucket).next_epoch({"by": "another"})
    assert steps(collect(bucket, epoch=0)) == [] and len(committed(bucket)) == 2


def test_collect_newer_attempt_that_begins_meanwhile_ends_it(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    begin = Meddler(bucket, "write", "marks/doomed-*", lambda: catalog(bucket).next_epoch({"by": "x"}), when="after")
    outcome = collect(begin, epoch=0)
    assert outcome.failure is not None and "has begun" in str(outcome.failure)
    assert len(committed(bucket)) == 2


def test_collect_by_a_sleeper_leaves_the_marks_of_the_newer_attempt(bucket: FakeBucket) -> None:
    """The newer head is about to remove step 10, which the sleeper's own policy would keep."""
    put(bucket, 10, 20)
    bucket.objects[doomed_name((10, 1, "0a1b"))] = b"{}"
    catalog(bucket).next_epoch({"by": "another"})
    collect(bucket, Latest(2), epoch=0)
    assert names(bucket, "doomed") != []


@pytest.mark.parametrize("part", ["restored", "committed"])
def test_collect_attempt_whose_part_is_torn_removes_nothing(bucket: FakeBucket, part: str) -> None:
    put(bucket, 10, 20)
    found = catalog(bucket)
    for each, step in (("restored", 10), ("committed", 15), ("durable", 15)):
        found.record(2, each, {"step": step})
    put_checkpoint(bucket, identity(15, 2))
    bucket.objects[f"attempts/attempt-000002-{part}.json"] = b'{"st'
    assert steps(collect(bucket)) == []


def test_collect_mark_of_another_ktrain_removes_nothing(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    bucket.objects["marks/hold-everything.json"] = b"{}"
    assert steps(collect(bucket)) == [] and len(committed(bucket)) == 2


def test_collect_record_of_a_newer_ktrain_removes_nothing(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    name = commit_name(put_checkpoint(bucket, identity(30)))
    text = bucket.objects[name][:-30].replace(b'"format":1', b'"format":2')
    bucket.objects[name] = text + f',"digest":"{digest_text(text)}"}}\n'.encode()
    assert steps(collect(bucket)) == [] and (10, 1) in committed(bucket)


# Interrupted


@pytest.mark.parametrize("fault", [Fault.UNAVAILABLE, Fault.LOST_REPLY])
@pytest.mark.parametrize("nth", range(1, 13))
def test_collect_interrupted_at_any_removal_leaves_no_record_without_data(
    bucket: FakeBucket, nth: int, fault: Fault
) -> None:
    put(bucket, 10, 20, 30)
    outcome = collect(FaultyTier(bucket, TierFault("delete", fault, nth=nth)))
    assert outcome.failure is not None
    for commit in catalog(bucket).listing().commits:
        assert all(files.payload in bucket.objects and files.manifest in bucket.objects for files in commit.ranks)
    again = collect(bucket)
    assert again.failure is None and committed(bucket) == [(30, 1)]
    assert not names(bucket, "step-00000010") + names(bucket, "step-00000020") + names(bucket, "marks/")
    assert {*steps(outcome), *steps(again)} == {10, 20}


@pytest.mark.parametrize("nth", [1, 2])
def test_collect_mark_that_cannot_be_written_removes_nothing(bucket: FakeBucket, nth: int) -> None:
    put(bucket, 10, 20, 30)
    outcome = collect(FaultyTier(bucket, TierFault("write", Fault.FORBIDDEN, nth=nth)))
    assert outcome.failure is not None and outcome.removed == [] and len(committed(bucket)) == 3
    assert collect(bucket, Latest(3)).failure is None
    assert names(bucket, "marks/") == [], "a mark of a removal that is not wanted any more is taken back"


# Off the line


def left_branch(bucket: FakeBucket, *, durable: bool) -> None:
    """Attempt 2 went back to step 10 and has committed since, in the bucket or in memory alone."""
    put(bucket, 10, 20, 30)
    found = catalog(bucket)
    found.record(2, "restored", {"step": 10})
    found.record(2, "committed", {"step": 15})
    if durable:
        put_checkpoint(bucket, identity(15, 2))


def test_collect_steps_off_the_line_neither_count_nor_go(bucket: FakeBucket) -> None:
    left_branch(bucket, durable=True)
    assert steps(collect(bucket)) == [10]
    assert committed(bucket) == [(15, 2), (20, 1), (30, 1)]


def test_gc_removes_what_is_off_the_line_once_the_line_is_durable(bucket: FakeBucket) -> None:
    left_branch(bucket, durable=True)
    assert steps(collect(bucket, None, holds_run=True)) == [20, 30]
    assert committed(bucket) == [(10, 1), (15, 2)]


def test_gc_keeps_what_is_off_the_line_while_only_memory_has_the_line(bucket: FakeBucket) -> None:
    left_branch(bucket, durable=False)
    assert steps(collect(bucket, None, holds_run=True)) == []
    assert committed(bucket) == [(10, 1), (20, 1), (30, 1)]


def test_collect_step_that_is_set_aside_neither_goes_nor_counts(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30, 40)
    outcome = collect(bucket, Latest(2), set_aside=lambda at: at.step in (10, 40))
    assert steps(outcome) == [] and len(committed(bucket)) == 4
    assert steps(collect(bucket, Latest(1), set_aside=lambda at: at.step in (10, 40))) == [20]
    assert committed(bucket) == [(10, 1), (30, 1), (40, 1)]


def test_collect_newest_that_is_not_set_aside_must_be_proven(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    drain = upload(bucket, identity(30))
    bucket.objects[commit_name(record_of(drain))] = record_of(drain).to_bytes()
    lose_manifest(bucket, drain)
    put(bucket, 40)
    assert steps(collect(bucket, Latest(1), set_aside=lambda at: at.step == 40)) == []
    assert len(committed(bucket)) == 4


# Pins and readers


def test_collect_pinned_step_stays_and_does_not_count(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30, 40)
    bucket.objects[pin_name(30)] = b"{}"
    assert steps(collect(bucket, Latest(2))) == [10]
    bucket.objects.pop(pin_name(30))
    assert steps(collect(bucket, Latest(2))) == [20]


@pytest.mark.parametrize("mark", [pin_name(10), reader_name("0a")])
def test_collect_step_that_is_named_at_the_last_moment_stays(bucket: FakeBucket, mark: str) -> None:
    put(bucket, 10, 20, 30)
    text = b'{"step": 10, "who": "me", "renew_s": 1}'
    racing = Meddler(bucket, "write", "marks/doomed-*", lambda: bucket.objects.update({mark: text}), when="after")
    outcome = collect(racing)
    assert racing.has_acted and steps(outcome) == [20] and [step for step, _ in outcome.spared] == [10]
    assert names(bucket, "doomed") == [] and (10, 1) in committed(bucket)


def write_reader(bucket: FakeBucket, step: int, beat: int, renew_s: float = 1.0) -> None:
    value = {"step": step, "who": "me", "renew_s": renew_s, "beat": beat}
    bucket.objects[reader_name("0a")] = json.dumps(value).encode()


def test_collect_reader_protects_its_step_as_long_as_it_renews(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30)
    clock = FakeClock()
    collector = Collector(catalog(bucket, clock), timeouts=TIMEOUTS, clock=clock)
    for beat in range(4):
        write_reader(bucket, 10, beat)
        outcome = collector.collect(Terms(Latest(1), 9))
        assert 10 not in steps(outcome)
        clock.advance(10 * TIMEOUTS.lease_s)
    assert steps(collector.collect(Terms(Latest(1), 9))) == [10]
    assert names(bucket, "marks/") == []


def test_collect_reader_that_renews_slowly_is_believed_for_three_renewals(bucket: FakeBucket) -> None:
    put(bucket, 10, 20)
    clock = FakeClock()
    collector = Collector(catalog(bucket, clock), timeouts=TIMEOUTS, clock=clock)
    write_reader(bucket, 10, 0, renew_s=10 * TIMEOUTS.lease_s)
    assert steps(collector.collect(Terms(Latest(1), 9))) == []
    clock.advance(29 * TIMEOUTS.lease_s)
    assert steps(collector.collect(Terms(Latest(1), 9))) == []
    clock.advance(2 * TIMEOUTS.lease_s)
    assert steps(collector.collect(Terms(Latest(1), 9))) == [10]


def test_collect_reader_that_cannot_be_understood_protects_every_step(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30)
    bucket.objects[reader_name("0a")] = b'{"ste'
    assert steps(collect(bucket)) == []


# Metrics


def put_with_loss(bucket: FakeBucket, at: Identity, metrics: dict[str, float]) -> None:
    commit = put_checkpoint(bucket, at)
    origin = {"metrics": metrics} if metrics else {}
    told = CommitRecord(commit.identity, commit.write_id, commit.plan_digest, commit.ranks, commit.time, origin)
    bucket.objects[commit_name(told)] = told.to_bytes()


def test_collect_best_by_the_metrics_of_the_records(bucket: FakeBucket) -> None:
    for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
        put_with_loss(bucket, identity(step), {"loss": loss})
    assert steps(collect(bucket, Best(1, "loss"))) == [10]


def test_collect_metric_logged_after_the_commit_is_known_to_the_next_head(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30)
    book = MetricBook()
    for step, value in ((10, 0.1), (20, 0.9), (30, 0.5)):
        book.take(make("log", 1, step=step, val_loss=value, note="text", flag=True))
    collector = Collector(catalog(bucket), timeouts=TIMEOUTS, clock=FakeClock())
    assert steps(collector.collect(Terms(Latest(3), 9), book)) == []
    assert json.loads(bucket.objects[metrics_name(10, 1)]) == {"metrics": {"val_loss": 0.1}}
    assert steps(collect(bucket, Best(1, "val_loss"))) == [20]
    assert names(bucket, "metrics") == [metrics_name(10, 1), metrics_name(30, 1)]


def test_collect_step_whose_metrics_cannot_be_read_stays(bucket: FakeBucket) -> None:
    put(bucket, 10, 20, 30)
    bucket.objects[metrics_name(10, 1)] = b'{"metr'
    assert steps(collect(bucket)) == [20]


def test_doomed_mark_names_the_try(bucket: FakeBucket) -> None:
    (commit,) = put(bucket, 10)
    assert doomed_name((10, 1, commit.write_id)) == "marks/doomed-00000010-000001-0a1b.json"
