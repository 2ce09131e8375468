"""The reader's side of collection: a step that is read stays as long as its reader lives (ADR 0012).

Invariant: the mark is there before the record is read, and its writer looks for a collector's mark in between.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ktrain.base import ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import Finding, RunCatalog, verify_commit
from ktrain.checkpoint.marks import read_marks, reader_name, remove_mark, write_mark
from ktrain.errors import KtrainError
from ktrain.format.record import CommitRecord

_RENEWALS_PER_LEASE = 3


@contextmanager
def reading(
    catalog: RunCatalog, step: int, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK
) -> Iterator[KtrainError | None]:
    """Keeps collectors off a step within the block; read the step's commit records inside of it.

    Yields None, or the reason why the step is not protected: a reader that may not write into the run reads all the
    same, and may find that the step was collected (then its commit record is gone, too).
    """
    mark = _ReaderMark(catalog, step, timeouts, clock)
    failure: KtrainError | None = None
    try:
        mark.start()
        await_collectors(catalog, step, timeouts=timeouts, clock=clock)
    except KtrainError as error:
        failure = error
    try:
        yield failure
    finally:
        mark.close()


def verify_read(
    catalog: RunCatalog, commit: CommitRecord, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK
) -> tuple[list[Finding] | None, KtrainError | None]:
    """Reads every byte of a checkpoint while collectors are kept off it.

    Returns what is not proven, or None when it was collected before it was read; and why it was not protected, if so.
    """
    with reading(catalog, commit.identity.step, timeouts=timeouts, clock=clock) as failure:
        found = list(verify_commit(catalog, commit))
        if found and commit not in catalog.listing().commits:
            return None, failure
        return found, failure


def await_collectors(catalog: RunCatalog, step: int, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
    """Returns once no collector that could have missed a mark written before this call is at work on the step.

    A collector's mark that stays for a whole lease is of one that died: whoever goes on with its work looks again.
    """
    deadline = Deadline.after(timeouts.lease_s, clock)
    while any(at == step for at, _, _ in read_marks(catalog).doomed) and not deadline.expired():
        clock.sleep(timeouts.lease_s / 20)


class _ReaderMark:
    """A reader's mark, renewed by a thread of its own until closed."""

    def __init__(self, catalog: RunCatalog, step: int, timeouts: Timeouts, clock: Clock) -> None:
        self._catalog = catalog
        self._name = reader_name(ids.random_id())
        self._step = step
        self._renew_s = timeouts.lease_s / _RENEWALS_PER_LEASE
        self._clock = clock
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None
        self._storage_s = timeouts.storage_s

    def start(self) -> None:
        self._write(0)
        self._thread = threading.Thread(target=self._renew, name="ktrain-reader", daemon=True)
        self._thread.start()

    def _write(self, beat: int) -> None:
        said = {"step": self._step, "who": ids.process_name(), "renew_s": self._renew_s, "beat": beat}
        write_mark(self._catalog, self._name, said)

    def _renew(self) -> None:
        beat = 0
        while not self._clock.wait(self._closed, self._renew_s):
            beat += 1
            try:
                self._write(beat)
            except KtrainError:
                continue  # the store is away for a moment: the next renewal tries again

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._storage_s)
        try:
            remove_mark(self._catalog, self._name)
        except KtrainError:
            pass  # a collector takes it for dead after one lease
