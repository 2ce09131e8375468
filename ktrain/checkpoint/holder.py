"""Who runs a run: at most one attempt is live at a time, and a second one is refused by name.

On a local file system the holder is an advisory lock, which dies with its process. Elsewhere it is an object that
the holder rewrites; a newcomer watches it for one lease on its own clock and takes over only when it did not change.
Neither is what correctness rests on (that is the epoch in every name, ADR 0003): it only keeps two jobs from
wasting each other's time.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from pathlib import Path
from typing import IO, Any

from ktrain.abc.tier import Tier
from ktrain.base import contract, ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.settings import Timeouts
from ktrain.errors import ConflictError, KtrainError, NotFoundError


def _who(record: dict[str, Any]) -> str:
    return f"process {record.get('pid')} on host {record.get('host')}"


class Holder:
    """Holds a run from construction until `close()`.

    Raises:
        ConflictError: the run is live elsewhere; the message names the holder.
    """

    def __init__(self, tier: Tier, *, local_path: Path | None, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
        self._record: dict[str, Any] = {"host": ids.host_name(), "pid": os.getpid(), "id": ids.random_id()}
        self._tier = tier
        self._timeouts = timeouts
        self._clock = clock
        self._closed = threading.Event()
        self._file: IO[bytes] | None = None
        self._thread: threading.Thread | None = None
        if local_path is not None:
            self._file = self._lock(local_path / "holder.lock")
            return
        self._watch()
        self._write(0)
        self._thread = threading.Thread(target=self._refresh, name="ktrain-holder", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Lets go of the run. Idempotent."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(self._timeouts.storage_s)
            self._thread = None
            try:
                self._tier.delete(contract.HOLDER_FILE, deadline=Deadline.after(self._timeouts.storage_s, self._clock))
            except KtrainError:
                pass  # a stale holder only makes the next start wait for one lease
        if self._file is not None:
            self._file.close()
            self._file = None

    def _lock(self, path: Path) -> IO[bytes]:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")  # noqa: SIM115 -- held until close(): the lock is the file description
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read().decode(errors="replace")
            file.close()
            holder = _who(json.loads(text)) if text else "an unknown process"
            raise ConflictError(
                f"run {path.parent}: it is live already, held by {holder}; wait for it, cancel it, or name another run"
            ) from None
        file.truncate(0)
        file.write(json.dumps(self._record).encode())
        file.flush()
        return file

    def _read(self) -> dict[str, Any] | None:
        try:
            data = self._tier.read(contract.HOLDER_FILE, deadline=Deadline.after(self._timeouts.storage_s, self._clock))
        except NotFoundError:
            return None
        try:
            value = json.loads(data)
        except ValueError:
            return None  # torn while it was written: its writer is starting or dead, the watch below tells
        return value if isinstance(value, dict) else None

    def _watch(self) -> None:
        first = self._read()
        if first is None:
            return
        deadline = Deadline.after(self._timeouts.lease_s, self._clock)
        while not deadline.expired():
            self._clock.sleep(self._timeouts.lease_s / 6)
            now = self._read()
            if now is None:
                return
            if now != first:
                raise ConflictError(
                    f"run {self._tier.url}: it is live already, held by {_who(now)}; wait for it, cancel it, or name "
                    "another run"
                )

    def _write(self, beat: int) -> None:
        data = json.dumps({**self._record, "beat": beat}).encode()
        self._tier.write(contract.HOLDER_FILE, data, deadline=Deadline.after(self._timeouts.storage_s, self._clock))

    def _refresh(self) -> None:
        beat = 0
        while not self._clock.wait(self._closed, self._timeouts.lease_s / 3):
            beat += 1
            try:
                self._write(beat)
            except KtrainError:
                continue  # the store is away for a moment: training goes on, the next beat tries again
