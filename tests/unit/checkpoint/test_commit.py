from __future__ import annotations

from collections.abc import Callable

import pytest

from ktrain.base import faults
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.commit import commit_drain
from ktrain.checkpoint.drain import Drain
from ktrain.errors import CorruptionError, InternalError, KtrainError
from ktrain.format.record import CommitRecord
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fault_plan import FaultPlan
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from tests.unit.checkpoint.builders import catalog, flip, identity, snapshot, upload

QUIET = FaultPoints([], epoch=1)


@pytest.fixture
def bucket() -> FakeBucket:
    return FakeBucket()


def commit(tier: FakeBucket | FaultyTier, drain: Drain, points: FaultPoints = QUIET) -> CommitRecord:
    return commit_drain(catalog(tier), drain, clock=FakeClock(), faults=points)


def committed(bucket: FakeBucket) -> list[tuple[int, int]]:
    return [(found.identity.step, found.identity.epoch) for found in catalog(bucket).listing().commits]


def test_commit_proven_files_makes_the_checkpoint_exist(bucket: FakeBucket) -> None:
    written = commit(bucket, upload(bucket, identity(10)))
    assert catalog(bucket).listing().commits == (written,)


def lose_payload(bucket: FakeBucket, drain: Drain) -> None:
    del bucket.objects[drain.files[1].payload]


def cut_payload(bucket: FakeBucket, drain: Drain) -> None:
    bucket.objects[drain.files[0].payload] = bucket.objects[drain.files[0].payload][:-1]


def lose_manifest(bucket: FakeBucket, drain: Drain) -> None:
    del bucket.objects[drain.files[1].manifest]


def flip_manifest(bucket: FakeBucket, drain: Drain) -> None:
    bucket.objects[drain.files[1].manifest] = flip(bucket.objects[drain.files[1].manifest])


def swap_manifests(bucket: FakeBucket, drain: Drain) -> None:
    first, second = drain.files[0].manifest, drain.files[1].manifest
    bucket.objects[first], bucket.objects[second] = bucket.objects[second], bucket.objects[first]


def put_manifest_of_another_step(bucket: FakeBucket, drain: Drain) -> None:
    bucket.objects[drain.files[0].manifest] = snapshot(0, identity(9))[1].to_bytes()


def leave_a_hole(bucket: FakeBucket, drain: Drain) -> None:
    """Both ranks report rank 0's box: every file is whole, half of the tensor is nowhere."""
    payload, manifest = snapshot(0, drain.identity)
    twin = type(manifest)(
        manifest.identity,
        1,
        manifest.plan_digest,
        manifest.nbytes,
        manifest.chunk_nbytes,
        manifest.chunks,
        manifest.entries,
        manifest.objects,
        manifest.origin,
    )
    data, files = twin.to_bytes(), drain.files[1]
    bucket.objects[files.payload], bucket.objects[files.manifest] = payload, data
    values = {name: getattr(files, name) for name in type(files).__slots__}
    drain.files[1] = type(files)(**{**values, "manifest_nbytes": len(data), "manifest_digest": twin.digest()})
    drain.plan_digests[1] = twin.plan_digest


def report_another_plan(bucket: FakeBucket, drain: Drain) -> None:
    drain.plan_digests[0] = "0123456789abcdef"


@pytest.mark.parametrize(
    "spoil",
    [
        lose_payload,
        cut_payload,
        lose_manifest,
        flip_manifest,
        swap_manifests,
        put_manifest_of_another_step,
        leave_a_hole,
        report_another_plan,
    ],
)
def test_commit_anything_unproven_commits_nothing(
    bucket: FakeBucket, spoil: Callable[[FakeBucket, Drain], None]
) -> None:
    drain = upload(bucket, identity(10))
    spoil(bucket, drain)
    with pytest.raises(KtrainError):
        commit(bucket, drain)
    assert catalog(bucket).listing() == catalog(FakeBucket()).listing()


@pytest.mark.parametrize("operation", ["list", "read"])
def test_commit_store_that_cannot_be_asked_commits_nothing(bucket: FakeBucket, operation: str) -> None:
    drain = upload(bucket, identity(10))
    with pytest.raises(KtrainError):
        commit(FaultyTier(bucket, TierFault(operation, Fault.UNAVAILABLE)), drain)
    assert committed(bucket) == []


def test_commit_death_before_the_record_leaves_no_checkpoint(bucket: FakeBucket) -> None:
    plan = faults.parse(FaultPlan().fail_at("commit.begin", action="raise").text())
    with pytest.raises(InternalError):
        commit(bucket, upload(bucket, identity(10)), FaultPoints(plan, epoch=1))
    assert committed(bucket) == []


def test_commit_death_after_the_record_leaves_a_whole_checkpoint(bucket: FakeBucket) -> None:
    plan = faults.parse(FaultPlan().fail_at("commit.record", action="raise").text())
    with pytest.raises(InternalError):
        commit(bucket, upload(bucket, identity(10)), FaultPoints(plan, epoch=1))
    assert committed(bucket) == [(10, 1)]


def test_commit_same_step_twice_by_two_heads_is_two_true_records(bucket: FakeBucket) -> None:
    commit(bucket, upload(bucket, identity(10), "aaaa"))
    commit(bucket, upload(bucket, identity(10), "bbbb"))
    assert committed(bucket) == [(10, 1), (10, 1)]


def test_commit_error_names_the_object_and_both_sizes(bucket: FakeBucket) -> None:
    drain = upload(bucket, identity(10))
    cut_payload(bucket, drain)
    nbytes = drain.files[0].nbytes
    with pytest.raises(CorruptionError, match=rf"expected {nbytes} bytes in .*rank-00000.*found {nbytes - 1}"):
        commit(bucket, drain)


@pytest.mark.parametrize("spoil", [None, flip, lambda data: data[:-9]], ids=["good", "flipped", "torn"])
def test_commit_of_an_adopted_drain_writes_no_good_record_again(
    bucket: FakeBucket, spoil: Callable[[bytes], bytes] | None
) -> None:
    drain = upload(bucket, identity(10))
    commit(bucket, drain)
    (name,) = [name for name in bucket.objects if "/commit-" in name]
    if spoil is not None:
        bucket.objects[name] = spoil(bucket.objects[name])
    store = FaultyTier(bucket)
    drain.is_adopted = True
    commit(store, drain)
    assert (("write", name) in store.calls) == (spoil is not None)
    assert committed(bucket) == [(10, 1)]
