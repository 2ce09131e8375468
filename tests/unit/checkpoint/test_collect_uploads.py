"""Uploads that never became a checkpoint: when they go, and why no writer that wakes up is fooled."""

from __future__ import annotations

from typing import Any

import pytest

from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.collect import Collector, Outcome
from ktrain.checkpoint.commit import commit_drain
from ktrain.checkpoint.marks import doomed_name, pin_name
from ktrain.checkpoint.removal import Terms
from ktrain.errors import ConflictError, CorruptionError, KtrainError
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import TIMEOUTS, catalog, commit_name, identity, put_checkpoint, record_of, upload
from tests.unit.checkpoint.meddler import Meddler

QUIET = FaultPoints([], epoch=1)
TERMS = Terms(None, 2)


@pytest.fixture
def bucket() -> FakeBucket:
    """Attempt 1 died in an upload of step 30; attempt 2 continued from step 20 and has a durable commit."""
    made = FakeBucket()
    put_checkpoint(made, identity(20))
    upload(made, identity(30), "dead")
    found = catalog(made)
    for part, step in (("restored", 20), ("committed", 25), ("durable", 25)):
        found.record(2, part, {"step": step})
    put_checkpoint(made, identity(25, 2))
    return made


class Watch:
    """A collector and its clock."""

    def __init__(self, tier: Any) -> None:
        self.clock = FakeClock()
        self.collector = Collector(catalog(tier, self.clock), timeouts=TIMEOUTS, clock=self.clock)

    def collect(self, terms: Terms = TERMS) -> Outcome:
        return self.collector.collect(terms)

    def collect_after_grace(self, terms: Terms = TERMS) -> Outcome:
        self.collect(terms)
        self.clock.advance(TIMEOUTS.drain_s)
        return self.collect(terms)


def uploads(bucket: FakeBucket) -> list[str]:
    return [name for name in bucket.objects if "-dead" in name]


def test_upload_of_a_fenced_attempt_goes_after_the_grace(bucket: FakeBucket) -> None:
    watch = Watch(bucket)
    assert watch.collect().removed == [] and len(uploads(bucket)) == 4
    watch.clock.advance(TIMEOUTS.drain_s / 2)
    assert watch.collect().removed == []
    watch.clock.advance(TIMEOUTS.drain_s / 2)
    (removal,) = watch.collect().removed
    assert (removal.step, removal.why) == (30, "never committed") and uploads(bucket) == []
    assert [name for name in bucket.objects if name.startswith("marks/")] == []


def test_upload_that_still_grows_is_watched_anew(bucket: FakeBucket) -> None:
    watch = Watch(bucket)
    last = uploads(bucket)[-1]
    data = bucket.objects.pop(last)
    watch.collect()
    bucket.objects[last] = data
    watch.clock.advance(TIMEOUTS.drain_s)
    assert watch.collect().removed == [] and len(uploads(bucket)) == 4


@pytest.mark.parametrize("part", ["durable", "committed"])
def test_upload_stays_where_the_newer_attempt_is_not_known_to_be_durable(bucket: FakeBucket, part: str) -> None:
    del bucket.objects[f"attempts/attempt-000002-{part}.json"]
    assert Watch(bucket).collect_after_grace().removed == [] and len(uploads(bucket)) == 4


def test_upload_of_the_newest_attempt_stays(bucket: FakeBucket) -> None:
    upload(bucket, identity(40, 2), "live")
    Watch(bucket).collect_after_grace()
    assert len([name for name in bucket.objects if "-live" in name]) == 4


@pytest.mark.parametrize("ended", [True, False])
def test_gc_upload_of_the_newest_attempt_goes_once_its_end_is_recorded(bucket: FakeBucket, ended: bool) -> None:
    upload(bucket, identity(40, 2), "live")
    if ended:
        catalog(bucket).record(2, "end", {"outcome": "failed"})
    outcome = Watch(bucket).collect_after_grace(Terms(None, 2, holds_run=True))
    assert {removal.write[2] for removal in outcome.removed} == ({"dead", "live"} if ended else {"dead"})


@pytest.mark.parametrize("name", ["notes.txt", "rank-00000.safetensors.part-1", "rank-1.json", "sub/rank-00000.json"])
def test_upload_with_a_file_that_ktrain_did_not_name_stays_whole(bucket: FakeBucket, name: str) -> None:
    bucket.objects[f"checkpoints/step-00000030/data-000001-dead/{name}"] = b"mine"
    Watch(bucket).collect_after_grace()
    assert len(uploads(bucket)) == 5


def test_upload_of_a_pinned_step_stays(bucket: FakeBucket) -> None:
    bucket.objects[pin_name(30)] = b"{}"
    Watch(bucket).collect_after_grace()
    assert len(uploads(bucket)) == 4


def test_upload_with_a_torn_record_stays(bucket: FakeBucket) -> None:
    bucket.objects["checkpoints/step-00000030/commit-000001-dead.json"] = b'{"format":1'
    Watch(bucket).collect_after_grace()
    assert len(uploads(bucket)) == 5


def test_upload_stays_while_the_newest_of_the_line_is_not_proven(bucket: FakeBucket) -> None:
    del bucket.objects["checkpoints/step-00000025/data-000002-0a1b/rank-00000.json"]
    Watch(bucket).collect_after_grace()
    assert len(uploads(bucket)) == 4


def test_upload_whose_record_comes_at_the_last_moment_is_a_checkpoint(bucket: FakeBucket) -> None:
    drain = upload(bucket, identity(30), "dead")
    record = record_of(drain)
    racing = Meddler(
        bucket,
        "write",
        "marks/doomed-*",
        lambda: bucket.objects.update({commit_name(record): record.to_bytes()}),
        when="after",
    )
    outcome = Watch(racing).collect_after_grace()
    assert racing.has_acted and outcome.removed == [] and len(uploads(bucket)) == 5


# The writer of attempt 1 wakes up and goes on where it slept


def commit_while(bucket: FakeBucket, operation: str, pattern: str, when: str) -> KtrainError | None:
    """A collection runs, from its first look to its end, at one moment of a commit; what the commit said."""
    drain = upload(bucket, identity(30), "dead")
    watch = Watch(bucket)
    watch.collect()
    watch.clock.advance(TIMEOUTS.drain_s)
    asleep = Meddler(bucket, operation, pattern, watch.collect, when=when)
    try:
        commit_drain(catalog(asleep), drain, clock=FakeClock(), faults=QUIET)
    except KtrainError as error:
        assert asleep.has_acted
        return error
    assert asleep.has_acted
    return None


@pytest.mark.parametrize(
    ("operation", "pattern", "when"),
    [
        ("list", "checkpoints/*", "before"),
        ("list", "checkpoints/*", "after"),
        ("read", "*/rank-00001.json", "after"),
        ("write", "*/commit-*", "before"),
    ],
)
def test_commit_of_a_sleeper_whose_files_were_removed_is_no_success(
    bucket: FakeBucket, operation: str, pattern: str, when: str
) -> None:
    assert isinstance(commit_while(bucket, operation, pattern, when), KtrainError)
    assert [name for name in uploads(bucket) if "rank-" in name] == []


@pytest.mark.parametrize("moment", [("write", "*/commit-*"), ("read", "*/commit-*"), ("read", "marks/doomed-*")])
def test_commit_whose_record_the_collector_sees_is_whole(bucket: FakeBucket, moment: tuple[str, str]) -> None:
    if moment[1].startswith("marks"):  # the mark is not there, which the meddler sees as an error
        assert commit_while(bucket, *moment, "before") is None
    else:
        assert commit_while(bucket, *moment, "after") is None
    assert len(uploads(bucket)) == 5


def test_commit_with_the_collectors_mark_there_does_not_count(bucket: FakeBucket) -> None:
    drain = upload(bucket, identity(30), "dead")
    bucket.objects[doomed_name((30, 1, "dead"))] = b"{}"
    with pytest.raises(ConflictError, match="its files are being removed"):
        commit_drain(catalog(bucket), drain, clock=FakeClock(), faults=QUIET)


def test_commit_files_removed_after_they_were_proven_is_an_error(bucket: FakeBucket) -> None:
    error = commit_while(bucket, "write", "*/commit-*", "before")
    assert isinstance(error, CorruptionError) and "no such object" in str(error)
