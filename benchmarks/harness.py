"""How every case measures: bytes proven first, then all ways in turn, each repetition beside its baseline.

A case never asserts a time. What counts is the share of a baseline that ran in the same rounds; absolute figures
hold for the run that printed them.
"""

from __future__ import annotations

import statistics
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from benchmarks.bench import Bench

Bytes = npt.NDArray[np.uint8]
_MANY = 10  # repetitions from which a 95th percentile says something


class Kind(StrEnum):
    """Whose speed a row shows."""

    BASELINE = "baseline"  # what the machine, or the tool below ktrain, gives
    KTRAIN = "ktrain"
    PEER = "peer"  # another library at the same task, for orientation


class WrongBytes(AssertionError):
    """A way is fast and wrong; nothing is reported."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One way and the seconds of its repetitions. `nbytes` is 0 where only the time means something."""

    name: str
    kind: Kind
    nbytes: int
    seconds: tuple[float, ...]
    beside: str | None = None  # the baseline's name

    @property
    def median_s(self) -> float:
        return statistics.median(self.seconds)

    @property
    def p95_s(self) -> float | None:
        """The 95th percentile; None for few repetitions."""
        if len(self.seconds) < _MANY:
            return None
        return sorted(self.seconds)[round(0.95 * (len(self.seconds) - 1))]

    def bytes_per_s(self) -> float | None:
        return self.nbytes / self.median_s if self.nbytes else None

    def share_of(self, baseline: Measured) -> float:
        """Median over the rounds of the baseline's time over this one's, for the same bytes.

        Round by round, because both then met the same neighbours.
        """
        scale = self.nbytes / baseline.nbytes if self.nbytes and baseline.nbytes else 1.0
        if len(self.seconds) != len(baseline.seconds):
            return scale * baseline.median_s / self.median_s
        return scale * statistics.median(b / s for b, s in zip(baseline.seconds, self.seconds, strict=True))


@dataclass(slots=True)
class Step:
    """One way to be measured. `work` may return the seconds as a float, where another process takes them."""

    name: str
    kind: Kind
    nbytes: int
    work: Callable[[], object]
    beside: str | None = None
    before: Callable[[], object] = lambda: None
    after: Callable[[], object] = lambda: None


@dataclass(slots=True)
class Proofs:
    """What a case has proven before it measures."""

    said: list[str] = field(default_factory=list)

    def same(self, what: str, found: Any, expected: Any) -> None:
        """Proves that two buffers hold the same bytes.

        Raises:
            WrongBytes: they do not.
        """
        left, right = as_bytes(found), as_bytes(expected)
        self.true(what, left.nbytes == right.nbytes and left.nbytes > 0 and bool(np.array_equal(left, right)))

    def true(self, what: str, holds: bool) -> None:
        """Records a proof made elsewhere.

        Raises:
            WrongBytes: it failed.
        """
        if not holds:
            raise WrongBytes(f"{what}: does not hold; nothing is reported")
        if what not in self.said:
            self.said.append(what)


class Unit(StrEnum):
    """What the value of a `Figure` counts."""

    SHARE = "share"  # 0.02 is 2 %
    SECONDS = "s"
    TIMES = "times"
    BYTES = "B"
    COUNT = "count"


@dataclass(frozen=True, slots=True)
class Figure:
    """One number that a case derives from its rows, or counts."""

    name: str
    value: float
    unit: Unit

    def __str__(self) -> str:
        match self.unit:
            case Unit.SHARE:
                return f"{self.value * 100:.3g} %"
            case Unit.SECONDS:
                return f"{self.value * 1e3:.3g} ms"
            case Unit.TIMES:
                return f"{self.value:.3g} times"
            case Unit.BYTES:
                return f"{self.value:.0f} B"
            case Unit.COUNT:
                return f"{self.value:.0f}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a case found."""

    proofs: Proofs
    rows: Sequence[Measured]
    figures: Sequence[Figure] = ()


@dataclass(frozen=True, slots=True)
class Case:
    """One question. `floor` says what no implementation can beat, in words of bytes and bandwidth."""

    name: str
    question: str
    floor: str
    run: Callable[[Bench], Outcome]


def measure(steps: Sequence[Step], repeats: int) -> list[Measured]:
    """All steps once unmeasured, then `repeats` rounds, every second one backwards."""
    taken: dict[str, list[float]] = {step.name: [] for step in steps}
    assert len(taken) == len(steps), "names of steps must differ"
    for turn in range(repeats + 1):
        for step in steps if turn % 2 else reversed(steps):
            seconds = _timed(step)
            if turn:  # the first round pays for first touches
                taken[step.name].append(seconds)
    return [Measured(s.name, s.kind, s.nbytes, tuple(taken[s.name]), s.beside) for s in steps]


def _timed(step: Step) -> float:
    step.before()
    begin = time.perf_counter()
    told = step.work()
    seconds = time.perf_counter() - begin
    step.after()
    return told if isinstance(told, float) else seconds


def as_bytes(value: Any) -> Bytes:
    """A buffer or a CPU tensor as bytes, without a copy."""
    if hasattr(value, "data_ptr"):
        import torch

        return value.detach().contiguous().reshape(-1).view(torch.uint8).numpy()  # type: ignore[no-any-return]
    return np.frombuffer(value, dtype=np.uint8)


def random_bytes(nbytes: int, seed: int = 0) -> Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def memcpy(target: Bytes, source: Bytes, num_threads: int = 1) -> None:
    """numpy's copy of contiguous bytes is one memcpy without the GIL; several threads copy a part each."""
    bounds = np.linspace(0, source.nbytes, num_threads + 1).astype(int)
    parts = [slice(begin, end) for begin, end in zip(bounds, bounds[1:], strict=False)]
    others = [threading.Thread(target=np.copyto, args=(target[part], source[part])) for part in parts[1:]]
    for thread in others:
        thread.start()
    np.copyto(target[parts[0]], source[parts[0]])
    for thread in others:
        thread.join()


@dataclass(frozen=True, slots=True)
class Found:
    """A case that ran: its outcome, or the failure that left none."""

    name: str
    question: str
    floor: str
    outcome: Outcome | None
    failure: str = ""


def run(case: Case, bench: Bench) -> Found:
    """Runs one case. Whatever it raises is its own failure, so that the others still run."""
    try:
        return Found(case.name, case.question, case.floor, case.run(bench))
    except Exception as error:  # noqa: BLE001 -- the top of a case: recorded, and the others run
        traceback.print_exc()
        said = str(error).splitlines()
        return Found(case.name, case.question, case.floor, None, f"{type(error).__name__}: {said[0] if said else ''}")


def to_json(found: Found) -> dict[str, Any]:
    value: dict[str, Any] = {"case": found.name, "question": found.question, "floor": found.floor}
    if found.outcome is None:
        return {**value, "failure": found.failure}
    return {
        **value,
        "proven": found.outcome.proofs.said,
        "rows": [asdict(row) for row in found.outcome.rows],
        "figures": [asdict(figure) for figure in found.outcome.figures],
    }


def from_json(value: dict[str, Any]) -> Found:
    """What `to_json` wrote."""
    outcome = None
    if "failure" not in value:
        rows = [
            Measured(**{**row, "kind": Kind(row["kind"]), "seconds": tuple(row["seconds"])}) for row in value["rows"]
        ]
        figures = [Figure(**{**figure, "unit": Unit(figure["unit"])}) for figure in value["figures"]]
        outcome = Outcome(Proofs(list(value["proven"])), rows, figures)
    return Found(value["case"], value["question"], value["floor"], outcome, value.get("failure", ""))
