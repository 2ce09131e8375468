"""Parts of a large write: who works on them, and how they are copied and proven.

Invariant: a part is digested and compared in the memory that it is sent from, after the last copy.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from ktrain import native
from ktrain.abc.proven import Chunks

Copy = Callable[[memoryview, memoryview, int], None]
"""Copies, of an object, the bytes from a place on into private memory, and proves them there."""

_T = TypeVar("_T")
_MAX_SAMPLES = 8
_NBYTES_PER_SAMPLE = 64 << 20


def part_nbytes(nbytes: int, least: int, max_num: int, chunk_nbytes: int) -> int:
    """The size of parts, whole chunks: `least`, or more where there would be over `max_num` of them."""
    size = max(least, -(-nbytes // max_num))
    return -(-size // chunk_nbytes) * chunk_nbytes


def copy_proven(
    target: memoryview, source: memoryview, begin: int, *, chunks: Chunks | None, of: tuple[int, str]
) -> None:
    """Copies bytes of an object from `begin` on, and compares their chunks in one pass; `of`: its size, what it is.

    Raises:
        BadBytes: a chunk differs.
    """
    if chunks is None:
        target[:] = source
        return
    chunks.check(native.copy_digest(target, source, chunk_nbytes=chunks.chunk_nbytes), begin, *of)


def sample_chunks(nbytes: int, chunk_nbytes: int) -> list[int]:
    """Which chunks of an object to read back: the first, the last, others by chance; one for each 64 MiB, 2 to 8."""
    num = -(-nbytes // chunk_nbytes)
    if num <= 2:
        return list(range(num))
    num_chosen = min(num, max(2, min(_MAX_SAMPLES, nbytes // _NBYTES_PER_SAMPLE)))
    return sorted({0, num - 1, *random.sample(range(1, num - 1), num_chosen - 2)})


def side_by_side(work: Callable[[_T], None], items: Iterable[_T], *, num_threads: int, name: str) -> None:
    """Does `work` on every item, several at a time; returns when all threads have ended.

    The first error stops all that has not begun, and is raised. What `work` waits for is bounded by itself. Threads are
    daemons: a process that ends does not wait for a store.
    """
    waiting = iter(list(items))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        while not errors:
            with lock:
                item = next(waiting, None)
            if item is None:
                return
            try:
                work(item)
            except BaseException as error:  # noqa: BLE001 -- top of a thread: the caller gets whatever happened
                errors.append(error)

    threads = [threading.Thread(target=run, name=f"{name} {k}", daemon=True) for k in range(num_threads - 1)]
    for thread in threads:
        thread.start()
    run()
    for thread in threads:
        thread.join()
    if errors:
        # The error must not be reachable from the frames that it knows: such a cycle would keep the caller's buffer,
        # perhaps a leased slot, until the garbage collector comes by.
        failure = errors[0]
        errors.clear()
        try:
            raise failure
        finally:
            del failure
