"""Targets are held against the right numbers, and a page says what was reached, by how much not, and why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import CASES
from benchmarks.bench import TINY
from benchmarks.harness import Figure, Found, Kind, Measured, Outcome, Proofs, Unit
from benchmarks.rivals import RIVALS
from benchmarks.targets import ROWS, Of, Row, Target, page, reached, read_notes, verdicts

SHARE = Row("a", "a copy", "80 %", "", (Target("copying", "ours, * thread*", Of.SHARE, least=0.8),))
EITHER = Row(
    "b",
    "a stall",
    "1 % or 2 ms",
    "",
    (Target("loop", "of a step", Of.FIGURE, most=0.01), Target("loop", "taken", Of.FIGURE, most=0.002)),
    either=True,
)


def found_of(name: str, *rows: Measured, figures: tuple[Figure, ...] = ()) -> Found:
    return Found(name, "How fast?", "bytes / memcpy", Outcome(Proofs(["it is right"]), rows, figures))


def copying(*seconds: float) -> Found:
    plain = Measured("plain", Kind.BASELINE, 100, (1.0,))
    ours = [Measured(f"ours, {n + 1} threads", Kind.KTRAIN, 100, (s,), "plain") for n, s in enumerate(seconds)]
    return found_of("copying", plain, *ours)


def test_share_at_the_bound_is_reached() -> None:
    assert reached(SHARE, verdicts(SHARE, [copying(1.25)])) == "yes"


def test_share_below_the_bound_says_by_how_much() -> None:
    assert reached(SHARE, verdicts(SHARE, [copying(2.5)])) == "no: 40 %, 50% below"


def test_every_way_that_the_pattern_names_must_reach_the_bound() -> None:
    said = verdicts(SHARE, [copying(1.0, 1.6)])
    assert [verdict.is_reached for verdict in said] == [True, False]
    assert reached(SHARE, said) == "no: 62.5 %, 22% below"


@pytest.mark.parametrize(("value", "said"), [(0.02, "yes"), (0.03, "no: 3 %, 50% above")])
def test_upper_bound_of_a_figure(value: float, said: str) -> None:
    row = Row("c", "slow-down", "2 %", "", (Target("loop", "slowed down", Of.FIGURE, most=0.02),))
    figures = (Figure("slowed down", value, Unit.SHARE), Figure("slowed down, short", 1.0, Unit.SHARE))
    assert reached(row, verdicts(row, [found_of("loop", figures=figures)])) == said


@pytest.mark.parametrize(
    ("share", "seconds", "said"),
    [
        (0.005, 0.1, "yes"),
        (0.1, 0.001, "yes"),
        (0.05, 0.004, "no: 4 ms, 100% above"),  # the one that is nearer
    ],
)
def test_either_of_two_bounds_is_enough(share: float, seconds: float, said: str) -> None:
    figures = (Figure("of a step", share, Unit.SHARE), Figure("taken", seconds, Unit.SECONDS))
    assert reached(EITHER, verdicts(EITHER, [found_of("loop", figures=figures)])) == said


@pytest.mark.parametrize(("value", "said"), [(0.0, "yes"), (2.0, "no: 2, 200% above")])
def test_bound_of_zero_is_reached_by_zero_alone(value: float, said: str) -> None:
    row = Row("d", "collectives", "0", "", (Target("plan", "collectives", Of.FIGURE, most=0.0),))
    found = found_of("plan", figures=(Figure("collectives", value, Unit.COUNT),))
    assert reached(row, verdicts(row, [found])) == said


def test_rate_and_seconds_are_taken_of_the_median() -> None:
    ours = Measured("digest", Kind.KTRAIN, 30_000_000_000, (1.0, 2.0, 9.0))
    targets = (Target("native", "digest", Of.RATE, least=15e9), Target("native", "digest", Of.SECONDS, most=1.0))
    rate, seconds = verdicts(Row("e", "", "", "", targets), [found_of("native", ours)])
    assert (rate.value, rate.text, rate.is_reached) == (15e9, "15 GB/s", True)
    assert (seconds.value, seconds.short_by) == (2.0, 1.0)


def test_row_without_a_measured_way_is_not_measured() -> None:
    failed = Found("copying", "How fast?", "", None, "WrongBytes: a byte")
    assert reached(SHARE, verdicts(SHARE, [failed])) == "not measured"


def test_row_of_which_a_case_is_missing_is_reached_in_part() -> None:
    both = Row("f", "", "", "", (*SHARE.targets, Target("two_ranks", "ours", Of.SHARE, least=0.8)))
    assert reached(both, verdicts(both, [copying(1.0)])) == "in part: two_ranks not measured"


def test_page_merges_notes_failures_and_missing_engines() -> None:
    slow = found_of(
        "capture",
        Measured("plain", Kind.BASELINE, 8, (1.0,)),
        Measured("capture, 1 thread", Kind.KTRAIN, 8, (2.0,), "plain"),
    )
    broken = Found("stall", "How long?", "", None, "WrongBytes: a byte")
    notes = {"capture": {"limit": "memory", "tried": "two passes"}, "engines": {"torchft": "keeps no copy"}}
    text = page([slow, broken], notes, {"dlrover": "not installed"})
    assert "no: 50 %, 38% below" in text
    assert "Limit: memory Tried: two passes" in text
    assert "- stall: WrongBytes: a byte" in text
    assert "- torchft: keeps no copy" in text and "- dlrover: not installed" in text
    assert all(row.figure in text for row in ROWS)


def test_notes_of_a_row_that_does_not_exist_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.toml").write_text('[nonsense]\nlimit = "none"\n')
    with pytest.raises(ValueError, match="nonsense"):
        read_notes(tmp_path / "notes.toml")


def test_notes_in_the_repository_name_rows_of_the_table() -> None:
    assert read_notes()["engines"]


def test_table_of_a_record_is_made_anew_from_its_json(tmp_path: Path) -> None:
    about = {"date": "2026-01-02", "facts": report.facts(), "load_before": 0.5, "load_after": 1.5}
    folder = tmp_path / "2026-01-02-demo"
    report.write_record(folder, TINY, [copying(2.5)], {**about, "missing": {"dlrover": "not installed"}})
    table = folder / "table.md"
    first = table.read_text()
    assert "dlrover: not installed" in first and str(Path.home()) not in first
    table.unlink()
    report.write_table(folder)
    assert table.read_text() == first
    assert json.loads((folder / "record.json").read_text())["cases"][0]["case"] == "copying"


def test_targets_name_cases_that_exist() -> None:
    names = {case.name for case in CASES} | {f"stall_{name}" for name in RIVALS} | {"stall_*"}
    unknown = {target.case for row in ROWS for target in row.targets} - names
    assert unknown <= {"plan_world"}
