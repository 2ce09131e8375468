from __future__ import annotations

import gc
import os
import sys
import weakref
from pathlib import Path

import pytest

from ktrain import native
from ktrain.errors import ConfigError

HUGE_NBYTES = 2 << 20
LINUX_ONLY = pytest.mark.skipif(sys.platform != "linux", reason="huge pages of tmpfs are Linux's")


@pytest.fixture
def file(tmp_path: Path) -> int:
    """A file of 10,000 bytes, open for reading and writing."""
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT, 0o600)
    os.write(fd, bytes(range(250)) * 40)
    return fd


def test_map_file_for_writing_changes_the_file(file: int) -> None:
    memory = memoryview(native.map_file(file, 10_000, writable=True))
    memory[9_999] = 77
    assert os.pread(file, 1, 9_999) == b"\x4d"
    assert memory.nbytes == 10_000


def test_map_file_for_reading_shows_the_file_and_cannot_be_written(file: int) -> None:
    os.lseek(file, 0, os.SEEK_SET)
    mapping = native.map_file(file, 5_000, writable=False)
    memory = memoryview(mapping)
    assert len(mapping) == 5_000
    assert memory.readonly
    assert memory == bytes(range(250)) * 20


def test_map_file_lives_as_long_as_the_last_view_and_no_longer(file: int) -> None:
    mapping = native.map_file(file, 5_000, writable=False)
    seen = weakref.ref(mapping)
    view = memoryview(mapping)[10:20]
    os.close(file)
    del mapping
    gc.collect()
    assert seen() is not None
    assert view == bytes(range(10, 20))
    del view
    assert seen() is None


@LINUX_ONLY
def test_map_file_begins_where_a_huge_page_can(file: int) -> None:
    import ctypes

    mapping = native.map_file(file, 5_000, writable=True)
    assert ctypes.addressof(ctypes.c_char.from_buffer(mapping)) % HUGE_NBYTES == 0


def test_map_file_of_no_file_is_the_systems_error() -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        native.map_file(-1, 5_000, writable=False)


def test_map_file_of_nothing_is_refused(file: int) -> None:
    with pytest.raises(ConfigError, match="nbytes is 0"):
        native.map_file(file, 0, writable=False)


def test_back_huge_elsewhere_than_on_tmpfs_does_nothing(file: int) -> None:
    assert native.back_huge(file, 0, 10_000) == 0
    assert os.fstat(file).st_size == 10_000
