"""What a volume holds, which slot is taken next, and what is never overwritten."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest

from ktrain.errors import (
    CapacityError,
    ConfigError,
    ConflictError,
    CorruptionError,
    InternalError,
    NotFoundError,
    UnavailableError,
)
from ktrain.format.manifest import Manifest
from ktrain.snapshot.arena import NodeVolume, ProblemKind
from ktrain.snapshot.slots import SlotCalls, translated
from tests.unit.snapshot.builders import NODE, RUN, identity, save, snapshot, steps, try_save, volume_at


class FullVolume(SlotCalls):
    """A volume that has room for files of `room` bytes in all from now on."""

    def __init__(self, room: int) -> None:
        self.room = room

    def reserve(self, fd: int, nbytes: int) -> None:
        if nbytes > self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        super().reserve(fd, nbytes)


def kinds(volume: NodeVolume) -> list[ProblemKind]:
    return [problem.kind for problem in volume.problems()]


# -------------------------------------------------------------------------------------------- what is held


def test_seal_then_scan_in_another_volume_object_finds_the_snapshot_proven(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        held = save(volume, 10)
    with volume_at(tmp_path) as again:
        assert again.scan() == [held]
        assert steps(again) == [(10, 1)]
        assert again.problems() == []


def test_held_names_the_digest_of_its_manifest(tmp_path: Path) -> None:
    _, manifest = snapshot(3, identity(10))
    with volume_at(tmp_path) as volume:
        assert save(volume, 10).manifest_digest == manifest.digest()


def test_scan_orders_by_rank_then_epoch_then_step(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        for rank, step, epoch in ((3, 20, 1), (3, 10, 2), (1, 30, 1)):
            save(volume, step, epoch, rank=rank)
        found = [(held.rank, held.identity.epoch, held.identity.step) for held in volume.scan()]
    assert found == [(1, 1, 30), (3, 1, 20), (3, 2, 10)]


def test_scan_of_a_slot_sealed_again_elsewhere_forgets_what_it_knew(tmp_path: Path) -> None:
    with volume_at(tmp_path) as looker, volume_at(tmp_path) as volume:
        for step in (10, 20):
            save(volume, step, limit=2)
        assert steps(looker) == [(10, 1), (20, 1)]
        save(volume, 30, limit=2)
        assert steps(looker) == [(20, 1), (30, 1)]


def test_open_of_an_absent_step_says_which_are_held(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save(volume, 10)
        with pytest.raises(NotFoundError, match="rank 3.*held of this rank: 10 of epoch 1"):
            volume.open(3, identity(20))


def test_open_gives_read_only_memory_of_exactly_the_payload(tmp_path: Path) -> None:
    payload, _ = snapshot(3, identity(10))
    with volume_at(tmp_path) as volume:
        save(volume, 10)
        with volume.open(3, identity(10)) as reader:
            assert bytes(reader.memory) == payload
            assert reader.memory.readonly
        with pytest.raises(InternalError, match="closed"):
            _ = reader.memory


def test_open_with_a_known_manifest_takes_it_for_the_same_bytes_alone(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save(volume, 10)
        save(volume, 20)
        known = Manifest.from_bytes(snapshot(3, identity(10))[1].to_bytes())
        with volume.open(3, identity(10), known=known) as reader:
            assert reader.manifest is known
        with volume.open(3, identity(20), known=known) as reader:
            assert reader.manifest.identity == identity(20)


@pytest.mark.parametrize(
    ("damage", "kind"),
    [
        (lambda folder: (folder / "slot-0.manifest.json").write_bytes(b"{"), ProblemKind.UNREADABLE),
        (lambda folder: (folder / "slot-0.manifest.json").unlink(), ProblemKind.TORN),
        (lambda folder: os.truncate(folder / "slot-0.safetensors", 4096), ProblemKind.SHORT),
        (lambda folder: (folder / "slot-0.safetensors").unlink(), ProblemKind.SHORT),
        (lambda folder: folder.rename(folder.with_name("rank-00004")), ProblemKind.FOREIGN),
    ],
)
def test_scan_leaves_a_damaged_slot_out_and_problems_says_why(
    tmp_path: Path, damage: object, kind: ProblemKind
) -> None:
    with volume_at(tmp_path) as volume:
        save(volume, 10)
    damage(volume.path / "rank-00003")  # type: ignore[operator]
    with volume_at(tmp_path) as again:
        assert again.scan() == []
        assert kinds(again) == [kind]


def test_problems_while_a_writer_lives_says_writing(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume, volume_at(tmp_path) as looker:
        writer = volume.acquire(3, 5000, protect=(), limit=3)
        assert writer is not None
        assert kinds(looker) == kinds(volume) == [ProblemKind.WRITING]
        writer.abandon()


def test_discard_unseals_keeps_the_bytes_and_says_the_reason(tmp_path: Path) -> None:
    payload, _ = snapshot(3, identity(10))
    with volume_at(tmp_path) as volume:
        save(volume, 10)
        volume.discard(3, identity(10), "chunk 0 does not match")
        volume.discard(3, identity(10), "again")
        assert volume.scan() == []
        assert [(p.kind, p.message) for p in volume.problems()] == [(ProblemKind.BAD, "chunk 0 does not match")]
        assert (volume.path / "rank-00003/slot-0.safetensors").read_bytes() == payload
        save(volume, 20)
        assert (steps(volume), volume.problems()) == ([(20, 1)], [])
        assert not (volume.path / "rank-00003/slot-1.safetensors").exists()


# --------------------------------------------------------------------------------------- which slot is taken


def test_acquire_in_a_steady_state_uses_two_slots_and_keeps_the_newest(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        for step in range(10, 60, 10):
            save(volume, step)
        assert steps(volume) == [(40, 1), (50, 1)]


def test_acquire_keeps_protected_and_committed_snapshots(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save(volume, 10)
        volume.write_committed({"peer": (10, 1)})
        save(volume, 20)
        save(volume, 30, protect=((20, 1),))
        assert try_save(volume, 40, protect=((20, 1),)) is None
        assert steps(volume) == [(10, 1), (20, 1), (30, 1)]
        volume.write_committed({"memory": (20, 1), "peer": (20, 1)})
        save(volume, 40)
        assert steps(volume) == [(20, 1), (30, 1), (40, 1)]


def test_acquire_reads_what_another_process_committed_last(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume, volume_at(tmp_path) as head:
        for step in (10, 20):
            save(volume, step, limit=2)
        head.write_committed({"peer": (10, 1)})
        assert try_save(volume, 30, limit=2) is None


def test_acquire_keeps_a_snapshot_while_anything_views_it(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        for step in (10, 20):
            save(volume, step, limit=2)
        reader = volume.open(3, identity(10))
        part = reader.memory[4096:4200]
        assert try_save(volume, 30, limit=2) is None
        reader.close()
        assert try_save(volume, 30, limit=2) is None
        del part
        save(volume, 30, limit=2)


def test_acquire_after_a_rollback_takes_steps_of_the_older_epoch_first(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        volume.write_committed({"memory": (10, 1)})
        for step, epoch in ((10, 1), (30, 1), (20, 2)):
            save(volume, step, epoch)
        save(volume, 30, 2)
        assert steps(volume) == [(10, 1), (20, 2), (30, 2)]


def test_acquire_prefers_an_empty_slot_to_an_old_snapshot(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        writer = volume.acquire(3, 5000, protect=(), limit=3)
        assert writer is not None
        for step in (10, 20):
            save(volume, step)
        writer.abandon()
        save(volume, 30)
        assert steps(volume) == [(10, 1), (20, 1), (30, 1)]


def test_acquire_while_another_thread_writes_takes_another_slot(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        first = volume.acquire(3, 5000, protect=(), limit=2)
        assert first is not None
        names: list[str] = []

        def second() -> None:
            writer = volume.acquire(3, 5000, protect=(), limit=2)
            if writer is not None:
                names.append(writer.slot)

        for _ in range(2):  # the first stays unfinished, the second writer is never ended: two is the limit
            thread = threading.Thread(target=second, name="second writer")
            thread.start()
            thread.join(timeout=30)
        assert [first.slot, *names] == ["rank-00003/slot-0", "rank-00003/slot-1"]


def test_acquire_after_a_change_of_size_gives_exactly_that_size(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        for step, num_floats in ((10, 300), (20, 300), (30, 90_000), (40, 90_000), (50, 7), (60, 7)):
            save(volume, step, limit=2, num_floats=num_floats)
        assert steps(volume) == [(50, 1), (60, 1)]
        files = sorted((volume.path / "rank-00003").glob("*.safetensors"))
        assert [file.stat().st_size for file in files] == [4096 + 28, 4096 + 28]


def test_acquire_keeps_the_mapping_of_a_slot_between_saves(tmp_path: Path) -> None:
    made = []

    class Counting(SlotCalls):
        def reached(self, step: str) -> None:
            if step == "mapped":
                made.append(step)

    with volume_at(tmp_path, calls=Counting()) as volume:
        for step in range(10, 60, 10):
            save(volume, step)
    assert len(made) == 2


def test_release_lets_another_process_write_the_slots(tmp_path: Path) -> None:
    with volume_at(tmp_path) as agent, volume_at(tmp_path) as worker:
        for step in (10, 20):
            save(agent, step)
        agent.release(3)
        save(worker, 30, 2)
        assert steps(worker) == [(20, 1), (30, 2)]


def test_release_keeps_the_lock_while_the_memory_is_viewed(tmp_path: Path) -> None:
    with volume_at(tmp_path) as agent, volume_at(tmp_path) as worker:
        writer = agent.acquire(3, 5000, protect=(), limit=1)
        assert writer is not None
        view = writer.memory[:10]
        writer.abandon()
        agent.release(3)
        other = worker.acquire(3, 5000, protect=(), limit=1)
        assert other is not None and other.slot == "rank-00003/slot-1"
        other.abandon()
        del view
        again = agent.acquire(3, 5000, protect=(), limit=1)
        assert again is not None and again.slot == "rank-00003/slot-0"
        again.abandon()


def test_prepare_makes_slots_and_the_saves_after_it_map_none(tmp_path: Path) -> None:
    reached: list[str] = []

    class Recording(SlotCalls):
        def reached(self, step: str) -> None:
            reached.append(step)

    payload, _ = snapshot(3, identity(10))
    with volume_at(tmp_path, calls=Recording()) as volume:
        volume.prepare(3, len(payload), 3)
        assert volume.problems() == []
        assert reached.count("mapped") == 3
        for step in (10, 20, 30):
            save(volume, step)
        assert reached.count("mapped") == 3
        assert steps(volume) == [(10, 1), (20, 1), (30, 1)]


def test_prepare_keeps_what_is_sealed(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        held = save(volume, 10)
        save(volume, 20, num_floats=5000)
    with volume_at(tmp_path) as again:
        again.prepare(3, held.nbytes, 3)
        assert steps(again) == [(10, 1), (20, 1)]
        assert len(list((again.path / "rank-00003").glob("*.safetensors"))) == 3


# ----------------------------------------------------------------------------------------------- full volume


def test_acquire_in_a_full_volume_is_capacity_error_and_keeps_what_is_sealed(tmp_path: Path) -> None:
    calls = FullVolume(1 << 30)
    with volume_at(tmp_path, calls=calls) as volume:
        for step in (10, 20):
            save(volume, step)
        calls.room = 5000
        with pytest.raises(CapacityError, match="rank 3.*404096 bytes.*ENOSPC"):
            try_save(volume, 30, num_floats=100_000)
        assert steps(volume) == [(10, 1), (20, 1)]


def test_acquire_without_room_for_a_third_slot_uses_an_old_one_later(tmp_path: Path) -> None:
    calls = FullVolume(1 << 30)
    with volume_at(tmp_path, calls=calls) as volume:
        for step in (10, 20):
            save(volume, step)
        calls.room = 0
        with pytest.raises(CapacityError):
            try_save(volume, 30, protect=((10, 1),))
        save(volume, 40)
        assert steps(volume) == [(20, 1), (40, 1)]


def test_seal_without_room_for_the_manifest_leaves_no_snapshot_and_a_usable_slot(tmp_path: Path) -> None:
    class NoRoom(SlotCalls):
        full = True

        def reached(self, step: str) -> None:
            if step == "manifest-written" and self.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    calls = NoRoom()
    with volume_at(tmp_path, calls=calls) as volume:
        with pytest.raises(CapacityError, match="seal step 10 of rank 3"):
            try_save(volume, 10)
        assert volume.scan() == []
        calls.full = False
        save(volume, 20, limit=1)
        assert steps(volume) == [(20, 1)]


# --------------------------------------------------------------------------------------------------- misuse


def test_seal_with_the_manifest_of_another_rank_is_refused(tmp_path: Path) -> None:
    payload, manifest = snapshot(4, identity(10))
    with volume_at(tmp_path) as volume:
        writer = volume.acquire(3, len(payload), protect=(), limit=1)
        assert writer is not None
        with pytest.raises(InternalError, match="expected rank, run, bytes"):
            writer.seal(manifest)
        with pytest.raises(InternalError, match="acquire a slot again"):
            writer.seal(manifest)
        assert volume.scan() == []


def test_writer_left_by_an_error_is_abandoned(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        writer = volume.acquire(3, 5000, protect=(), limit=1)
        assert writer is not None
        with pytest.raises(KeyError), writer:
            raise KeyError
        save(volume, 10, limit=1)


def test_volume_after_close_refuses_to_write(tmp_path: Path) -> None:
    volume = volume_at(tmp_path)
    volume.close()
    volume.close()
    with pytest.raises(InternalError, match="closed"):
        volume.acquire(3, 5000, protect=(), limit=1)


def test_volume_of_another_run_is_refused(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        record = volume.path / "volume.json"
    record.write_text(record.read_text().replace(RUN, "another"))
    with pytest.raises(ConflictError, match="another"):
        volume_at(tmp_path)


@pytest.mark.parametrize(("run", "node"), [("../x", NODE), (RUN, "a/b"), (RUN, ""), (".", NODE)])
def test_volume_name_that_walks_is_refused(tmp_path: Path, run: str, node: str) -> None:
    with pytest.raises(ConfigError, match="expected letters"):
        NodeVolume(tmp_path, run=run, node=node)
    assert list(tmp_path.iterdir()) == []


def test_volume_folder_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / RUN).mkdir()
    (tmp_path / RUN).chmod(0o777)
    with pytest.raises(ConfigError, match="others cannot write"):
        volume_at(tmp_path)


def test_volume_folder_behind_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / RUN).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="volume folder"):
        volume_at(tmp_path / "root")


def test_committed_without_announcement_is_empty_and_then_what_was_written(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        assert volume.committed() == {}
        volume.write_committed({"memory": (20, 2), "peer": (10, 1)})
    with volume_at(tmp_path) as again:
        assert again.committed() == {"memory": (20, 2), "peer": (10, 1)}


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"peer": 3}'])
def test_acquire_with_a_damaged_announcement_takes_nothing(tmp_path: Path, text: str) -> None:
    with volume_at(tmp_path) as volume:
        for step in (10, 20):
            save(volume, step, limit=2)
        (volume.path / "committed.json").write_text(text)
        with pytest.raises(CorruptionError, match=r"committed\.json"):
            try_save(volume, 30, limit=2)
        assert steps(volume) == [(10, 1), (20, 1)]


def test_translated_of_an_unknown_system_error_is_unavailable() -> None:
    with pytest.raises(UnavailableError, match=r"look: .*\(EIO\)"), translated("look"):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.parametrize("remove", [False, True])
def test_acquire_file_cut_or_removed_behind_our_back_is_made_whole_again(tmp_path: Path, remove: bool) -> None:
    """Writing beyond the end of a mapped file would end the trainer by SIGBUS; an unlinked one nobody would find."""
    with volume_at(tmp_path) as volume:
        slot = save(volume, 10, limit=1).slot
        payload = volume.path / f"{slot}.safetensors"
        if remove:
            payload.unlink()
        else:
            os.truncate(payload, 100)
        (volume.path / f"{slot}.manifest.json").unlink()
        assert save(volume, 20, limit=1).slot == slot
        assert steps(volume) == [(20, 1)]


def test_scan_payload_cut_after_it_was_seen_is_not_offered_and_named(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        payload = volume.path / f"{save(volume, 10).slot}.safetensors"
        assert [held.identity.step for held in volume.scan()] == [10]
        os.truncate(payload, 100)
        assert volume.scan() == []
        assert [problem.kind for problem in volume.problems()] == [ProblemKind.SHORT]
        with pytest.raises(NotFoundError):
            volume.open(3, identity(10))


def test_acquire_newest_gives_way_to_a_newer_committed_snapshot_alone(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save(volume, 20, 1)
        save(volume, 30, 1)
        kept = {"protect": ((20, 1),), "limit": 2}
        assert volume.acquire(3, 5000, **kept) is None  # type: ignore[arg-type]
        assert volume.acquire(3, 5000, **kept, over=(1, 30)) is None  # type: ignore[arg-type]
        writer = volume.acquire(3, 5000, **kept, over=(1, 31))  # type: ignore[arg-type]
        assert writer is not None
        writer.abandon()
        assert steps(volume) == [(20, 1)]
