"""Copies behind a share in a slot: found beside it alone, an extra that no inventory counts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ktrain.errors import CorruptionError, InternalError, NotFoundError
from ktrain.format.manifest import Manifest, verify_payload
from ktrain.format.payload import copies_begin
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.slots import SlotCalls
from tests.unit.snapshot.builders import identity, save, snapshot, steps, volume_at

RANK = 3
COPIES_FLOATS = 50_000  # more than a chunk


class Dies(SlotCalls):
    """A writer that dies after a step of its work."""

    def __init__(self) -> None:
        self.after = ""

    def reached(self, step: str) -> None:
        if step == self.after:
            raise KeyboardInterrupt(step)


def save_both(volume: NodeVolume, step: int) -> Manifest:
    """A share and copies in one slot; the manifest of the copies."""
    share, manifest = snapshot(RANK, identity(step))
    beside, copies = snapshot(RANK, identity(step), num_floats=COPIES_FLOATS)
    begin = copies_begin(len(share))
    writer = volume.acquire(RANK, begin + len(beside), protect=(), limit=3)
    assert writer is not None
    with writer:
        writer.memory[: len(share)] = share
        writer.memory[begin:] = beside
        writer.seal(manifest, copies)
    return copies


def test_copies_are_read_beside_their_share_and_counted_by_nobody(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        copies = save_both(volume, 10)
        (held,) = volume.scan()
        assert (held.identity, held.nbytes) == (identity(10), snapshot(RANK, identity(10))[1].nbytes)
        assert steps(volume, RANK) == [(10, 1)]
        assert volume.copies.find(identity(10)) == ({RANK: copies}, {})
        with volume.copies.open(RANK, identity(10)) as reader:
            verify_payload(reader.manifest, reader.memory)
        assert volume.copies.find(identity(20)) == ({}, {})


def test_copies_keep_their_slot_from_writers_while_they_are_read(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save_both(volume, 10)
        with volume.copies.open(RANK, identity(10)) as reader:
            for step in (20, 30, 40, 50):
                save_both(volume, step)
            verify_payload(reader.manifest, reader.memory)
        assert (10, 1) in steps(volume, RANK)


@pytest.mark.parametrize("step", ["manifest-written", "copies-sealed"])
def test_writer_that_dies_before_the_share_is_sealed_leaves_neither(tmp_path: Path, step: str) -> None:
    calls = Dies()
    with volume_at(tmp_path, calls=calls) as volume:
        save_both(volume, 10)
        calls.after = step
        with pytest.raises(KeyboardInterrupt):
            save_both(volume, 20)
    with volume_at(tmp_path) as volume:
        assert steps(volume, RANK) == [(10, 1)]
        assert volume.copies.find(identity(20)) == ({}, {})


def test_copies_that_an_older_writer_left_behind_are_passed_over(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save_both(volume, 10)
        (stale,) = tmp_path.rglob("*.copies.json")
        text = stale.read_bytes()
        for newer in (20, 30, 40):
            save(volume, newer, rank=RANK)
        stale.write_bytes(text)  # it knows nothing of this file, and so removes none
        for newer in (20, 30, 40):
            assert volume.copies.find(identity(newer)) == ({}, {})


def test_slot_written_anew_without_copies_has_none(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        for step in (10, 20, 30):
            save_both(volume, step)
        for step in (40, 50, 60):
            save(volume, step, rank=RANK)
        assert not list(tmp_path.rglob("*.copies.json"))


def test_damaged_or_short_copies_are_named_and_the_share_stays(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save_both(volume, 10)
        (path,) = tmp_path.rglob("*.copies.json")
        good = path.read_bytes()
        path.write_bytes(good[:-40])
        found, damaged = volume.copies.find(identity(10))
        assert (found, list(damaged)) == ({}, [RANK])
        path.write_bytes(good)
        payload = path.with_name(path.name.replace("copies.json", "safetensors"))
        os.truncate(payload, payload.stat().st_size - 1)
        with pytest.raises(CorruptionError, match="try another copy"):
            volume.copies.open(RANK, identity(10))
        assert steps(volume, RANK) == [(10, 1)]


def test_discarded_copies_are_gone_and_the_share_is_not(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save_both(volume, 10)
        volume.copies.discard(RANK, identity(10))
        volume.copies.discard(RANK, identity(10))
        with pytest.raises(NotFoundError):
            volume.copies.open(RANK, identity(10))
        assert steps(volume, RANK) == [(10, 1)]


def test_copies_of_another_snapshot_are_not_sealed(tmp_path: Path) -> None:
    share, manifest = snapshot(RANK, identity(10))
    beside, copies = snapshot(RANK, identity(11))
    with volume_at(tmp_path) as volume:
        writer = volume.acquire(RANK, copies_begin(len(share)) + len(beside), protect=(), limit=3)
        assert writer is not None
        with pytest.raises(InternalError):
            writer.seal(manifest, copies)
        assert volume.scan() == []


def test_prepare_maps_a_sealed_slot_with_copies_again(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save_both(volume, 10)
    mapped: list[int] = []
    with volume_at(tmp_path) as again:
        nbytes = (
            copies_begin(snapshot(RANK, identity(10))[1].nbytes)
            + snapshot(RANK, identity(10), num_floats=COPIES_FLOATS)[1].nbytes
        )
        again.prepare(RANK, nbytes, 2, lambda slot, memory: mapped.append(len(memory)))
        assert mapped == [nbytes, nbytes]
        assert steps(again, RANK) == [(10, 1)]
        assert list(again.copies.find(identity(10))[0]) == [RANK]
