"""What one look found, in the words of a report, and how checks are run: one that fails does not end the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

from ktrain.errors import DeadlineError, ForbiddenError, KtrainError, NotFoundError, UnavailableError


class Outcome(StrEnum):
    """What a check came to."""

    OK = "ok"
    WARNING = "warning"  # the job runs, and something is worse than it could be
    FAILED = "failed"  # what was asked for cannot run
    UNKNOWN = "unknown"  # could not be looked at: neither good nor bad


@dataclass(frozen=True, slots=True)
class Finding:
    """One look. Where it is not good, `cost` says what comes of it and `remedy` what to do."""

    check: str
    outcome: Outcome
    evidence: str
    cost: str = ""
    remedy: str = ""

    def __post_init__(self) -> None:
        assert self.outcome is not Outcome.FAILED or (self.cost and self.remedy), self.check


class Shows(StrEnum):
    """Whether a requirement of the conformance programme was seen to be met."""

    MET = "met"
    NOT_MET = "not met"
    NOT_SHOWN = "not shown"  # what was looked at proves neither
    UNKNOWN = "unknown"  # it may not be looked at


@dataclass(frozen=True, slots=True)
class Standing:
    """One requirement of the programme on this cluster."""

    id: str
    level: str
    status: Shows
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """A name and what is done to find out; `look` may raise ktrain's errors of asking."""

    name: str
    look: Callable[[], Iterable[Finding]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All that was found of one cluster or machine."""

    target: str
    job: str | None = None
    findings: tuple[Finding, ...] = ()
    conformance: tuple[Standing, ...] = ()
    conformance_source: str = ""
    notes: tuple[str, ...] = ()

    @property
    def failed(self) -> tuple[Finding, ...]:
        return tuple(item for item in self.findings if item.outcome is Outcome.FAILED)

    def count(self, outcome: Outcome) -> int:
        return sum(item.outcome is outcome for item in self.findings)

    def to_value(self) -> dict[str, Any]:
        """As a JSON value."""
        return {**asdict(self), "failed": [item.check for item in self.failed]}


def run_checks(checks: Sequence[Check]) -> tuple[Finding, ...]:
    """The findings of all checks in their order; a look that could not be made is unknown, with the reason."""
    return tuple(finding for check in checks for finding in _run(check))


def _run(check: Check) -> Iterator[Finding]:
    try:
        yield from check.look()
    except ForbiddenError as error:
        remedy = "ask the administrator for this right, or run it as somebody who has it"
        yield Finding(check.name, Outcome.UNKNOWN, f"may not be read: {error}", remedy=remedy)
    except NotFoundError as error:
        yield Finding(check.name, Outcome.UNKNOWN, f"is not there to be read: {error}")
    except (UnavailableError, DeadlineError) as error:
        yield Finding(check.name, Outcome.UNKNOWN, f"no answer: {error}", remedy="try again")
    except (KtrainError, OSError) as error:
        yield Finding(check.name, Outcome.UNKNOWN, f"could not be looked at: {error}")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        # Only an answer whose form is not Kubernetes' own gets here: a proxy, an aggregated API that is not one.
        said = f"{type(error).__name__}: {error}"
        yield Finding(check.name, Outcome.UNKNOWN, f"the answer has another form than expected ({said})")
