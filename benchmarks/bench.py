"""What cases share in one run: sizes, private folders, and rigs that are made at first use and ended at the end."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from benchmarks.harness import Bytes, random_bytes

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. One set of sizes is one kind of record."""

    name: str
    nbytes: int  # of parameters in the large state
    num_tensors: int
    num_small: int  # tensors of the state with many small ones
    small_nbytes: int  # of each of them
    s3_nbytes: int  # what goes to the test S3 server, which takes some 100 MB/s
    loop_nbytes: int  # parameters and optimizer state of the training loop
    num_saves: int  # of the training loop
    repeats: int = 7


FULL = Sizes("full", 512 << 20, 500, 20_000, 10_000, 128 << 20, 256 << 20, 20)
QUICK = Sizes("quick", 32 << 20, 100, 2_000, 2_000, 16 << 20, 24 << 20, 5, repeats=5)
TINY = Sizes("tiny", 3 << 20, 12, 48, 200, 2 << 20, 3 << 20, 2, repeats=1)


@dataclass(slots=True)
class Bench:
    """One run of the benchmarks. Everything in its folders is removed when the `with` ends."""

    sizes: Sizes
    disk: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))
    stack: ExitStack = field(default_factory=ExitStack)
    _made: dict[str, Any] = field(default_factory=dict)

    @property
    def threads(self) -> int:
        """Threads that a rank alone on this machine copies with, as ktrain chooses them."""
        return max(1, min(8, len(os.sched_getaffinity(0))))

    @property
    def volume_root(self) -> Path:
        """A private folder on a memory-backed file system."""
        shm = Path("/dev/shm")  # noqa: S108 -- a private folder is made in it
        return self.once("volume_root", lambda: self._folder(shm if shm.is_dir() else None))

    @property
    def work_dir(self) -> Path:
        """A private folder on the disk."""
        return self.once("work_dir", lambda: self._folder(self.disk))

    def once(self, name: str, make: Callable[[], _T]) -> _T:
        """What was made under the name before, or now."""
        if name not in self._made:
            self._made[name] = make()
        found: _T = self._made[name]
        return found

    def buffers(self, nbytes: int) -> tuple[Bytes, Bytes]:
        """Warm (source, target) for a plain copy; made once and shared, so that memory stays bounded."""

        def make() -> tuple[Bytes, Bytes]:
            source = random_bytes(nbytes)
            return source, source.copy()

        found = self._made.get("buffers")
        if found is None or found[0].nbytes < nbytes:
            found = self._made["buffers"] = make()
        return found[0][:nbytes], found[1][:nbytes]

    def _folder(self, base: Path | None) -> Path:
        return Path(self.stack.enter_context(tempfile.TemporaryDirectory(prefix="ktrain-bench-", dir=base)))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._made.clear()
        self.stack.close()
