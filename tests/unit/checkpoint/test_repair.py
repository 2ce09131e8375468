"""Damaged checkpoints made whole from other commits, from memory and from a disk; never by replacing anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ktrain.checkpoint.catalog import verify_commit
from ktrain.checkpoint.removal import Seen
from ktrain.checkpoint.repair import Damage, Places, choose_spares, find_damage, rebuild
from ktrain.errors import KtrainError
from ktrain.format.record import CommitRecord
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from ktrain.tier.disk import NodeDisk
from tests.unit.checkpoint.builders import (
    RUN,
    TIMEOUTS,
    catalog,
    commit_name,
    flip,
    identity,
    put_checkpoint,
    snapshot,
)


@pytest.fixture
def bucket() -> FakeBucket:
    return FakeBucket()


@pytest.fixture
def places(tmp_path: Path) -> Places:
    return Places(tmp_path / "volumes", tmp_path / "disk", TIMEOUTS)


def hold_in_memory(places: Places, rank: int, step: int, *, node: str = "node-0") -> None:
    volume = NodeVolume(places.volume_root, node=node, run=RUN)
    payload, manifest = snapshot(rank, identity(step))
    writer = volume.acquire(rank, len(payload), protect=(), limit=3)
    assert writer is not None
    writer.memory[:] = payload
    writer.seal(manifest)
    volume.close()


def hold_on_disk(places: Places, rank: int, step: int) -> None:
    assert places.disk_root is not None
    disk = NodeDisk(places.disk_root, run=RUN, node="node-1", timeouts=TIMEOUTS)
    payload, manifest = snapshot(rank, identity(step))
    disk.store(manifest, payload)
    disk.close()


def damages(tier: FakeBucket | FaultyTier, places: Places) -> list[Damage]:
    found = catalog(tier)
    damaged = find_damage(found, Seen.read(found), places.timeouts)
    for damage in damaged:
        choose_spares(found, damage, places)
    return damaged


def repaired(bucket: FakeBucket, places: Places) -> CommitRecord:
    """Repairs the only damage; checks that nothing that was there has changed."""
    before = dict(bucket.objects)
    (damage,) = damages(bucket, places)
    assert damage.can_be_repaired(), damage.missing
    commit = rebuild(catalog(bucket), damage, clock=FakeClock())
    assert before.items() <= bucket.objects.items()
    assert list(verify_commit(catalog(bucket), commit)) == []
    assert commit in catalog(bucket).listing().commits
    return commit


def where_from(damage: Damage) -> dict[int, str]:
    return {rank: spare.where for rank, spare in damage.chosen.items()}


def test_find_damage_whole_checkpoints_are_none(bucket: FakeBucket, places: Places) -> None:
    put_checkpoint(bucket, identity(10))
    put_checkpoint(bucket, identity(20))
    assert damages(bucket, places) == []


def test_find_damage_with_another_whole_commit_of_the_step_is_none(bucket: FakeBucket, places: Places) -> None:
    bad = put_checkpoint(bucket, identity(10), "aaaa")
    put_checkpoint(bucket, identity(10), "bbbb")
    bucket.objects[bad.ranks[0].payload] = flip(bucket.objects[bad.ranks[0].payload])
    assert damages(bucket, places) == []


def test_find_damage_off_the_line_is_left(bucket: FakeBucket, places: Places) -> None:
    bad = put_checkpoint(bucket, identity(20))
    del bucket.objects[bad.ranks[0].payload]
    catalog(bucket).record(2, "restored", {"step": 10})
    catalog(bucket).record(2, "committed", {"step": 15})
    assert damages(bucket, places) == []


@pytest.mark.parametrize("lost", ["payload", "manifest"])
@pytest.mark.parametrize("hold", [hold_in_memory, hold_on_disk])
def test_repair_rank_from_a_copy_on_this_machine(
    bucket: FakeBucket, places: Places, lost: str, hold: Callable[..., None]
) -> None:
    bad = put_checkpoint(bucket, identity(10))
    bucket.objects[getattr(bad.ranks[1], lost)] = b"damaged"
    hold(places, 1, 10)
    commit = repaired(bucket, places)
    assert commit.write_id != bad.write_id and commit.identity == bad.identity
    assert commit.plan_digest == bad.plan_digest
    assert commit.origin["repaired_from"]["0"] == "bucket 0a1b"


def test_repair_two_commits_each_with_another_bad_rank(bucket: FakeBucket, places: Places) -> None:
    first, second = (put_checkpoint(bucket, identity(10), name) for name in ("aaaa", "bbbb"))
    bucket.objects[first.ranks[0].payload] = flip(bucket.objects[first.ranks[0].payload])
    del bucket.objects[second.ranks[1].manifest]
    (damage,) = damages(bucket, places)
    assert where_from(damage) == {0: "bucket bbbb", 1: "bucket aaaa"}
    repaired(bucket, places)


def test_repair_torn_record_whose_files_are_whole(bucket: FakeBucket, places: Places) -> None:
    torn = put_checkpoint(bucket, identity(10))
    bucket.objects[commit_name(torn)] = bucket.objects[commit_name(torn)][:-40]
    commit = repaired(bucket, places)
    assert [files.payload_digest for files in commit.ranks] == [files.payload_digest for files in torn.ranks]
    assert damages(bucket, places) == []


def lose_all_copies(bucket: FakeBucket, bad: CommitRecord, places: Places) -> None:
    del bucket.objects[bad.ranks[1].payload]


def spoil_the_copy(bucket: FakeBucket, bad: CommitRecord, places: Places) -> None:
    del bucket.objects[bad.ranks[1].payload]
    hold_in_memory(places, 1, 10)
    for slot in places.volume_root.rglob("slot-*.safetensors"):
        slot.write_bytes(flip(slot.read_bytes()))


def hold_another_step(bucket: FakeBucket, bad: CommitRecord, places: Places) -> None:
    del bucket.objects[bad.ranks[1].payload]
    hold_in_memory(places, 1, 20)
    hold_on_disk(places, 0, 10)


def put_a_stale_file_there(bucket: FakeBucket, bad: CommitRecord, places: Places) -> None:
    bucket.objects[bad.ranks[1].manifest] = snapshot(1, identity(9))[1].to_bytes()
    bucket.objects[bad.ranks[1].payload] = snapshot(1, identity(9))[0]


@pytest.mark.parametrize("spoil", [lose_all_copies, spoil_the_copy, hold_another_step, put_a_stale_file_there])
def test_repair_without_a_proven_copy_is_refused_and_says_which_rank(
    bucket: FakeBucket, places: Places, spoil: Callable[[FakeBucket, CommitRecord, Places], None]
) -> None:
    spoil(bucket, put_checkpoint(bucket, identity(10)), places)
    (damage,) = damages(bucket, places)
    assert not damage.can_be_repaired() and list(damage.missing) == [1]


def test_repair_torn_record_with_a_missing_rank_is_refused(bucket: FakeBucket, places: Places) -> None:
    torn = put_checkpoint(bucket, identity(10))
    bucket.objects[commit_name(torn)] = b"{"
    del bucket.objects[torn.ranks[1].manifest]
    (damage,) = damages(bucket, places)
    assert list(damage.missing) == [1]


@pytest.mark.parametrize("fault", [Fault.FLIP_BIT, Fault.TRUNCATE, Fault.UNAVAILABLE, Fault.NO_SPACE])
@pytest.mark.parametrize("nth", range(1, 6))
def test_repair_write_that_fails_or_is_spoilt_commits_nothing_false(
    bucket: FakeBucket, places: Places, fault: Fault, nth: int
) -> None:
    """Writes 1 to 4 are the ranks' files, 5 is the record."""
    bad = put_checkpoint(bucket, identity(10))
    del bucket.objects[bad.ranks[1].payload]
    hold_in_memory(places, 1, 10)
    (damage,) = damages(bucket, places)
    with pytest.raises(KtrainError):
        rebuild(catalog(FaultyTier(bucket, TierFault("write", fault, nth=nth))), damage, clock=FakeClock())
    assert catalog(bucket).listing().commits == (bad,)
