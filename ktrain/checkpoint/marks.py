"""The small objects in RUN/marks by which readers, people, heads and collectors tell one another what they do.

Invariant (ADR 0012): a mark is written before its writer looks for the marks of others, so that of two who meet at
least one sees the other. Imports neither torch nor ray.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Clock
from ktrain.base.events import Event
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.errors import NotFoundError
from ktrain.format.record import CommitRecord

_NAME = re.compile(
    rf"{contract.MARKS_DIR}/(?:pin-(?P<pin>\d{{8,19}})|(?P<reader>reader-[0-9a-z]{{1,64}})"
    r"|doomed-(?P<doomed>\d{8,19}-\d{6,19}-[0-9a-z]{1,64})|metrics-(?P<metrics>\d{8,19}-\d{6,19}))\.json",
    re.ASCII,
)
_MAX_RENEW_S = 600.0  # a mark cannot ask to be believed for longer than three times this

Write = tuple[int, int, str]  # step, epoch and write id: one try to commit


def pin_name(step: int) -> str:
    """`marks/pin-00000010.json`."""
    return f"{contract.MARKS_DIR}/pin-{step:08d}.json"


def reader_name(reader_id: str) -> str:
    """`marks/reader-0a1b2c.json`."""
    return f"{contract.MARKS_DIR}/reader-{reader_id}.json"


def doomed_name(write: Write) -> str:
    """`marks/doomed-00000010-000002-0a1b2c.json`."""
    return f"{contract.MARKS_DIR}/doomed-{write[0]:08d}-{write[1]:06d}-{write[2]}.json"


def metrics_name(step: int, epoch: int) -> str:
    """`marks/metrics-00000010-000002.json`."""
    return f"{contract.MARKS_DIR}/metrics-{step:08d}-{epoch:06d}.json"


def write_of(commit: CommitRecord) -> Write:
    """The try that this record committed."""
    return commit.identity.step, commit.identity.epoch, commit.write_id


@dataclass(frozen=True, slots=True)
class Reader:
    """Somebody who reads a step, or any step where the mark cannot be read. `text` changes while it lives."""

    name: str
    text: bytes
    step: int | None = None
    who: str = "unknown"
    renew_s: float = 0.0  # the reader's own distance between two renewals

    def reads(self, step: int) -> bool:
        return self.step is None or self.step == step


@dataclass(frozen=True, slots=True)
class Marks:
    """All marks of a run. `unknown`: names that this ktrain does not give; what they protect cannot be told."""

    pins: frozenset[int] = frozenset()
    readers: tuple[Reader, ...] = ()
    doomed: frozenset[Write] = frozenset()
    metrics: Mapping[tuple[int, int], Mapping[str, float]] = field(default_factory=dict)  # by (step, epoch)
    unclear: frozenset[tuple[int, int]] = frozenset()  # (step, epoch) whose metrics are there and cannot be read
    unknown: tuple[str, ...] = ()


def read_marks(catalog: RunCatalog) -> Marks:
    """All marks, as they are now.

    Raises:
        UnavailableError, DeadlineError: they could not be read; nothing may be removed.
    """
    pins, doomed, metrics, unclear = set(), set(), {}, set()
    readers, unknown = [], []
    for stored in catalog.tier.list(f"{contract.MARKS_DIR}/", deadline=catalog.transfer_deadline(0)):
        match = _NAME.fullmatch(stored.name)
        if match is None:
            unknown.append(stored.name)
        elif match["pin"]:
            pins.add(int(match["pin"]))
        elif match["doomed"]:
            step, epoch, write_id = match["doomed"].split("-")
            doomed.add((int(step), int(epoch), write_id))
        elif (text := _try_read(catalog, stored.name)) is None:
            continue  # gone since it was listed
        elif match["reader"]:
            readers.append(_reader(stored.name, text))
        else:
            step, epoch = match["metrics"].split("-")
            values = numbers(_object(text).get("metrics"))
            metrics[int(step), int(epoch)] = values
            if not values:
                unclear.add((int(step), int(epoch)))
    return Marks(frozenset(pins), tuple(readers), frozenset(doomed), metrics, frozenset(unclear), tuple(unknown))


def write_mark(catalog: RunCatalog, name: str, value: Mapping[str, Any]) -> None:
    """Writes a mark, in place of an older one of this name."""
    catalog.tier.write(name, json.dumps(value).encode(), deadline=catalog.transfer_deadline(0))


def remove_mark(catalog: RunCatalog, name: str) -> None:
    """Removes a mark; one that is gone is fine."""
    catalog.tier.delete(name, deadline=catalog.transfer_deadline(0))


def _try_read(catalog: RunCatalog, name: str) -> bytes | None:
    try:
        return catalog.tier.read(name, deadline=catalog.transfer_deadline(0))
    except NotFoundError:
        return None


def _object(text: bytes) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _reader(name: str, text: bytes) -> Reader:
    value = _object(text)
    step, renew_s = value.get("step"), value.get("renew_s")
    if not isinstance(step, int) or not isinstance(renew_s, int | float):
        return Reader(name, text)
    return Reader(name, text, step, str(value.get("who", "unknown")), min(float(renew_s), _MAX_RENEW_S))


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping, by name; anything else is left out."""
    if not isinstance(value, Mapping):
        return {}
    return {
        str(name): float(number)
        for name, number in value.items()
        if isinstance(number, int | float) and not isinstance(number, bool) and math.isfinite(number)
    }


class ReaderWatch:
    """Which readers live, by this process's own clock: one whose mark does not change for its lease is dead."""

    def __init__(self, lease_s: float, clock: Clock) -> None:
        self._lease_s = lease_s
        self._clock = clock
        self._seen: dict[str, tuple[bytes, float]] = {}  # name -> its text, and since when it is this one

    def living(self, marks: Marks) -> list[Reader]:
        """Readers that are not proven dead; one that is seen for the first time counts as living."""
        now = self._clock.monotonic()
        known, self._seen = self._seen, {}
        living = []
        for reader in marks.readers:
            text, since_s = known.get(reader.name, (b"", now))
            self._seen[reader.name] = (reader.text, since_s if text == reader.text else now)
            if now - self._seen[reader.name][1] < max(self._lease_s, 3 * reader.renew_s):
                living.append(reader)
        return living


class MetricBook:
    """What was logged of the newest steps, as far as the head heard it. Safe from any thread."""

    def __init__(self, limit: int = 2000) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._values: dict[tuple[int, int], dict[str, float]] = {}  # by (step, epoch), oldest first; guarded by _lock

    def take(self, event: Event) -> None:
        """Takes `loss` of a `step` event and the numbers of a `log` event."""
        step = event.fields.get("step")
        if event.kind not in ("step", "log") or not isinstance(step, int):
            return
        said = {"loss": event.fields.get("loss")} if event.kind == "step" else dict(event.fields)
        said.pop("step", None)
        with self._lock:
            self._values.setdefault((step, event.attempt), {}).update(numbers(said))
            while len(self._values) > self._limit:
                del self._values[next(iter(self._values))]

    def of(self, step: int, epoch: int) -> dict[str, float]:
        """The values of one step, so far."""
        with self._lock:
            return dict(self._values.get((step, epoch), {}))
