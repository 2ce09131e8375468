"""Listing, removing and sizing volumes."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain.errors import CapacityError, ConfigError, ConflictError
from ktrain.snapshot.arena import KEPT_SLOTS, NodeVolume, Slots, list_volumes, remove_volume, required_nbytes
from tests.unit.snapshot.builders import RUN, identity, save, volume_at

GIB = 1 << 30


def budget(**changes: int) -> int:
    numbers = {"free_nbytes": 64 * GIB, "held_nbytes": 0}
    return required_nbytes(Slots(4, 3, GIB), Slots(4, KEPT_SLOTS, GIB // 2), **{**numbers, **changes})


def test_list_volumes_names_every_run_and_node(tmp_path: Path) -> None:
    with volume_at(tmp_path, uri="runs/net-a") as volume, NodeVolume(tmp_path, run="b1", node="node-7"):
        save(volume, 10)
        save(volume, 20)
        found = list_volumes(tmp_path)
    assert [(v.run, v.node, v.uri) for v in found] == [(RUN, "node-0", "runs/net-a"), ("b1", "node-7", "")]
    assert [held.identity.step for held in found[0].held] == [10, 20]
    assert found[0].nbytes >= 2 * found[0].held[0].nbytes
    assert (found[1].held, found[1].nbytes) == ((), 0)


@pytest.mark.parametrize("uri", ["s3://me:hunter2@bucket/net-a", "https://host/net-a?signature=hunter2"])
def test_volume_of_a_uri_with_credentials_is_refused_and_writes_none_of_it(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="without password, token and query") as caught:
        volume_at(tmp_path, uri=uri)
    assert "hunter2" not in str(caught.value)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    with volume_at(tmp_path, uri="s3://bucket/net-a"):  # nothing is held or claimed
        assert [info.uri for info in list_volumes(tmp_path)] == ["s3://bucket/net-a"]


def test_list_volumes_without_a_root_is_empty(tmp_path: Path) -> None:
    assert list_volumes(tmp_path / "absent") == []


def test_list_volumes_tells_live_from_left_over(tmp_path: Path) -> None:
    with volume_at(tmp_path):
        assert [info.live for info in list_volumes(tmp_path)] == [True]
    assert [info.live for info in list_volumes(tmp_path)] == [False]


def test_list_volumes_shows_a_folder_whose_record_is_damaged(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save(volume, 10)
    (volume.path / "volume.json").write_text("{")
    (info,) = list_volumes(tmp_path)
    assert (info.run, len(info.held)) == (RUN, 1)
    remove_volume(info)
    assert list_volumes(tmp_path) == []


def test_remove_volume_of_a_left_over_frees_its_bytes_and_the_folders(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        held = save(volume, 10)
    (info,) = list_volumes(tmp_path)
    assert remove_volume(info) == info.nbytes >= held.nbytes
    assert list(tmp_path.iterdir()) == []
    assert remove_volume(info) == 0


def test_remove_volume_of_a_live_one_is_refused_and_keeps_all(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        save(volume, 10)
        (info,) = list_volumes(tmp_path)
        with pytest.raises(ConflictError, match="living process"):
            remove_volume(info)
        assert len(volume.scan()) == 1


def test_remove_keeps_the_folder_of_another_node(tmp_path: Path) -> None:
    with NodeVolume(tmp_path, run=RUN, node="node-1") as other:
        volume_at(tmp_path).remove()
        assert [info.node for info in list_volumes(tmp_path)] == ["node-1"]
        save(other, 10)


def test_remove_while_a_snapshot_is_read_is_refused(tmp_path: Path) -> None:
    volume = volume_at(tmp_path)
    save(volume, 10)
    with volume.open(3, identity(10)) as reader:
        with pytest.raises(ConflictError, match=r"slot-0\.lease"):
            volume.remove()
        assert len(reader.memory) > 0
    assert volume.remove() > 0


def test_remove_then_open_makes_the_volume_again(tmp_path: Path) -> None:
    volume = volume_at(tmp_path)
    save(volume, 10)
    volume.remove()
    with volume_at(tmp_path) as again:
        assert again.scan() == []
        save(again, 20)


def test_held_nbytes_counts_slots_that_hold_nothing_too(tmp_path: Path) -> None:
    with volume_at(tmp_path) as volume:
        assert volume.held_nbytes() == 0
        volume.prepare(3, 1 << 20, 2)
        assert volume.held_nbytes() >= 2 << 20
        assert volume.free_nbytes() > 0


def test_required_nbytes_counts_own_and_kept_slots() -> None:
    expected = 4 * 3 * GIB + 4 * KEPT_SLOTS * GIB // 2
    assert expected < budget() < expected * 1.001


def test_required_nbytes_counts_held_slots_as_room() -> None:
    needed = budget()
    assert budget(free_nbytes=0, held_nbytes=needed) == needed
    with pytest.raises(CapacityError, match="1 too few"):
        budget(free_nbytes=needed - 1, held_nbytes=0)


def test_required_nbytes_refusal_shows_the_numbers() -> None:
    with pytest.raises(CapacityError, match=r"4 ranks x 3 slots x.*4 ranks x 2 slots.*7 bytes free and 5 in"):
        budget(free_nbytes=7, held_nbytes=5)
