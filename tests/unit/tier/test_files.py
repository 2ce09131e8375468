"""The tier in a folder: whole or absent, no space, torn files of dead writers."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base.clock import Deadline
from ktrain.errors import CapacityError, CorruptionError, DeadlineError, ForbiddenError, NotFoundError
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.tier_conformance import soon
from ktrain.tier.deadline import Call
from ktrain.tier.files import FileTier
from ktrain.tier.location import open_tier


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[FileTier]:
    tier = FileTier(tmp_path / "run", kind="disk")
    yield tier
    tier.close()


@pytest.fixture
def small_files() -> Iterator[int]:
    """This process may write files of 64 KiB at most, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 << 10, hard))
    yield 64 << 10
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_open_tier_path_and_file_url_name_the_same_folder(tmp_path: Path) -> None:
    assert open_tier(str(tmp_path)).url == str(tmp_path)
    assert open_tier(f"file://{tmp_path}").url == str(tmp_path)
    assert open_tier("runs/net-a").url == str(Path.cwd() / "runs" / "net-a")
    assert open_tier("runs/net-a", kind="disk").kind == "disk"


def test_write_more_than_fits_is_capacity_and_leaves_the_old_object_and_nothing_else(
    tier: FileTier, tmp_path: Path, small_files: int
) -> None:
    tier.write("a/b", b"old", deadline=soon())
    with pytest.raises(CapacityError, match="a/b"):
        tier.write("a/b", bytes(small_files + 1), deadline=soon())
    assert tier.read("a/b", deadline=soon()) == b"old"
    assert os.listdir(tmp_path / "run" / "a") == ["b"]


def test_write_where_nobody_may_write_is_forbidden() -> None:
    with pytest.raises(ForbiddenError, match="/sys/ktrain-test"):
        FileTier(Path("/sys/ktrain-test"), kind="disk").write("a", b"x", deadline=soon())


def test_write_whose_caller_left_never_shows_its_bytes(tier: FileTier, tmp_path: Path) -> None:
    tier.write("a/b", b"old", deadline=soon())
    call = Call("write a/b")
    call.given_up = True
    with pytest.raises(DeadlineError):
        tier._put(call, "a/b", lambda call, path, fd: None, os.replace)
    assert tier.read("a/b", deadline=soon()) == b"old"
    assert os.listdir(tmp_path / "run" / "a") == ["b"]


def test_read_fifo_that_nobody_feeds_ends_at_the_deadline(tier: FileTier, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "pipe")
    with pytest.raises(DeadlineError, match="pipe"):
        tier.read("pipe", deadline=Deadline.after(0.1))
    tier.write("other", b"x", deadline=soon())
    assert tier.read("other", deadline=soon()) == b"x"
    os.close(os.open(tmp_path / "run" / "pipe", os.O_RDWR))  # frees the thread that was left behind


def test_read_range_of_object_cut_short_is_corruption_with_the_sizes(tier: FileTier) -> None:
    tier.write("a", bytes(100), deadline=soon())
    with pytest.raises(CorruptionError, match="expected 101 bytes or more, found 100 bytes"):
        tier.read_range("a", 0, 101, deadline=soon())


def test_list_and_delete_with_a_dead_writers_file_hide_it_and_remove_it(tier: FileTier, tmp_path: Path) -> None:
    torn = tmp_path / "run" / "step" / ".rank-0.0a0b.ktrain-tmp"
    torn.parent.mkdir(parents=True)
    torn.write_bytes(b"half")
    tier.write("a", b"x", deadline=soon())
    assert [stored.name for stored in tier.list("", deadline=soon())] == ["a"]
    assert torn.exists()
    tier.delete("a", deadline=soon())
    assert not torn.parent.exists()


def test_delete_with_a_living_writers_file_leaves_it(tier: FileTier, tmp_path: Path) -> None:
    growing = tmp_path / "run" / "step" / ".rank-0.0a0b.ktrain-tmp"
    growing.parent.mkdir(parents=True)
    with growing.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        tier.delete("a", deadline=soon())
        assert growing.exists()


def test_delete_last_object_of_a_folder_removes_the_empty_folders(tier: FileTier, tmp_path: Path) -> None:
    tier.write("checkpoints/step/data/a", b"x", deadline=soon())
    tier.write("checkpoints/b", b"x", deadline=soon())
    tier.delete("checkpoints/step/data/a", deadline=soon())
    assert os.listdir(tmp_path / "run" / "checkpoints") == ["b"]


def test_create_on_a_file_system_without_hard_links_still_has_one_winner(
    tier: FileTier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(source: Path, target: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    tier.create("run.json", b"first", deadline=soon())
    with pytest.raises(Exception, match="run.json") as caught:
        tier.create("run.json", b"second", deadline=soon())
    assert caught.value.kind == "conflict"  # type: ignore[attr-defined]
    assert tier.read("run.json", deadline=soon()) == b"first"
    assert os.listdir(tmp_path / "run") == ["run.json"]


def test_call_under_a_clock_of_a_test_is_given_real_time(tier: FileTier) -> None:
    clock = FakeClock()
    tier.write("a", bytes(8 << 20), deadline=Deadline.after(30.0, clock))
    assert len(tier.read("a", deadline=Deadline.after(30.0, clock))) == 8 << 20
    with pytest.raises(DeadlineError):
        tier.read("a", deadline=Deadline.after(0.0, clock))


def nothing(at: int, memory: memoryview) -> None:
    """Takes a piece."""


def test_read_pieces_gives_exactly_the_range_in_order(tier: FileTier) -> None:
    data = bytes(range(256)) * 40
    tier.write("a", data, deadline=soon())
    taken: list[tuple[int, bytes]] = []
    for bounds in ((1000, 1250), (5, 5)):
        tier.read_pieces("a", bounds, lambda at, m: taken.append((at, bytes(m))), piece_nbytes=100, deadline=soon())
    assert taken == [(1000, data[1000:1100]), (1100, data[1100:1200]), (1200, data[1200:1250])]


def test_read_pieces_error_of_who_takes_them_ends_the_read_and_is_raised(tier: FileTier) -> None:
    tier.write("a", bytes(1000), deadline=soon())
    taken: list[int] = []

    def refuse(at: int, memory: memoryview) -> None:
        taken.append(at)
        raise CorruptionError("not these")

    with pytest.raises(CorruptionError, match="not these"):
        tier.read_pieces("a", (0, 1000), refuse, piece_nbytes=100, deadline=soon())
    assert taken == [0]


def test_read_pieces_beyond_the_end_is_corruption_with_both_sizes(tier: FileTier) -> None:
    tier.write("a", bytes(100), deadline=soon())
    with pytest.raises(CorruptionError, match=r"\[60, 110\) of a: expected 110 bytes or more, found 100"):
        tier.read_pieces("a", (60, 110), nothing, piece_nbytes=100, deadline=soon())


def test_read_pieces_of_nothing_there_is_not_found(tier: FileTier) -> None:
    with pytest.raises(NotFoundError):
        tier.read_pieces("a", (0, 5), nothing, piece_nbytes=100, deadline=soon())
