"""A slot that is chosen ahead keeps its snapshot until it is written, and is written only where it still may be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ktrain.errors import CorruptionError, NotFoundError
from ktrain.snapshot.arena import NodeVolume, SlotWriter
from ktrain.snapshot.next_slot import NextSlot
from tests.unit.snapshot.builders import identity, save, snapshot, steps, volume_at

RANK = 3
NBYTES = len(snapshot(RANK, identity(0))[0])
LIMIT = 3


def with_three(root: Path) -> NodeVolume:
    """A volume whose rank has all its slots: steps 10, 20 and 30."""
    volume = volume_at(root)
    for step in (10, 20, 30):
        save(volume, step, protect=((10, 1), (20, 1)))
    return volume


def ahead(volume: NodeVolume, *protect: tuple[int, int]) -> NextSlot:
    """The slot of step 10 is leased, unless that is protected."""
    made = NextSlot(RANK, LIMIT)
    made.lease_ahead(volume, NBYTES, protect=protect)
    return made


def held(volume: NodeVolume) -> list[int]:
    return [found.identity.step for found in volume.scan()]


def seal(writer: SlotWriter | None, step: int) -> None:
    assert writer is not None
    payload, manifest = snapshot(RANK, identity(step))
    writer.memory[:] = payload
    writer.seal(manifest)


def test_slot_leased_ahead_keeps_its_snapshot_until_it_is_taken(tmp_path: Path) -> None:
    with with_three(tmp_path) as volume:
        following = ahead(volume)
        assert held(volume) == [10, 20, 30]
        with pytest.raises(NotFoundError):
            volume.open(RANK, identity(10))  # else somebody would read what is about to be overwritten
        seal(following.take(volume, NBYTES, protect=()), 40)
        assert steps(volume) == [(20, 1), (30, 1), (40, 1)]


def test_slot_leased_ahead_by_a_process_that_dies_still_has_its_snapshot(tmp_path: Path) -> None:
    volume = with_three(tmp_path)
    leased = volume.lease(RANK, NBYTES, protect=(), limit=0)
    assert leased is not None
    leased.slot.close()  # as the system does
    with volume_at(tmp_path) as after:
        assert steps(after) == [(10, 1), (20, 1), (30, 1)]
    volume.close()


def test_slot_given_back_can_be_read_and_taken_again(tmp_path: Path) -> None:
    with with_three(tmp_path) as volume:
        following = ahead(volume)
        following.give_back()
        following.give_back()
        assert steps(volume) == [(10, 1), (20, 1), (30, 1)]
        seal(following.take(volume, NBYTES, protect=()), 40)
        assert steps(volume) == [(20, 1), (30, 1), (40, 1)]


@pytest.mark.parametrize("by", ["the head", "the volume"])
def test_slot_whose_snapshot_is_needed_after_all_is_not_taken(tmp_path: Path, by: str) -> None:
    with with_three(tmp_path) as volume:
        following = ahead(volume)
        if by == "the volume":
            volume.write_committed({"peer": (10, 1)})
        seal(following.take(volume, NBYTES, protect=((10, 1),) if by == "the head" else ()), 40)
        assert steps(volume) == [(10, 1), (30, 1), (40, 1)]


def test_slot_whose_snapshot_has_become_the_newest_is_not_taken(tmp_path: Path) -> None:
    with with_three(tmp_path) as volume:
        following = ahead(volume)
        volume.discard(RANK, identity(30), "a chunk does not match")
        volume.discard(RANK, identity(20), "a chunk does not match")
        seal(following.take(volume, NBYTES, protect=()), 40)
        assert steps(volume) == [(10, 1), (40, 1)]


@pytest.mark.parametrize("remove", [False, True])
def test_slot_cut_or_removed_behind_our_back_is_made_whole_again(tmp_path: Path, remove: bool) -> None:
    with with_three(tmp_path) as volume:
        following = ahead(volume)
        payload = volume.path / "rank-00003/slot-0.safetensors"
        if remove:
            payload.unlink()
        else:
            os.truncate(payload, 100)
        seal(following.take(volume, NBYTES, protect=()), 40)
        assert (40, 1) in steps(volume) and (30, 1) in steps(volume)


def test_slot_of_another_size_than_was_leased_is_of_the_size_that_is_wanted(tmp_path: Path) -> None:
    with with_three(tmp_path) as volume:
        writer = ahead(volume).take(volume, NBYTES + 4096, protect=())
        assert writer is not None and len(writer.memory) == NBYTES + 4096
        writer.abandon()
        assert held(volume) == [20, 30]


def test_lease_ahead_where_all_are_needed_makes_no_slot_and_take_finds_what_is_free_by_then(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        for step in (10, 20):
            save(volume, step, limit=2)
        following = NextSlot(RANK, 2)
        following.lease_ahead(volume, NBYTES, protect=((10, 1),))
        assert not (volume.path / "rank-00003/slot-2.lock").exists()
        assert following.take(volume, NBYTES, protect=((10, 1),)) is None
        seal(following.take(volume, NBYTES, protect=()), 30)
        assert steps(volume) == [(20, 1), (30, 1)]


def test_take_with_a_damaged_announcement_takes_nothing_and_gives_the_slot_back(tmp_path: Path) -> None:
    with with_three(tmp_path) as volume:
        following = ahead(volume)
        (volume.path / "committed.json").write_text("{")
        with pytest.raises(CorruptionError):
            following.take(volume, NBYTES, protect=())
        assert steps(volume) == [(10, 1), (20, 1), (30, 1)]
