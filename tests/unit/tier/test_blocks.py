"""Large files on a disk: direct where it goes, buffered where it does not, and never a byte that is not proven."""

from __future__ import annotations

import errno
import logging
import mmap
import os
from pathlib import Path

import pytest

from ktrain import native
from ktrain.abc.proven import BadBytes, Chunks, Terms
from ktrain.base.clock import Deadline
from ktrain.base.pace import Pace
from ktrain.errors import DeadlineError
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.tier_conformance import soon
from ktrain.tier.blocks import BlockWriter, block_nbytes, open_direct, plan_blocks
from ktrain.tier.deadline import Call
from ktrain.tier.files import FileTier

_MIB = 1 << 20
_SIZES = (8 * _MIB, 8 * _MIB + 4096, 20 * _MIB + 12_345, 9 * _MIB + 1)


@pytest.fixture
def memory() -> memoryview:
    """Pages of their own, as a slot has, with other bytes in every block."""
    pages = mmap.mmap(-1, 21 * _MIB)
    for begin in range(0, len(pages), 4096):
        pages[begin : begin + 8] = begin.to_bytes(8, "big")
    return memoryview(pages)


def chunks_of(data: memoryview) -> Chunks:
    return Chunks(_MIB, native.digest_chunks(data, chunk_nbytes=_MIB))


def fill(writer: BlockWriter, path: Path, data: memoryview, terms: Terms | None = None) -> bytes:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    try:
        writer.write(Call("write x"), (path, fd), data, terms, soon())
    finally:
        os.close(fd)
    return path.read_bytes()


def refuse_to_open(path: Path) -> int:
    raise OSError(errno.EINVAL, "no such flag here")


@pytest.mark.parametrize("nbytes", _SIZES)
@pytest.mark.parametrize("opener", [open_direct, refuse_to_open])
def test_write_any_size_direct_or_not_stores_every_byte(
    tmp_path: Path, memory: memoryview, nbytes: int, opener: object
) -> None:
    data = memory[:nbytes]
    assert fill(BlockWriter(opener), tmp_path / "a", data) == data  # type: ignore[arg-type]


def test_write_from_memory_that_the_disk_refuses_goes_through_the_page_cache(
    tmp_path: Path, memory: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    odd = memory[1 : 1 + 17 * _MIB]
    writer = BlockWriter()
    with caplog.at_level(logging.DEBUG, "ktrain.tier.blocks"):
        for name in ("a", "b"):
            assert fill(writer, tmp_path / name, odd) == odd
    assert len(caplog.records) <= 1, "said once"


def test_write_refused_direct_handle_is_said_once(
    tmp_path: Path, memory: memoryview, caplog: pytest.LogCaptureFixture
) -> None:
    writer = BlockWriter(refuse_to_open)
    with caplog.at_level(logging.DEBUG, "ktrain.tier.blocks"):
        for name in ("a", "b"):
            fill(writer, tmp_path / name, memory)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_write_to_a_full_disk_raises_what_the_disk_said(tmp_path: Path, memory: memoryview) -> None:
    writer = BlockWriter(lambda path: os.open("/dev/full", os.O_WRONLY))
    with pytest.raises(OSError) as caught:
        fill(writer, tmp_path / "a", memory)
    assert caught.value.errno == errno.ENOSPC


def test_write_proven_stores_and_counts_what_matches(tmp_path: Path, memory: memoryview) -> None:
    tier, sent = FileTier(tmp_path, kind="disk"), []
    tier.write_proven("a/b", memory, Terms(chunks_of(memory), Pace(None), sent=sent.append), deadline=soon())
    assert (tmp_path / "a" / "b").read_bytes() == memory
    assert sum(sent) == memory.nbytes
    tier.close()


@pytest.mark.parametrize("nbytes", [100, 20 * _MIB])
def test_write_proven_bytes_that_changed_show_no_file_and_name_the_range(
    tmp_path: Path, memory: memoryview, nbytes: int
) -> None:
    data = memory[:nbytes]
    chunks = chunks_of(data)
    data[nbytes - 1] ^= 1
    tier = FileTier(tmp_path, kind="disk")
    with pytest.raises(BadBytes) as caught:
        tier.write_proven("a/b", data, Terms(chunks, Pace(None)), deadline=soon())
    assert caught.value.end == nbytes
    assert list(tmp_path.rglob("*")) == [tmp_path / "a"]
    tier.close()


def test_write_proven_under_a_rate_limit_that_is_too_low_is_late_and_shows_no_file(
    tmp_path: Path, memory: memoryview
) -> None:
    clock = FakeClock()
    tier = FileTier(tmp_path, kind="bucket")
    terms = Terms(chunks_of(memory), Pace(1e6, clock))
    with pytest.raises(DeadlineError, match="1e\\+06 bytes per second"):
        tier.write_proven("a", memory, terms, deadline=Deadline.after(10.0, clock))
    assert tier.list("", deadline=soon()) == []
    tier.close()


@pytest.mark.parametrize(
    ("nbytes", "chunk_nbytes", "expected"),
    [
        (8 * _MIB, _MIB, 8 * _MIB),
        (100 * _MIB, _MIB, 13 * _MIB),
        (100 * _MIB + 1, 4096, 12 * _MIB + _MIB // 2),
        (10_000 * _MIB, _MIB, 32 * _MIB),
    ],
)
def test_block_size_grows_with_the_file_and_is_whole_chunks(nbytes: int, chunk_nbytes: int, expected: int) -> None:
    assert block_nbytes(nbytes, chunk_nbytes) == expected


@pytest.mark.parametrize("nbytes", [1, 8 * _MIB, 95 * _MIB, 96 * _MIB + 1, 500 * _MIB + 12_345, 512 * _MIB])
def test_blocks_cover_the_file_in_whole_chunks_and_are_small_at_its_ends(nbytes: int) -> None:
    size = block_nbytes(nbytes, _MIB)
    blocks = plan_blocks(nbytes, size, _MIB)
    assert blocks[0][0] == 0 and blocks[-1][1] == nbytes
    assert all(end == begin for (_, end), (begin, _) in zip(blocks, blocks[1:], strict=False))
    assert all(begin % _MIB == 0 and 0 < end - begin <= size for begin, end in blocks)
    if nbytes >= 500 * _MIB:
        sizes = [end - begin for begin, end in blocks]
        assert max(sizes) == 32 * _MIB and max(sizes[:4]) == max(sizes[-4:]) == 8 * _MIB
