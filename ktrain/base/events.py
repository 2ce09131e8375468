"""Typed events: the one record of what happened; log lines, progress and reports are renderings of it.

An event is a JSON object with `time` (wall seconds, UTC), `attempt` (the epoch, 0 before there is one) and `kind`,
and the fields of its kind; `origin`, where a worker or a node's keeper said it, tells it from all others. Kinds are
append-only; the list below is golden.
"""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from ktrain.base.clock import SYSTEM_CLOCK, Clock

KINDS = frozenset(
    {
        "run_started",  # head took the run: nodes, world_size, version
        "attempt_started",  # world_size, nodes
        "restored",  # step, tier, tiers (per rank), nbytes, wanted_nbytes, num_reads, wire_bytes, bucket_bytes, spread
        "fresh_start",  # nothing to restore: step 0
        "step",  # step, loss, samples (rank 0's view)
        "snapshot",  # rank, step, tier "memory", nbytes, stall_s
        "save_skipped",  # rank, step, tier, reason
        "committed",  # step, tier, nbytes, seconds
        "replicated",  # rank, step, source, target, nbytes (through the transport), own_bytes, seconds, wire_seconds
        "drained",  # rank, step, tier, node, nbytes, seconds
        "collected",  # tier, step: removed by retention
        "quarantined",  # step, epoch, attempts, reason: set aside, an older step is restored
        "loss_mismatch",  # step, expected, found, exact, restored, from_epoch: a restored state does not do what it did
        "cadence",  # from_step, memory, disk, bucket, reason, and what it was computed from
        "bad_copy",  # step, rank, tier, where, reason, begin, end (byte range)
        "tier_failed",  # tier, reason; said once until it recovers
        "tier_recovered",  # tier
        "fault_injected",  # spec, step
        "failure",  # cause, rank or node, host, phase, reason, step
        "worker_exit",  # rank, exitcode, reason
        "hang",  # rank, host, phase, silent_s
        "node_lost",  # node, silent_s
        "node_joined",  # node, host
        "agent_lost",
        "head_adopted",  # a new head took over a live attempt
        "stop_requested",  # reason, at_step
        "attempt_ended",  # outcome, cause, step
        "run_ended",  # outcome, exit_code, step, reason
        "log",  # name -> value pairs of step.log
        "notice",  # said once: message
    }
)


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        origin: (name of who said it, number among all that one said), by which the log has it once; None where the
            log's own writer said it.
    """

    kind: str
    fields: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=SYSTEM_CLOCK.wall)
    attempt: int = 0
    origin: tuple[str, int] | None = None

    def __post_init__(self) -> None:
        assert self.kind in KINDS, self.kind

    def to_json(self) -> dict[str, Any]:
        said = {"time": self.time, "attempt": self.attempt, "kind": self.kind, **self.fields}
        return said if self.origin is None else {**said, "origin": list(self.origin)}

    def with_origin(self, name: str, number: int) -> Event:
        """The same with who said it."""
        return replace(self, origin=(name, number))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Event:
        rest = {key: item for key, item in value.items() if key not in ("time", "attempt", "kind", "origin")}
        origin = _origin(value.get("origin"))
        return cls(kind=value["kind"], fields=rest, time=value["time"], attempt=value["attempt"], origin=origin)


def _origin(value: Any) -> tuple[str, int] | None:
    """As `to_json` wrote it; None for anything else, which nobody here wrote."""
    match value:
        case [str(name), int(number)]:
            return name, number
    return None


_LOG = logging.getLogger(__name__)


class EventSink(Protocol):
    """Takes events; must not block the caller for long and must not raise."""

    def emit(self, event: Event) -> None: ...


class FileSink:
    """Appends one JSON line per event to a local file. Safe from any thread.

    A file that cannot take a line now (the disk is full) gets it later; what is over the limit is lost, and counted.

    Attributes:
        num_emitted: how many events came in; those that do not wait are written, or lost.
    """

    def __init__(self, path: Path, limit: int = 10_000) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b", buffering=0)  # noqa: SIM115 -- owned until close()
        self._lock = threading.Lock()
        self._limit = limit
        self._waiting: list[bytes] = []  # guarded by _lock
        self.num_emitted = 0
        self.num_lost = 0
        self._torn = _ends_in_a_torn_line(self._file.fileno())

    def emit(self, event: Event) -> None:
        line = json.dumps(event.to_json(), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self.num_emitted += 1
            self._waiting.append(line)
            if len(self._waiting) > self._limit:
                del self._waiting[0]
                self.num_lost += 1
            if not self._file.closed:  # what comes after that waits for ever, and is not said to be written
                self._write_waiting()

    def write_waiting(self) -> int:
        """Tries again to write what waits; returns how many events still do."""
        with self._lock:
            if not self._file.closed:
                self._write_waiting()
            return len(self._waiting)

    def close(self) -> None:
        """Tries once more to write what waits. Closing twice is fine."""
        with self._lock:
            if not self._file.closed:
                self._write_waiting()
                self._file.close()

    def _write_waiting(self) -> None:
        while self._waiting:
            line = self._waiting[0]
            data = b"\n" + line if self._torn else line  # a reader loses the torn line, not this one
            try:
                num_written = self._file.write(data)
            except OSError as error:
                if len(self._waiting) == 1:
                    _LOG.warning("events: %s; they are kept and tried again", error)
                return
            self._torn = num_written != len(data)
            if self._torn:
                return
            del self._waiting[0]


def _ends_in_a_torn_line(fd: int) -> bool:
    """True when the last writer was killed in the middle of a line."""
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"


def parse_lines(lines: Iterable[bytes | str]) -> list[Event]:
    """Events of a log; a torn line (its writer was killed) is left out, and so are kinds of newer versions."""
    events = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if not isinstance(value, dict) or not isinstance(value.get("kind"), str) or value["kind"] not in KINDS:
            continue
        if isinstance(value.get("time"), int | float) and isinstance(value.get("attempt"), int):
            events.append(Event.from_json(value))
    return events


def make(kind: str, attempt: int = 0, *, clock: Clock = SYSTEM_CLOCK, **fields: Any) -> Event:
    """An event of now."""
    return Event(kind=kind, fields=fields, time=clock.wall(), attempt=attempt)
