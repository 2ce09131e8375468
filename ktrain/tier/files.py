"""A tier in a folder of a file system: node disk, network disk, or what fsspec calls file://.

An object is written to a temporary name beside its own, fsynced, renamed, and its folder fsynced: after
`write` has returned it survives a power cut, and a reader sees it whole or not at all. That is this store's
own way; nothing outside this file relies on a rename. Temporary files of writers that died are removed by the
first `delete`: each writer holds an advisory lock on its temporary file, so one that can be locked has no
writer.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from ktrain.abc.proven import Terms
from ktrain.abc.tier import Buffer, Stored, check_name, check_prefix
from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.errors import CapacityError, CorruptionError, KtrainError
from ktrain.tier.answers import translate, translate_write
from ktrain.tier.blocks import LEAST_NBYTES, BlockWriter
from ktrain.tier.deadline import BoundedCalls, Call

_MAX_READS_AT_ONCE = 8  # in pieces: one more than there are processors; many more took a sixth longer (2026-11-27)
_RANGE_NBYTES = 16 << 20  # large beside the cost of a call
_PIECE_NBYTES = 32 << 20  # between two looks at whether anybody still waits
_TEMPORARY = ".ktrain-tmp"
_NO_HARD_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_T = TypeVar("_T")
_Fill = Callable[[Call, Path, int], None]  # writes the content into a new file, given as its path and handle


class FileTier:
    """Objects as files below `root`, which is made by the first write."""

    supports_create = True
    shows_whole = True  # by the rename: writing equal bytes twice is seen by nobody

    def __init__(self, root: Path, *, kind: str) -> None:
        self.kind = kind
        self.url = str(root)
        self._root = root
        self._calls = BoundedCalls()
        self._blocks = BlockWriter()
        num_reads = min(_MAX_READS_AT_ONCE, 1 + len(os.sched_getaffinity(0)))
        self._reads = BoundedCalls(limit=num_reads, late_limit=num_reads)
        self._own = threading.local()  # memory that a thread of `_reads` reads into
        self._swept = False
        self._durable: set[Path] = set()  # folders whose names are known to be on the disk

    def write(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        self._write(name, data, None, deadline)

    def write_proven(self, name: str, data: Buffer, terms: Terms, *, deadline: Deadline) -> None:
        """See `ktrain.abc.proven.ProvesWrites`. The kernel keeps what it was given; nothing is read back."""
        self._write(name, data, terms, deadline)

    def _write(self, name: str, data: Buffer, terms: Terms | None, deadline: Deadline) -> None:
        view = memoryview(data).cast("B")

        def fill(call: Call, path: Path, fd: int) -> None:
            if terms is None and view.nbytes < LEAST_NBYTES:
                _write_all(call, fd, view)
            else:
                self._blocks.write(call, (path, fd), view, terms, deadline)

        self._run("write", check_name(name), lambda call: self._put(call, name, fill, os.replace), deadline)

    def create(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        def fill(call: Call, path: Path, fd: int) -> None:
            _write_all(call, fd, memoryview(data).cast("B"))

        self._run("create", check_name(name), lambda call: self._put(call, name, fill, _link), deadline)

    def read(self, name: str, *, deadline: Deadline) -> bytes:
        path = self._root / check_name(name)
        return self._run("read", name, lambda call: _read(call, path, 0, None), deadline)

    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes:
        path = self._root / check_name(name)
        if begin == end:
            return b""
        return self._run(f"read [{begin}, {end}) of", name, lambda call: _read(call, path, begin, end), deadline)

    @property
    def range_nbytes(self) -> int:
        """See `ktrain.abc.tier.ReadsInPieces`."""
        return _RANGE_NBYTES

    def read_pieces(
        self,
        name: str,
        bounds: tuple[int, int],
        take: Callable[[int, memoryview], None],
        *,
        piece_nbytes: int,
        deadline: Deadline,
    ) -> None:
        """See `ktrain.abc.tier.ReadsInPieces`. Each thread keeps its memory for as long as it lives."""
        path = self._root / check_name(name)

        def read(call: Call) -> None:
            memory = getattr(self._own, "memory", None)
            if memory is None or memory.nbytes < piece_nbytes:
                memory = self._own.memory = memoryview(mmap.mmap(-1, piece_nbytes))
            _read_pieces(call, path, bounds, memory[:piece_nbytes], take)

        if bounds[0] < bounds[1]:
            self._run(f"read [{bounds[0]}, {bounds[1]}) of", name, read, deadline, self._reads)

    def list(self, prefix: str, *, deadline: Deadline) -> list[Stored]:
        prefix = check_prefix(prefix)

        def find(call: Call) -> list[Stored]:
            found = _walk(call, self._root / prefix, prefix)
            return sorted((stored for stored in found if not _is_temporary(stored.name)), key=lambda s: s.name)

        return self._run("list", prefix or "all", find, deadline)

    def delete(self, name: str, *, deadline: Deadline) -> None:
        self._run("delete", check_name(name), lambda call: self._remove(call, name), deadline)

    def close(self) -> None:
        self._calls.close()
        self._reads.close()

    def _run(
        self, verb: str, name: str, work: Callable[[Call], _T], deadline: Deadline, calls: BoundedCalls | None = None
    ) -> _T:
        what = f"{self.kind} tier {self.url}: {verb} {name}"
        try:
            return (calls or self._calls).run(what, work, deadline=deadline)
        except OSError as error:
            if isinstance(error, KtrainError):  # DeadlineError is a TimeoutError, which is an OSError
                raise
            meaning = translate_write if verb in ("write", "create") else translate
            raise meaning(error, what) from error

    def _put(self, call: Call, name: str, fill: _Fill, publish: Callable[[Path, Path], None]) -> None:
        target = self._root / name
        temporary = target.with_name(f".{target.name[:150]}.{ids.random_id()}{_TEMPORARY}")
        fd, made = _open_in_folder(temporary)
        try:
            _try_lock(fd)  # where there are no locks nobody sweeps either
            fill(call, temporary, fd)
            os.fsync(fd)
            call.check()  # every byte was read while the caller still kept it unchanged
            publish(temporary, target)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                free, nbytes = os.statvfs(target.parent), os.fstat(fd).st_size
                raise CapacityError(
                    f"{call.what}: no space is left after {nbytes} bytes,"
                    f" {free.f_bavail * free.f_frsize} bytes are free; free space or keep fewer checkpoints"
                ) from error
            raise
        finally:
            temporary.unlink(missing_ok=True)
            os.close(fd)
        _sync_folder(target.parent)
        self._sync_path(target.parent, made)

    def _sync_path(self, folder: Path, made: Sequence[Path]) -> None:
        """Makes the folders on the way to a file durable too: once for each, and after the file, so that a journal that
        was written for the file has most of it already.
        """
        on_the_way = [folder, *folder.parents]
        for each in on_the_way[: on_the_way.index(self._root) + 1]:
            if each in made or each not in self._durable:
                _sync_folder(each.parent)
                self._durable.add(each)
        for each in made:
            if each not in self._durable:  # above the root
                _sync_folder(each.parent)

    def _remove(self, call: Call, name: str) -> None:
        target = self._root / name
        try:
            target.unlink(missing_ok=True)
        except NotADirectoryError:
            return  # a part of the path is an object: there is nothing below it
        self._remove_empty_folders(target.parent)
        if not self._swept:
            self._swept = True
            for stored in list(_walk(call, self._root, "")):
                if _is_temporary(stored.name) and _is_abandoned(self._root / stored.name):
                    (self._root / stored.name).unlink(missing_ok=True)
                    self._remove_empty_folders((self._root / stored.name).parent)

    def _remove_empty_folders(self, folder: Path) -> None:
        while folder != self._root:
            self._durable.discard(folder)
            try:
                folder.rmdir()
            except FileNotFoundError:
                pass
            except OSError:
                return  # not empty, or not ours to remove: it is only a folder
            folder = folder.parent


def _open_in_folder(temporary: Path) -> tuple[int, list[Path]]:
    """Opens a new file, making its folders, which are returned; another process may remove an empty one in between."""
    for attempt in range(3):
        made = _make_folders(temporary.parent)
        try:
            return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666), made
        except FileNotFoundError:
            if attempt == 2:
                raise
    raise AssertionError("unreachable")


def _make_folders(folder: Path) -> list[Path]:
    missing = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        made.mkdir(exist_ok=True)
    return missing


def _sync_folder(folder: Path) -> None:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return  # removed by another process, or not ours to read
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):  # file systems without it
            raise
    finally:
        os.close(fd)


def _write_all(call: Call, fd: int, data: memoryview) -> None:
    done = 0
    while done < data.nbytes:
        call.check()
        done += os.write(fd, data[done : done + _PIECE_NBYTES])


def _link(temporary: Path, target: Path) -> None:
    """Shows the finished file under its name unless there is one: a link, unlike a rename, never replaces."""
    try:
        os.link(temporary, target)
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # File systems without hard links: the name is taken first, then the finished file replaces it. A
        # crash in between leaves an empty object, which proves itself wrong to every reader.
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
        os.replace(temporary, target)


def _read(call: Call, path: Path, begin: int, end: int | None) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        nbytes = os.fstat(fd).st_size
        end = nbytes if end is None else end
        _require_end(call, end, nbytes)
        pieces = []
        while begin < end:
            call.check()
            piece = os.pread(fd, min(_PIECE_NBYTES, end - begin), begin)
            _require_some(call, len(piece))
            pieces.append(piece)
            begin += len(piece)
        return b"".join(pieces)
    finally:
        os.close(fd)


def _read_pieces(
    call: Call, path: Path, bounds: tuple[int, int], memory: memoryview, take: Callable[[int, memoryview], None]
) -> None:
    begin, end = bounds
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _require_end(call, end, os.fstat(fd).st_size)
        for at in range(begin, end, memory.nbytes):
            piece = memory[: min(memory.nbytes, end - at)]
            done = 0
            while done < piece.nbytes:
                call.check()
                count = os.preadv(fd, [piece[done:]], at + done)
                _require_some(call, count)
                done += count
            with call.hands_over():
                take(at, piece)
    finally:
        os.close(fd)


def _require_end(call: Call, end: int, nbytes: int) -> None:
    if end > nbytes:
        raise CorruptionError(f"{call.what}: expected {end} bytes or more, found {nbytes} bytes; try another copy")


def _require_some(call: Call, count: int) -> None:
    if not count:
        raise CorruptionError(f"{call.what}: the file was cut short while it was read; try another copy")


def _walk(call: Call, folder: Path, prefix: str) -> Iterator[Stored]:
    """Every file below the folder, temporary ones too. A folder that is gone is empty; one that cannot be
    read raises.
    """
    call.check()
    try:
        entries = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        name = f"{prefix}/{entry.name}" if prefix else entry.name
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(call, folder / entry.name, name)
        else:
            try:
                yield Stored(name, entry.stat().st_size)
            except FileNotFoundError:
                continue  # removed since the folder was read


def _is_temporary(name: str) -> bool:
    return name.endswith(_TEMPORARY)


def _is_abandoned(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, PermissionError):
        return False
    try:
        return _try_lock(fd)
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    """True when the lock is ours now; false when another holds it or this file system knows no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
