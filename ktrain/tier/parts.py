"""Parts of a large write: who works on them, and the private memory that they are copied into.

Invariant: a part is digested and compared in the memory that it is sent from, after the last copy.
"""

from __future__ import annotations

import io
import random
import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

from ktrain import native
from ktrain.abc.proven import Chunks
from ktrain.base.clock import Deadline
from ktrain.errors import DeadlineError

Part = io.BytesIO
"""A part in private memory: S3 clients send files, and this one is filled in place through `getbuffer()`."""

_T = TypeVar("_T")
_WAIT_S = 0.5
_MAX_SAMPLES = 8
_NBYTES_PER_SAMPLE = 64 << 20
_KEPT_NBYTES = 64 << 20  # warm buffers that an idle tier keeps


class PartBuffers:
    """Private memory for parts in flight, `budget_nbytes` in all. Safe from any thread.

    Buffers are used again: memory whose pages exist is filled several times faster than new memory.
    """

    def __init__(self, budget_nbytes: int) -> None:
        self._budget_nbytes = budget_nbytes
        self._changed = threading.Condition()
        self._taken_nbytes = 0  # guarded by _changed
        self._peak_nbytes = 0  # guarded by _changed
        self._free: list[Part] = []  # guarded by _changed

    @property
    def peak_nbytes(self) -> int:
        """The most that was ever taken at once."""
        with self._changed:
            return self._peak_nbytes

    def take(self, nbytes: int, what: str, deadline: Deadline) -> Part:
        """A buffer of exactly `nbytes`, once the budget allows; one larger than the whole budget goes alone.

        Raises:
            DeadlineError: others hold the budget until then.
        """
        with self._changed:
            while self._taken_nbytes and self._taken_nbytes + nbytes > self._budget_nbytes:
                if deadline.expired():
                    raise DeadlineError(
                        f"{what}: parts of other writes held the {self._budget_nbytes} bytes of this node's budget for "
                        f"{deadline.total_s:g} s"
                    )
                self._changed.wait(min(_WAIT_S, deadline.remaining_s()))
            self._taken_nbytes += nbytes
            self._peak_nbytes = max(self._peak_nbytes, self._taken_nbytes)
            fitting = [buffer for buffer in self._free if nbytes_of(buffer) == nbytes]
            if fitting:
                self._free.remove(fitting[0])
                return fitting[0]
        return Part(bytes(nbytes))

    def give_back(self, buffer: Part, *, unused: bool) -> None:
        """Ends the use of a buffer; one that a request left behind may still read (`unused` false) is dropped."""
        with self._changed:
            self._taken_nbytes -= nbytes_of(buffer)
            if unused:
                self._free.append(buffer)
            while sum(nbytes_of(other) for other in self._free) > _KEPT_NBYTES:
                self._free.pop(0)
            self._changed.notify_all()


def nbytes_of(part: Part) -> int:
    """The size of a part."""
    with part.getbuffer() as view:
        return view.nbytes


def part_nbytes(nbytes: int, least: int, max_num: int, chunk_nbytes: int) -> int:
    """The size of parts, whole chunks: `least`, or more where there would be over `max_num` of them."""
    size = max(least, -(-nbytes // max_num))
    return -(-size // chunk_nbytes) * chunk_nbytes


def copy_proven(target: memoryview, source: memoryview, chunks: Chunks | None, where: tuple[int, int, str]) -> None:
    """Copies a part and compares its chunks in one pass over memory; `where`: first byte, whole size, what it is of.

    Raises:
        BadBytes: a chunk differs.
    """
    if chunks is None:
        target[:] = source
        return
    begin, nbytes, what = where
    chunks.check(native.copy_digest(target, source, chunk_nbytes=chunks.chunk_nbytes), begin, nbytes, what)


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
