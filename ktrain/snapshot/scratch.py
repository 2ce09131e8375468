"""Files on a node's volume that another process of the node fills for a reader, piece by piece.

Invariant: a file belongs to the process that holds its lock; one that nobody holds is removed by the next reader.
"""

from __future__ import annotations

import fcntl
import os
import threading
from dataclasses import dataclass
from mmap import PROT_READ, mmap
from pathlib import Path

from ktrain.base import ids
from ktrain.snapshot.slots import translated, try_flock

_PREFIX = "read-"


@dataclass(frozen=True, slots=True)
class ScratchFile:
    """A file of a fixed size with every byte backed; `memory` is its bytes, read-only here."""

    path: Path
    memory: memoryview
    lock_fd: int


class Scratch:
    """The scratch files of one reader, used again by one read after the other. Safe from any thread.

    Args:
        folder: of the node, in its volume.
        nbytes: of each file.
    """

    def __init__(self, folder: Path, nbytes: int) -> None:
        self._folder = folder
        self._nbytes = nbytes
        self._lock = threading.Lock()
        self._free: list[ScratchFile] = []  # guarded by _lock
        with translated(f"look for scratch files in {folder}"):
            for path in folder.glob(f"{_PREFIX}*"):
                fd = try_flock(path, fcntl.LOCK_EX)
                if fd is not None:  # its maker is dead
                    path.unlink(missing_ok=True)
                    os.close(fd)

    def take(self) -> ScratchFile:
        """A file for one read.

        Raises:
            CapacityError: the volume is full.
        """
        with self._lock:
            if self._free:
                return self._free.pop()
        path = self._folder / f"{_PREFIX}{ids.random_id()}"
        with translated(f"make {path} of {self._nbytes} bytes"):
            hidden = path.with_name(f".{path.name}")  # until it is locked
            fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX)
                os.rename(hidden, path)
                os.posix_fallocate(fd, 0, self._nbytes)
                return ScratchFile(path, memoryview(mmap(fd, self._nbytes, prot=PROT_READ)), fd)
            except BaseException:
                path.unlink(missing_ok=True)
                os.close(fd)
                raise

    def give(self, file: ScratchFile) -> None:
        """Takes a file back that nobody writes to any more."""
        with self._lock:
            self._free.append(file)

    def drop(self, file: ScratchFile) -> None:
        """Removes a file that somebody may still be writing to; its memory goes when they are done."""
        file.path.unlink(missing_ok=True)
        os.close(file.lock_fd)

    def close(self) -> None:
        """Removes the files that were given back. May be called again."""
        with self._lock:
            files, self._free = self._free, []
        for file in files:
            self.drop(file)
