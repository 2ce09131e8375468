"""The table of targets: what is asked of each figure, whether a run reached it, and by how much not.

A target is never a test: a figure that falls short is reported and leaves the exit code alone.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from fnmatch import fnmatchcase
from pathlib import Path

from benchmarks.harness import Figure, Found, Measured, Unit

NOTES = Path(__file__).parent / "notes.toml"
GB = 1e9


class Of(Enum):
    """Which number of a way is held against the target."""

    SHARE = "share"  # of its baseline
    SECONDS = "seconds"
    RATE = "rate"  # bytes per second
    FIGURE = "figure"  # a `Figure` of the case, by its name


@dataclass(frozen=True, slots=True)
class Target:
    """One bound. `case` and `way` are patterns, since names say threads and libraries."""

    case: str
    way: str
    of: Of
    least: float | None = None
    most: float | None = None

    @property
    def bound(self) -> float:
        bound = self.least if self.least is not None else self.most
        assert bound is not None, "a target has a bound"
        return bound

    def short_by(self, value: float) -> float:
        """How far the value is from the bound, as a share of the bound; 0 or less where it is reached."""
        return (self.bound - value if self.least is not None else value - self.bound) / (self.bound or 1.0)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `key` names its note; with `either`, one reached target of a case is enough."""

    key: str
    figure: str
    at_least: str
    field_today: str
    targets: tuple[Target, ...]
    either: bool = False


ROWS = (
    Row(
        "capture",
        "capture into a warm slot, digest included",
        "80 % of a plain copy with the same threads",
        "DCP to tmpfs 4 % (1,000 tensors) to 14 % (few)",
        (
            Target("two_ranks", "capture, sealed", Of.SHARE, least=0.8),
            Target("capture", "capture, * thread*", Of.SHARE, least=0.8),
        ),
    ),
    Row(
        "first-capture",
        "first capture",
        "the same, since slots are prepared",
        "first save up to 20 s slower",
        (Target("first_capture", "first capture, prepared slot", Of.SHARE, least=0.8),),
    ),
    Row(
        "stall",
        "time that `step()` plus the wait at the next optimizer step takes from the loop, 10-step cadence",
        "1 % of step time, or 2 ms",
        "DCP thread 100s of ms to s",
        (
            Target("stall", "taken from the loop by a save, of the time of one step", Of.FIGURE, most=0.01),
            Target("stall", "taken from the loop by a save", Of.FIGURE, most=0.002),
        ),
        either=True,
    ),
    Row(
        "stall-of-peers",
        "against the fastest peer's stall, same state, same run",
        "10 times less",
        "DLRover: one memcpy",
        (Target("stall_*", "the fastest peer's stall, of ktrain's", Of.FIGURE, least=10.0),),
    ),
    Row(
        "slow-down",
        "the whole loop slowed down by memory snapshots, cadence of 10 steps, steps ten times as long as the copy",
        "2 %",
        "",
        (Target("stall", "the loop slowed down", Of.FIGURE, most=0.02),),
    ),
    Row(
        "small-save",
        "20,000 tensors: save",
        "0.5 s",
        "DCP 10 to 12 s",
        (Target("capture_small", "capture, * thread*", Of.SECONDS, most=0.5),),
    ),
    Row(
        "small-load",
        "20,000 tensors: load",
        "0.5 s",
        "DCP 13 to 16 s",
        (Target("restore_small", "restore from memory, * thread*", Of.SECONDS, most=0.5),),
    ),
    Row(
        "small-metadata",
        "20,000 tensors: metadata of each, header included",
        "under 250 B",
        "DCP 1.8 kB",
        (Target("capture_small", "metadata of each tensor, header included", Of.FIGURE, most=250.0),),
    ),
    Row(
        "plan",
        "unchanged plan at 1,024 simulated ranks",
        "0 collectives, 50 ms",
        "1.5 s at 256",
        (Target("plan_world", "unchanged plan*", Of.SECONDS, most=0.05),),
    ),
    Row(
        "restore",
        "restore from memory, verified, into live tensors",
        "70 % of a plain copy",
        "DCP 1.4 % to 23 %",
        (
            Target("two_ranks", "restore from memory, proven", Of.SHARE, least=0.7),
            Target("restore_memory", "restore from memory, * thread*", Of.SHARE, least=0.7),
        ),
    ),
    Row(
        "drain-disk",
        "drain to disk",
        "90 % of the best plain writer (same fsync)",
        "",
        (Target("drain_file", "drain to file://", Of.SHARE, least=0.9),),
    ),
    Row(
        "drain-bucket",
        "drain to the S3 server of the tests",
        "90 % of the best plain client",
        "",
        (Target("drain_s3", "drain to s3://", Of.SHARE, least=0.9),),
    ),
    Row(
        "restore-bucket",
        "restore from the S3 server of the tests",
        "90 % of the best plain client",
        "",
        (Target("restore_s3", "restore from s3://", Of.SHARE, least=0.9),),
    ),
    Row(
        "digest",
        "digest",
        "15 GB/s per core",
        "",
        (Target("native", "digest, 1 thread", Of.RATE, least=15 * GB),),
    ),
    Row(
        "digest-in-copy",
        "what the digest adds to a background copy",
        "at most 20 %",
        "xxh3 fused 18 %, as a second pass 54 %",
        (Target("native", "added to a copy by its digest, 1 thread", Of.FIGURE, most=0.2),),
    ),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one way of a run says about one target."""

    target: Target
    case: str
    way: str
    value: float
    text: str

    @property
    def short_by(self) -> float:
        return self.target.short_by(self.value)

    @property
    def is_reached(self) -> bool:
        return self.short_by <= 0


def verdicts(row: Row, found: Sequence[Found]) -> list[Verdict]:
    """Every way of a run that the row's targets speak of."""
    return [verdict for target in row.targets for one in found for verdict in _of_case(target, one)]


def _of_case(target: Target, found: Found) -> Iterator[Verdict]:
    if found.outcome is None or not fnmatchcase(found.name, target.case):
        return
    if target.of is Of.FIGURE:
        for figure in found.outcome.figures:
            if fnmatchcase(figure.name, target.way):
                yield Verdict(target, found.name, figure.name, figure.value, str(figure))
        return
    by_name = {row.name: row for row in found.outcome.rows}
    for row in found.outcome.rows:
        if fnmatchcase(row.name, target.way):
            value = _value(target.of, row, by_name)
            yield Verdict(target, found.name, row.name, value, _text(target.of, value))


def _value(of: Of, row: Measured, by_name: Mapping[str, Measured]) -> float:
    if of is Of.SECONDS:
        return row.median_s
    if of is Of.RATE:
        return row.bytes_per_s() or 0.0
    assert row.beside is not None, f"{row.name}: a share needs a baseline"
    return row.share_of(by_name[row.beside])


def _text(of: Of, value: float) -> str:
    if of is Of.RATE:
        return f"{value / GB:.3g} GB/s"
    return str(Figure("", value, Unit.SECONDS if of is Of.SECONDS else Unit.SHARE))


def read_notes(path: Path = NOTES) -> dict[str, dict[str, str]]:
    """What people wrote about rows that fall short, and about engines that cannot run: key -> {limit, tried}.

    Raises:
        ValueError: a note names no row.
    """
    notes: dict[str, dict[str, str]] = tomllib.loads(path.read_text())
    unknown = notes.keys() - {row.key for row in ROWS} - {"engines"}
    if unknown:
        raise ValueError(f"{path.name}: expected keys of rows, found {', '.join(sorted(unknown))}")
    return notes


def page(found: Sequence[Found], notes: Mapping[str, Mapping[str, str]], missing: Mapping[str, str]) -> str:
    """The whole table in Markdown, then the reasons: of rows that fall short, of cases that failed, of engines."""
    lines = [
        "| figure | at least | measured | reached | the field before |",
        "|---|---|---|---|---|",
    ]
    reasons: list[str] = []
    for row in ROWS:
        said = verdicts(row, found)
        verdict = reached(row, said)
        measured = "; ".join(f"{one.text} ({one.case}: {one.way})" for one in said) or "not measured in this run"
        lines.append(f"| {row.figure} | {row.at_least} | {measured} | {verdict} | {row.field_today} |")
        if verdict != "yes":
            note = notes.get(row.key, {})
            told = " ".join(f"{name.capitalize()}: {note[name]}" for name in ("limit", "tried") if name in note)
            reasons.append(f"- **{row.figure}** ({verdict}). {told or 'No note yet: see benchmarks/notes.toml.'}")
    parts = ["\n".join(lines)]
    if reasons:
        parts.append("## What falls short\n\n" + "\n".join(reasons))
    failed = [f"- {one.name}: {one.failure}" for one in found if one.outcome is None]
    if failed:
        parts.append("## Cases that failed\n\n" + "\n".join(failed))
    engines = {**notes.get("engines", {}), **missing}
    parts.append(
        "## Engines that did not run\n\n" + "\n".join(f"- {name}: {why}" for name, why in sorted(engines.items()))
    )
    return "\n\n".join(parts) + "\n"


def reached(row: Row, said: Sequence[Verdict]) -> str:
    """A row is reached where all its targets were measured and reached, or with `either` one of them."""
    if not said:
        return "not measured"
    if row.either and any(one.is_reached for one in said):
        return "yes"
    worst = (min if row.either else max)(said, key=lambda one: one.short_by)
    if not worst.is_reached:
        return f"no: {worst.text}, {worst.short_by:.0%} {'below' if worst.target.least is not None else 'above'}"
    unmeasured = {target.case for target in row.targets} - {one.target.case for one in said}
    return f"in part: {', '.join(sorted(unmeasured))} not measured" if unmeasured else "yes"
