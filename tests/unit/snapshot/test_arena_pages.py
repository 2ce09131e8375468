"""How a slot gets its pages: huge where the system has them, near to the device, never more than asked for."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.errors import CapacityError
from ktrain.snapshot.slots import SlotCalls
from tests.unit.snapshot.builders import save, steps, volume_at

SHM = Path("/dev/shm")  # noqa: S108 -- a private folder is made in it
PAGE_NBYTES = os.sysconf("SC_PAGE_SIZE")
HUGE_NBYTES = 2 << 20
NBYTES = 2 * HUGE_NBYTES + 5000
NUM_FLOATS = NBYTES // 4


@pytest.fixture
def memory_root() -> Iterator[Path]:
    """A private folder on tmpfs."""
    if not SHM.is_dir():
        pytest.skip("this system has no /dev/shm")
    with tempfile.TemporaryDirectory(prefix="ktrain-test-", dir=SHM) as folder:
        yield Path(folder)


class Recording(SlotCalls):
    """Notes what huge pages were asked for, and what the system gave."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, int]] = []
        self.given: list[int] = []

    def back(self, fd: int, begin: int, end: int) -> int:
        self.asked.append((begin, end))
        self.given.append(super().back(fd, begin, end))
        return self.given[-1]


def payloads(root: Path) -> list[os.stat_result]:
    return [path.stat() for path in sorted(root.rglob("*.safetensors"))]


def test_prepare_on_tmpfs_takes_no_page_beyond_the_payload(memory_root: Path) -> None:
    calls = Recording()
    with volume_at(memory_root, calls=calls) as volume:
        volume.prepare(3, NBYTES, 2)
        assert calls.asked == [(0, NBYTES)] * 2
        assert all(given in (0, HUGE_NBYTES, 2 * HUGE_NBYTES) for given in calls.given)  # as the kernel likes
        sizes = [(found.st_size, found.st_blocks * 512) for found in payloads(memory_root)]
        assert sizes == [(NBYTES, -(-NBYTES // PAGE_NBYTES) * PAGE_NBYTES)] * 2


def test_save_on_tmpfs_into_slots_that_grow_and_shrink_is_proven(memory_root: Path) -> None:
    with volume_at(memory_root) as volume:
        for step, num_floats in ((10, 100), (20, NUM_FLOATS), (30, 3 * NUM_FLOATS), (40, NUM_FLOATS), (50, 100)):
            held = save(volume, step, num_floats=num_floats, limit=2)
            assert steps(volume)[-1] == (step, 1)
            newest = memory_root / volume.path / f"{held.slot}.safetensors"
            assert newest.stat().st_size == held.nbytes


def test_prepare_asks_for_pages_only_where_some_are_missing(memory_root: Path) -> None:
    calls = Recording()
    with volume_at(memory_root, calls=calls) as volume:
        volume.prepare(3, NBYTES, 1)
    with volume_at(memory_root, calls=calls) as again:
        again.prepare(3, NBYTES, 1)
    assert len(calls.asked) == 1


def test_slot_without_huge_pages_is_as_good(memory_root: Path) -> None:
    class Refusing(SlotCalls):
        def back(self, fd: int, begin: int, end: int) -> int:
            return 0

    with volume_at(memory_root, calls=Refusing()) as volume:
        save(volume, 10, num_floats=NUM_FLOATS)
        assert steps(volume) == [(10, 1)]


def test_slot_that_is_refused_after_its_huge_pages_were_made_gives_them_back(memory_root: Path) -> None:
    class FullAfterwards(SlotCalls):
        def reserve(self, fd: int, nbytes: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with volume_at(memory_root, calls=FullAfterwards()) as volume:
        with pytest.raises(CapacityError):
            volume.prepare(3, NBYTES, 1)
        assert [(found.st_size, found.st_blocks) for found in payloads(memory_root)] == [(0, 0)]


def test_back_of_more_than_the_volume_has_room_for_begins_nothing(memory_root: Path) -> None:
    stat = os.statvfs(memory_root)
    fd = os.open(memory_root / "file", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        assert SlotCalls().back(fd, 0, (stat.f_bavail + 1) * stat.f_frsize) == 0
        assert os.fstat(fd).st_size == 0
    finally:
        os.close(fd)


def test_new_pages_are_made_on_the_processors_that_are_near(memory_root: Path) -> None:
    before = os.sched_getaffinity(0)
    one = frozenset({min(before)})
    seen: list[frozenset[int]] = []

    class Looking(SlotCalls):
        def near(self) -> frozenset[int]:
            return one

        def reserve(self, fd: int, nbytes: int) -> None:
            seen.append(frozenset(os.sched_getaffinity(0)))
            super().reserve(fd, nbytes)

    with volume_at(memory_root, calls=Looking()) as volume:
        for step in (10, 20, 30, 40):
            save(volume, step)
    assert seen == [one] * 2  # for two slots; later saves find their pages
    assert os.sched_getaffinity(0) == before
