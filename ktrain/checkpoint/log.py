"""The run's event log: one file for a local run, numbered objects for a run in a bucket; read both the same way."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from ktrain.abc.tier import Tier
from ktrain.base import contract, events, ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.events import Event, EventSink, FileSink
from ktrain.base.job import local_path
from ktrain.base.settings import Timeouts
from ktrain.errors import KtrainError, NotFoundError

_LOG = logging.getLogger(__name__)
_BATCH_S = 1.0
_BLOCK_NBYTES = 1 << 18
_BLOCKS_BACK = 256  # read backwards at most
_MOST_WAITING = 100_000  # of a store that is away; the oldest are lost beyond


class EventLog(EventSink, Protocol):
    """A sink with an end."""

    @property
    def num_emitted(self) -> int:
        """How many events came in."""
        ...

    def num_waiting(self) -> int:
        """How many of them, the newest, are not written yet."""

    def flush(self) -> None:
        """Returns once everything emitted so far is written, or its bounded wait is over."""

    def close(self) -> None:
        """Flushes and ends."""


class FileLog:
    """Events of a local run. Safe from any thread."""

    def __init__(self, path: Path) -> None:
        self._sink = FileSink(path)

    @property
    def num_emitted(self) -> int:
        return self._sink.num_emitted

    def num_waiting(self) -> int:
        """How many events the file could not take yet; they are tried again here."""
        return self._sink.write_waiting()

    def emit(self, event: Event) -> None:
        self._sink.emit(event)

    def flush(self) -> None:
        """Every event is written when `emit` returns."""

    def close(self) -> None:
        self._sink.close()


class ObjectLog:
    """Events of a run in a bucket: a thread writes what came in, about once a second. Safe from any thread."""

    def __init__(self, tier: Tier, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
        self._tier = tier
        self._timeouts = timeouts
        self._clock = clock
        self._lock = threading.Lock()
        self._writing = threading.Lock()  # held across a write: batches stay in order
        self._waiting: list[Event] = []  # guarded by _lock
        self._num_writing = 0  # events of `_batch`; guarded by _lock
        self._batch: tuple[str, bytes] | None = None  # the same name until the store has it; guarded by _writing
        self.num_emitted = 0
        self._writer = ids.random_id(3)
        self._sequence = self._last_sequence() + 1
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ktrain-events", daemon=True)
        self._thread.start()

    def emit(self, event: Event) -> None:
        with self._lock:
            self.num_emitted += 1
            self._waiting.append(event)
            del self._waiting[:-_MOST_WAITING]

    def num_waiting(self) -> int:
        """How many events no object has yet."""
        with self._lock:
            return len(self._waiting) + self._num_writing

    def flush(self) -> None:
        self._write_batches()

    def close(self) -> None:
        self._closed.set()
        self._thread.join(self._timeouts.storage_s)
        self._write_batches()

    def _last_sequence(self) -> int:
        found = self._tier.list(f"{contract.EVENTS_DIR}/", deadline=self._deadline())
        return max((_sequence(stored.name) for stored in found), default=-1)

    def _deadline(self) -> Deadline:
        return Deadline.after(self._timeouts.storage_s, self._clock)

    def _run(self) -> None:
        while not self._clock.wait(self._closed, _BATCH_S):
            self._write_batches()

    def _write_batches(self) -> None:
        with self._writing:
            while self._cut_batch():
                assert self._batch is not None
                try:
                    self._tier.write(*self._batch, deadline=self._deadline())
                except KtrainError as error:
                    _LOG.warning("events: %s; they are kept and tried again", error)
                    return
                self._batch = None
                with self._lock:
                    self._num_writing = 0

    def _cut_batch(self) -> bool:
        """Makes one batch of what waits where there is none; false when there is nothing to write."""
        if self._batch is not None:
            return True
        with self._lock:
            taken, self._waiting = self._waiting, []
            self._num_writing = len(taken)
        if taken:
            name = f"{contract.EVENTS_DIR}/{taken[-1].attempt:06d}-{self._sequence:08d}-{self._writer}.jsonl"
            self._sequence += 1
            lines = [json.dumps(event.to_json(), separators=(",", ":")).encode() + b"\n" for event in taken]
            self._batch = name, b"".join(lines)
        return bool(taken)


def _sequence(name: str) -> int:
    parts = name.rpartition("/")[2].split("-")
    return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else -1


def open_log(run: str, tier: Tier, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> EventLog:
    """The log of a run, ready to be appended to."""
    path = local_path(run)
    return FileLog(path / contract.EVENTS_FILE) if path is not None else ObjectLog(tier, timeouts=timeouts, clock=clock)


def read_backwards(run: str, tier: Tier, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> Iterator[list[Event]]:
    """Blocks of a run's events, the newest block first, each in order; bounded, so the oldest events may be left out.

    Raises:
        UnavailableError, DeadlineError: the store could not be asked.
    """
    path = local_path(run)
    if path is not None:
        yield from _blocks_of_file(path / contract.EVENTS_FILE)
        return
    found = tier.list(f"{contract.EVENTS_DIR}/", deadline=Deadline.after(timeouts.storage_s, clock))
    newest = sorted((stored.name for stored in found), key=lambda name: (_sequence(name), name), reverse=True)
    for name in newest[:_BLOCKS_BACK]:
        try:
            data = tier.read(name, deadline=Deadline.after(timeouts.storage_s, clock))
        except NotFoundError:
            continue
        yield events.parse_lines(data.splitlines())


def _blocks_of_file(path: Path) -> Iterator[list[Event]]:
    try:
        file = open(path, "rb")  # noqa: SIM115 -- closed below; the file may be absent
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        end = file.seek(0, os.SEEK_END)
        rest = b""  # the end of a line whose beginning is in the next block
        for _ in range(_BLOCKS_BACK):
            begin = max(0, end - _BLOCK_NBYTES)
            file.seek(begin)
            data = file.read(end - begin) + rest
            cut = data.find(b"\n") + 1 if begin else 0
            rest, end = data[:cut], begin
            yield events.parse_lines(data[cut:].splitlines())
            if not begin:
                return


class LogReader:
    """Reads a run's events from the beginning, then what is new. Use from one thread."""

    def __init__(self, run: str, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
        self._path = local_path(run)
        self._run = run
        self._timeouts = timeouts
        self._clock = clock
        self._offset = 0
        self._seen: set[str] = set()
        self._tier: Tier | None = None

    def read_new(self) -> list[Event]:
        """Events since the last call; none while there is no log.

        Raises:
            UnavailableError: the store could not be asked.
        """
        return self._read_file(self._path) if self._path is not None else self._read_objects()

    def close(self) -> None:
        """Lets go of the store. Idempotent."""
        if self._tier is not None:
            self._tier.close()

    def _read_file(self, path: Path) -> list[Event]:
        try:
            with open(path / contract.EVENTS_FILE, "rb") as file:
                file.seek(self._offset)
                data = file.read()
        except (FileNotFoundError, NotADirectoryError):
            return []
        whole = data[: data.rfind(b"\n") + 1]  # the rest is a line that is being written
        self._offset += len(whole)
        return events.parse_lines(whole.splitlines())

    def _read_objects(self) -> list[Event]:
        if self._tier is None:
            from ktrain.tier.location import open_tier

            self._tier = open_tier(self._run, timeouts=self._timeouts)
        found = self._tier.list(
            f"{contract.EVENTS_DIR}/", deadline=Deadline.after(self._timeouts.storage_s, self._clock)
        )
        fresh = sorted(
            (stored.name for stored in found if stored.name not in self._seen), key=lambda name: (_sequence(name), name)
        )
        taken = []
        for name in fresh:
            deadline = Deadline.after(self._timeouts.storage_s, self._clock)
            try:
                taken += events.parse_lines(self._tier.read(name, deadline=deadline).splitlines())
            except NotFoundError:
                continue
            self._seen.add(name)
        return taken
