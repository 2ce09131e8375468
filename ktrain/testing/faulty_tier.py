"""Faults around any tier: which call, which object, and what goes wrong."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase

from ktrain.abc.tier import Buffer, Stored, Tier
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.errors import (
    CapacityError,
    ConfigError,
    DeadlineError,
    ForbiddenError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)


class Fault(StrEnum):
    """What goes wrong with one call."""

    NOT_FOUND = "not-found"  # status 404, whatever is there
    FORBIDDEN = "forbidden"  # status 403
    THROTTLED = "throttled"  # status 429
    ERROR = "error"  # status 500
    UNAVAILABLE = "unavailable"  # status 503
    NO_SPACE = "no-space"
    IO_ERROR = "io-error"  # what a failing device answers (EIO)
    HANG = "hang"  # no answer until the deadline; the call did not take effect
    LOST_REPLY = "lost-reply"  # the call took effect, its caller gets "unavailable"
    LATE_REPLY = "late-reply"  # the call took effect, its caller gets "deadline"
    FLIP_BIT = "flip-bit"  # one bit in the middle of what is written or read is wrong; nobody notices
    TRUNCATE = "truncate"  # the last half of what is written or read is missing; nobody notices
    TORN = "torn"  # like TRUNCATE, and the caller gets "unavailable"
    SLOW = "slow"  # takes `seconds` longer
    LAGGING = "lagging"  # a listing lacks what was written through this wrapper in the last `seconds`
    KILLED = "killed"  # the caller dies before the call takes effect
    KILLED_AFTER = "killed-after"  # the caller dies after the call took effect


OPERATIONS = ("write", "create", "read", "read_range", "list", "delete")
_DATA_IN = ("write", "create")
_DATA_OUT = ("read", "read_range")
_EFFECTS = (*_DATA_IN, "delete")

_BEFORE: dict[Fault, tuple[type[KtrainError], str]] = {
    Fault.NOT_FOUND: (NotFoundError, "there is no such object (status 404)"),
    Fault.FORBIDDEN: (ForbiddenError, "the store refused (status 403)"),
    Fault.THROTTLED: (UnavailableError, "too many requests (status 429)"),
    Fault.ERROR: (UnavailableError, "the store failed (status 500)"),
    Fault.UNAVAILABLE: (UnavailableError, "the store is not available (status 503)"),
    Fault.NO_SPACE: (CapacityError, "no space is left"),
    Fault.IO_ERROR: (UnavailableError, "input/output error (EIO)"),
}
_FITS: dict[Fault, tuple[str, ...]] = {
    Fault.LOST_REPLY: _EFFECTS,
    Fault.LATE_REPLY: _EFFECTS,
    Fault.FLIP_BIT: (*_DATA_IN, *_DATA_OUT),
    Fault.TRUNCATE: (*_DATA_IN, *_DATA_OUT),
    Fault.TORN: _DATA_IN,
    Fault.NO_SPACE: _DATA_IN,
    Fault.LAGGING: ("list",),
    Fault.KILLED_AFTER: _EFFECTS,
}


@dataclass(frozen=True, slots=True)
class TierFault:
    """One fault: `count` calls of `operation` on names that match `name`, from the `nth` such call on (from
    1).

    Calls are counted from the moment the fault is added. For `list` the name is the prefix.
    """

    operation: str
    fault: Fault
    nth: int = 1
    count: int = 1
    name: str = "*"
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.operation not in _FITS.get(self.fault, OPERATIONS):
            raise ConfigError(
                f"tier fault {self.fault}: expected an operation of {_FITS.get(self.fault, OPERATIONS)},"
                f" found {self.operation!r}"
            )
        if self.nth < 1 or self.count < 1:
            raise ConfigError(f"tier fault: expected nth and count from 1, found {self.nth} and {self.count}")


class Killed(BaseException):
    """The process that made the call is dead from here on; no code of its own runs any more.

    Not an Exception: what a living process would catch, a dead one does not. The test that plays the process catches
    it and puts another one there.
    """


class FaultyTier:
    """A tier that hands every call on, except where a fault says otherwise. Safe from any thread.

    `calls` records every call as (operation, name) in order, whatever became of it.
    """

    def __init__(self, inner: Tier, *faults: TierFault, clock: Clock = SYSTEM_CLOCK) -> None:
        self.calls: list[tuple[str, str]] = []  # guarded by _lock
        self._inner = inner
        self._clock = clock
        self._faults: list[_Counted] = []  # guarded by _lock
        self._written_at: dict[str, float] = {}  # guarded by _lock
        self._lock = threading.Lock()
        for fault in faults:
            self.add(fault)

    @property
    def kind(self) -> str:
        return self._inner.kind

    @property
    def url(self) -> str:
        return self._inner.url

    @property
    def supports_create(self) -> bool:
        return self._inner.supports_create

    @property
    def shows_whole(self) -> bool:
        return bool(getattr(self._inner, "shows_whole", False))

    def add(self, fault: TierFault) -> None:
        """One more fault, counted from now."""
        with self._lock:
            self._faults.append(_Counted(fault))

    def num_struck(self) -> int:
        """How many calls the present faults have hit."""
        with self._lock:
            return sum(counted.num_struck for counted in self._faults)

    def has_faults(self) -> bool:
        """Whether any fault was added since the last `heal`."""
        with self._lock:
            return bool(self._faults)

    def heal(self) -> None:
        """Removes all faults."""
        with self._lock:
            self._faults.clear()

    def write(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        fault = self._enter("write", name, deadline)
        self._inner.write(name, _spoil(data, fault), deadline=deadline)
        self._leave("write", name, fault, deadline)

    def create(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        fault = self._enter("create", name, deadline)
        self._inner.create(name, _spoil(data, fault), deadline=deadline)
        self._leave("create", name, fault, deadline)

    def read(self, name: str, *, deadline: Deadline) -> bytes:
        fault = self._enter("read", name, deadline)
        return bytes(_spoil(self._inner.read(name, deadline=deadline), fault))

    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes:
        fault = self._enter("read_range", name, deadline)
        return bytes(_spoil(self._inner.read_range(name, begin, end, deadline=deadline), fault))

    def list(self, prefix: str, *, deadline: Deadline) -> list[Stored]:
        fault = self._enter("list", prefix, deadline)
        found = self._inner.list(prefix, deadline=deadline)
        if fault is None or fault.fault is not Fault.LAGGING:
            return found
        seen_until = self._clock.monotonic() - fault.seconds
        with self._lock:
            return [stored for stored in found if self._written_at.get(stored.name, seen_until) <= seen_until]

    def delete(self, name: str, *, deadline: Deadline) -> None:
        fault = self._enter("delete", name, deadline)
        self._inner.delete(name, deadline=deadline)
        self._leave("delete", name, fault, deadline)

    def close(self) -> None:
        self._inner.close()

    def _enter(self, operation: str, name: str, deadline: Deadline) -> TierFault | None:
        """Records the call; raises where it never reaches the store, else returns the fault that is due."""
        with self._lock:
            self.calls.append((operation, name))
            due = [counted.fault for counted in self._faults if counted.strikes(operation, name)]
        fault = due[0] if due else None
        if fault is None:
            return None
        what = f"{self.kind} tier {self.url}: {operation} {name}"
        if fault.fault in _BEFORE:
            cls, words = _BEFORE[fault.fault]
            raise cls(f"{what}: {words}")
        if fault.fault is Fault.HANG:
            self._clock.sleep(deadline.remaining_s())
            raise DeadlineError(f"{what}: no answer within {deadline.total_s:g} s")
        if fault.fault is Fault.KILLED:
            raise Killed(what)
        if fault.fault is Fault.SLOW:
            self._clock.sleep(min(fault.seconds, deadline.remaining_s()))
            deadline.check(what)
        return fault

    def _leave(self, operation: str, name: str, fault: TierFault | None, deadline: Deadline) -> None:
        """After a call that took effect: remembers when, and loses the reply where that is the fault."""
        with self._lock:
            self._written_at[name] = self._clock.monotonic()
        what = f"{self.kind} tier {self.url}: {operation} {name}"
        if fault is not None and fault.fault in (Fault.LOST_REPLY, Fault.TORN):
            raise UnavailableError(f"{what}: the connection broke before the reply")
        if fault is not None and fault.fault is Fault.KILLED_AFTER:
            raise Killed(what)
        if fault is not None and fault.fault is Fault.LATE_REPLY:
            self._clock.sleep(deadline.remaining_s())
            raise DeadlineError(f"{what}: no answer within {deadline.total_s:g} s")


class _Counted:
    """A fault with the number of calls it has seen; used under the wrapper's lock."""

    def __init__(self, fault: TierFault) -> None:
        self.fault = fault
        self._num_seen = 0
        self.num_struck = 0

    def strikes(self, operation: str, name: str) -> bool:
        if operation != self.fault.operation or not fnmatchcase(name, self.fault.name):
            return False
        self._num_seen += 1
        strikes = self.fault.nth <= self._num_seen < self.fault.nth + self.fault.count
        self.num_struck += strikes
        return strikes


def _spoil(data: Buffer, fault: TierFault | None) -> Buffer:
    if fault is None or fault.fault not in (Fault.FLIP_BIT, Fault.TRUNCATE, Fault.TORN):
        return data
    spoilt = bytearray(data)
    middle = len(spoilt) // 2
    if fault.fault is Fault.FLIP_BIT:
        if spoilt:
            spoilt[middle] ^= 1
    else:
        del spoilt[middle:]
    return bytes(spoilt)
