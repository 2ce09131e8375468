"""Whether the run's store can be reached from here, and how fast. From here: a pod's way may be another one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from ktrain.base import ids
from ktrain.base.clock import Clock, Deadline
from ktrain.errors import CapacityError, ConfigError, CorruptionError, ForbiddenError, KtrainError
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.quantity import MIB, show_bytes

FOLDER = "doctor"  # below the run; nothing else lies there
_CALL_S = 30.0
_PROBE = 8 * MIB
_NEVER = "no checkpoint leaves the nodes: what all of them lose at once is lost"
_LOST = "a lost answer is no proof: try again"


class Store(Protocol):
    """As much of a tier as is looked at."""

    def list(self, prefix: str, *, deadline: Deadline) -> object: ...
    def write(self, name: str, data: bytes, *, deadline: Deadline) -> None: ...
    def read(self, name: str, *, deadline: Deadline) -> bytes: ...
    def delete(self, name: str, *, deadline: Deadline) -> None: ...


@dataclass(frozen=True, slots=True)
class Probe:
    """A store as it is seen from here."""

    store: Store
    url: str
    clock: Clock
    refused: Outcome  # what a refusal says: of the one who runs the job it fails, of somebody else nothing is known

    def deadline(self) -> Deadline:
        return Deadline.after(_CALL_S, self.clock)

    def refusal(self, check: str, error: KtrainError) -> Finding:
        """The store would not have it."""
        remedy = "give the job's identity the rights to list, read, write and delete below the run, and the bucket room"
        mine = "" if self.refused is Outcome.FAILED else "; the pods come with an identity of their own"
        cost = _NEVER if self.refused is Outcome.FAILED else ""
        return Finding(check, self.refused, f"{error}{mine}", cost, remedy)


def look_at_bucket(probe: Probe) -> Iterator[Finding]:
    """One list of a folder in which nothing lies."""
    url, clock = probe.url, probe.clock
    began_s = clock.monotonic()
    try:
        probe.store.list(FOLDER, deadline=probe.deadline())
    except (ForbiddenError, ConfigError) as error:
        yield probe.refusal("bucket", error)
    except KtrainError as error:
        yield Finding("bucket", Outcome.UNKNOWN, f"not reached from here: {error}", remedy=_LOST)
    else:
        took_ms = 1e3 * (clock.monotonic() - began_s)
        yield Finding("bucket", Outcome.OK, f"{url}: listed from here in {took_ms:.0f} ms; writing was not tried")


def try_bucket(probe: Probe, wanted_bytes_per_s: float) -> Iterator[Finding]:
    """One object there and back, which is removed whatever happens; what could not be removed is named."""
    url = probe.url
    name, data = f"{FOLDER}/probe-{ids.random_id(8)}", _bytes()
    left: KtrainError | None = None
    found: Finding
    try:
        try:
            put, got = _there_and_back(probe, name, data)
        finally:
            left = _removed(probe, name)
    except (ForbiddenError, CapacityError, ConfigError, CorruptionError) as error:
        found = probe.refusal("bucket rate", error)
    except KtrainError as error:
        found = Finding("bucket rate", Outcome.UNKNOWN, f"the probe did not come back: {error}", remedy=_LOST)
    else:
        rates = f"{show_bytes(put)}/s up and {show_bytes(got)}/s down, one object of {show_bytes(_PROBE)} from here"
        slow = put < wanted_bytes_per_s
        cost = f"the plan assumes {show_bytes(wanted_bytes_per_s)}/s of a node (saving.bucket_bytes_per_s)"
        remedy = "say what nodes reach, so that grace and plan are right; many parts at once are faster than one"
        found = (
            Finding("bucket rate", Outcome.WARNING, f"{url}: {rates}", cost, remedy)
            if slow
            else Finding("bucket rate", Outcome.OK, f"{url}: {rates}")
        )
    yield found
    if left is not None:
        yield Finding("bucket", Outcome.WARNING, f"{url}/{name}: could not be removed: {left}", "it stays", "delete it")


def _there_and_back(probe: Probe, name: str, data: bytes) -> tuple[float, float]:
    """Bytes per second of the put and of the get. Raises CorruptionError: other bytes came back."""
    clock = probe.clock
    began_s = clock.monotonic()
    probe.store.write(name, data, deadline=probe.deadline())
    written_s = clock.monotonic()
    back = probe.store.read(name, deadline=probe.deadline())
    read_s = clock.monotonic()
    if back != data:
        raise CorruptionError(f"{name}: {len(data)} bytes were written, {len(back)} other ones came back")
    return _rate(data, began_s, written_s), _rate(data, written_s, read_s)


def _removed(probe: Probe, name: str) -> KtrainError | None:
    try:
        probe.store.delete(name, deadline=probe.deadline())
    except KtrainError as error:
        return error
    return None


def _rate(data: bytes, begin_s: float, end_s: float) -> float:
    return len(data) / max(1e-6, end_s - begin_s)


def _bytes() -> bytes:
    """Bytes that no store packs."""
    return bytes.fromhex(ids.random_id(4096)) * (_PROBE // 4096)
