"""What a failure was and what to do about it: pure decisions over exits, progress and budgets."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktrain.base import contract
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.quarantine import ECHO, Trial
from ktrain.checkpoint.roster import RankProgress
from ktrain.errors import InternalError, KtrainError

# Sent from outside: by a person, a scheduler, or the kernel that is out of memory.
_FOREIGN_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Exit codes whose cause a restart cannot mend: the same input gives the same refusal.
_FINAL_EXIT_CODES = (contract.EXIT_USAGE, contract.EXIT_CORRUPT)
_OWN_KINDS = ("exception", "exit", KtrainError.kind, InternalError.kind)
_STREAK_LIMIT = 3  # failures in a row without a new committed step
# What the CUDA runtime says of a device that no restart on this node mends (cudaErrorECCUncorrectable,
# -NvlinkUncorrectable, -NoDevice, -DevicesUnavailable, -SystemNotReady), and the driver of one that fell off its bus.
_BROKEN_DEVICE = re.compile(
    r"uncorrectable (ECC|NVLink) error|no CUDA-capable device is detected|CUDA-capable device\(s\) is/are busy"
    r"|system not yet initialized|GPU is lost|fallen off the bus",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Exit:
    """How one worker ended."""

    rank: int
    pid: int
    exitcode: int  # negative for a signal, as in subprocess
    reason: str
    kind: str  # of a KtrainError, "exception", "signal" or "exit"
    node: str = ""
    host: str = ""
    ended_by_us: bool = False
    log_tail: str = ""

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, node: str, host: str) -> Exit:
        return cls(**{**value, "node": node, "host": host})

    @property
    def signal_name(self) -> str | None:
        if self.exitcode >= 0:
            return None
        try:
            return signal.Signals(-self.exitcode).name
        except ValueError:
            return f"signal {-self.exitcode}"

    @property
    def failed(self) -> bool:
        return self.exitcode not in (contract.EXIT_OK, contract.EXIT_STOPPED) and not self.ended_by_us

    @property
    def secondary(self) -> bool:
        """True where the reason reads like the echo of another rank's failure."""
        return self.kind == "exception" and ECHO.search(self.reason) is not None

    @property
    def own_fault(self) -> bool:
        """True for what a worker did by itself: neither sent from outside, nor a refusal, nor another's echo."""
        if self.exitcode < 0:
            return -self.exitcode not in _FOREIGN_SIGNALS
        return self.kind in _OWN_KINDS and not self.secondary


def root_cause(exits: Sequence[Exit]) -> Exit | None:
    """The exit that started it: our own refusals, then deaths by signal, then exceptions; first reported first."""
    failed = [item for item in exits if item.failed]

    def order(item: Exit) -> tuple[int, int]:
        refusal = item.exitcode in _FINAL_EXIT_CODES and item.kind != "exit"
        return (0 if refusal else 1 if item.exitcode < 0 else 3 if item.secondary else 2, failed.index(item))

    return min(failed, key=order, default=None)


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended."""

    cause: str  # contract.CAUSE_*
    reason: str
    rank: int | None = None
    node: str | None = None
    host: str | None = None
    phase: str | None = None
    step: int | None = None
    exitcode: int | None = None
    final: int | None = None  # exit code of the job where a restart cannot help
    secondary: int = 0  # exits of other ranks that this one explains
    log_tail: str = ""
    own_fault: bool = False  # it tells of the job itself, and so of the step that was restored (ADR 0018)
    disruption: bool = False  # somebody outside took the nodes away; nothing failed

    def fields(self) -> dict[str, Any]:
        """The fields of a `failure` event."""
        names = ("cause", "reason", "rank", "node", "host", "phase", "step", "exitcode")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def describe(self) -> str:
        """One line for people."""
        place = [f"rank {self.rank}" if self.rank is not None else "", self.node or "", self.host or ""]
        where = ", ".join(part for part in place if part)
        when = [f"step {self.step}" if self.step is not None else "", self.phase or ""]
        more = ", ".join(part for part in when if part)
        echo = f"; {self.secondary} other ranks failed because of it" if self.secondary else ""
        return f"{self.cause}: {self.reason}{f' ({where})' if where else ''}{f' at {more}' if more else ''}{echo}"


def crash(exits: Sequence[Exit], progress: Mapping[int, RankProgress]) -> Failure | None:
    """The failure that worker exits amount to, or None when no worker failed."""
    root = root_cause(exits)
    if root is None:
        return None
    said = root.signal_name
    reason = f"killed by {said}" if said else root.reason
    at = progress.get(root.rank)
    return Failure(
        contract.CAUSE_CRASH,
        reason,
        rank=root.rank,
        node=root.node or None,
        host=root.host or None,
        phase=at.phase if at else None,
        step=at.step if at else None,
        exitcode=root.exitcode,
        final=root.exitcode if root.exitcode in _FINAL_EXIT_CODES and root.kind != "exit" else None,
        secondary=sum(1 for item in exits if item.failed and item is not root),
        log_tail=root.log_tail,
        own_fault=root.own_fault and (at is None or at.phase != "close"),
    )


def settle(
    first: Failure, vanished: Failure | None, exits: Sequence[Exit], progress: Mapping[int, RankProgress]
) -> Failure:
    """The cause, now that all exits are known: a crash is what the root exit says.

    Survivors often notice the loss of a node before anybody says so; their errors are its echo.
    """
    if first.cause != contract.CAUSE_CRASH:
        return first
    root = root_cause(exits)
    if vanished is not None and (root is None or root.secondary):
        return vanished
    found = crash(exits, progress)
    if found is None:
        return first
    return found if found.step is not None else replace(found, step=first.step)


_PHASES = ("start", "restore", "train", "close")


def limit_s(rank: RankProgress, timeouts: Timeouts) -> float:
    """How long a rank may stay where it is."""
    limits = {
        "start": timeouts.start_s,
        "restore": timeouts.restore_s + timeouts.storage_s,
        "close": timeouts.drain_s + timeouts.storage_s,
    }
    return limits.get(rank.phase, timeouts.step_s)


def find_hang(progress: Mapping[int, RankProgress], timeouts: Timeouts) -> tuple[int, RankProgress] | None:
    """The rank that everybody waits for, once any rank is over its limit.

    A process that is silent as well is stopped or stuck and explains the others; else the one that is furthest behind.
    """
    live = {rank: item for rank, item in progress.items() if not item.closed}
    if not any(item.step_silent_s > limit_s(item, timeouts) for item in live.values()):
        return None
    silent = {rank: item for rank, item in live.items() if item.silent_s > timeouts.lease_s}
    if silent:
        return max(silent.items(), key=lambda pair: (pair[1].silent_s, -pair[0]))

    def behind(pair: tuple[int, RankProgress]) -> tuple[int, int, float, int]:
        rank, item = pair
        phase = _PHASES.index(item.phase) if item.phase in _PHASES else len(_PHASES)
        return (item.step, phase, -item.step_silent_s, rank)

    return min(live.items(), key=behind)


@dataclass(frozen=True, slots=True)
class Budgets:
    """What failures have cost so far. Each cause has its own budget of `max_restarts`."""

    max_restarts: int
    spent: Mapping[str, int] = field(default_factory=dict)
    streak: int = 0  # failures in a row without a new committed step
    committed: int | None = None  # newest committed step at the last failure; None before any failure
    blamed: str | None = None  # node on which the last failure began by itself

    def to_json(self) -> dict[str, Any]:
        said = {"spent": dict(self.spent), "streak": self.streak, "committed": self.committed}
        return {**said, "blamed": self.blamed}

    @classmethod
    def from_json(cls, value: Mapping[str, Any], *, max_restarts: int) -> Budgets:
        spent = dict(value["spent"])
        return cls(max_restarts, spent, value["streak"], value["committed"], value.get("blamed"))


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the job ended."""

    outcome: str  # "succeeded", "failed", "stopped"
    exit_code: int
    reason: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What follows a failure: another attempt, or the verdict."""

    budgets: Budgets
    verdict: Verdict | None = None
    suspect: str | None = None  # node that had better not carry the next attempt


def decide(budgets: Budgets, failure: Failure, *, committed: int | None, trial: Trial | None = None) -> Decision:
    """Spends budget for a failure. `committed` is the newest committed step, None where nothing commits steps.

    A failure without a committed step since the last one counts double, and three in a row end the run. One that sets
    the restored step aside ends the row and costs nothing: what follows is not the same thing tried again. A
    disruption changes nothing: neither does it cost, nor does it end a row.
    """
    if failure.disruption:
        return Decision(budgets)
    stalled = budgets.committed is not None and committed is not None and committed <= budgets.committed
    sets_aside = failure.own_fault and trial is not None and trial.ends_with(committed)
    cost = 0 if sets_aside else 2 if stalled else 1
    spent = {**budgets.spent, failure.cause: budgets.spent.get(failure.cause, 0) + cost}
    streak = 0 if sets_aside or committed is None else budgets.streak + 1 if stalled else 1
    blamed = failure.node if failure.own_fault else None
    suspect = blamed if _is_suspect(budgets.blamed, failure) else None
    after = Budgets(
        budgets.max_restarts,
        spent,
        streak,
        committed=budgets.committed if committed is None else committed,
        blamed=None if suspect else blamed,
    )
    if failure.final is not None:
        return Decision(after, Verdict("failed", failure.final, failure.describe()))
    if streak >= _STREAK_LIMIT:
        said = f"no progress: {streak} failures in a row without a committed step beyond {committed}; the last: "
        return Decision(after, Verdict("failed", contract.EXIT_FAILED, said + failure.describe()))
    if spent[failure.cause] > budgets.max_restarts:
        said = f"the restart budget for {failure.cause} is spent ({budgets.max_restarts} allowed); the last: "
        return Decision(after, Verdict("failed", contract.EXIT_FAILED, said + failure.describe()))
    return Decision(after, suspect=suspect)


def _is_suspect(blamed: str | None, failure: Failure) -> bool:
    """Whether the failure's node is to be blamed: its device says so, or two failures in a row began there."""
    if failure.node is None or not failure.own_fault:
        return False
    return failure.node == blamed or names_broken_device(failure)


def names_broken_device(failure: Failure) -> bool:
    """Whether the failure's own words say that a device is to be replaced."""
    return _BROKEN_DEVICE.search(failure.reason) is not None
