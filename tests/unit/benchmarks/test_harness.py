"""What is measured is proven, in turn with its baseline, and reported as it was."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import report
from benchmarks.__main__ import main
from benchmarks.bench import TINY, Bench
from benchmarks.harness import (
    Case,
    Figure,
    Found,
    Kind,
    Measured,
    Outcome,
    Proofs,
    Step,
    Unit,
    WrongBytes,
    from_json,
    measure,
    memcpy,
    run,
    to_json,
)


def test_proofs_same_with_a_flipped_bit_raises() -> None:
    data = bytearray(b"snapshot" * 100)
    wrong = bytearray(data)
    wrong[333] ^= 1
    proofs = Proofs()
    proofs.same("equal", data, bytes(data))
    with pytest.raises(WrongBytes, match="copied"):
        proofs.same("copied", wrong, data)
    assert proofs.said == ["equal"]


@pytest.mark.parametrize("found", [b"", b"snap"])
def test_proofs_same_with_missing_bytes_raises(found: bytes) -> None:
    with pytest.raises(WrongBytes):
        Proofs().same("copied", found, b"snapshot")


def test_proofs_same_with_nothing_to_compare_raises() -> None:
    with pytest.raises(WrongBytes):
        Proofs().same("copied", b"", b"")


def test_measure_interleaves_steps_and_drops_the_first_round() -> None:
    calls: list[str] = []
    steps = [
        Step("plain", Kind.BASELINE, 8, lambda: calls.append("plain")),
        Step("ours", Kind.KTRAIN, 8, lambda: calls.append("ours"), "plain", lambda: calls.append("before")),
    ]
    rows = measure(steps, repeats=2)
    assert [len(row.seconds) for row in rows] == [2, 2]
    one_way, other_way = ["plain", "before", "ours"], ["before", "ours", "plain"]
    assert calls == [*other_way, *one_way, *other_way]


def test_measure_takes_the_seconds_that_work_tells() -> None:
    rows = measure([Step("told", Kind.BASELINE, 8, lambda: 2.5), Step("none", Kind.PEER, 8, lambda: {"no": 1})], 3)
    assert rows[0].seconds == (2.5, 2.5, 2.5)
    assert all(0 <= seconds < 2.5 for seconds in rows[1].seconds)


def test_share_is_taken_round_by_round() -> None:
    # The third round met a neighbour: both were slow, and their ratio is as before.
    plain = Measured("plain", Kind.BASELINE, 100, (1.0, 1.0, 9.0))
    ours = Measured("ours", Kind.KTRAIN, 100, (2.0, 2.0, 18.0), "plain")
    assert ours.share_of(plain) == 0.5


def test_share_of_other_bytes_compares_rates() -> None:
    plain = Measured("plain", Kind.BASELINE, 100, (1.0,))
    assert Measured("ours", Kind.KTRAIN, 50, (1.0,)).share_of(plain) == 0.5


def test_p95_of_few_repetitions_is_none() -> None:
    assert Measured("few", Kind.KTRAIN, 0, (1.0,) * 9).p95_s is None
    assert Measured("many", Kind.KTRAIN, 0, tuple(map(float, range(1, 101)))).p95_s == 95.0


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_memcpy_with_any_threads_copies_every_byte(num_threads: int) -> None:
    source = np.arange(10_001, dtype=np.uint8)
    target = np.zeros_like(source)
    memcpy(target, source, num_threads)
    assert np.array_equal(target, source)


def test_record_keeps_seconds_and_facts_without_names_of_the_machine(tmp_path: Path) -> None:
    rows = [Measured("plain", Kind.BASELINE, 100, (1.0,)), Measured("ours", Kind.KTRAIN, 100, (2.0,), "plain")]
    found = Found("demo", "How fast?", "bytes / memcpy", Outcome(Proofs(["it is right"]), rows))
    about = {"date": "2026-01-02", "facts": report.facts(), "load_before": 0.5, "load_after": 1.5, "note": "quiet"}
    folder = tmp_path / "2026-01-02-demo"
    report.write_record(folder, TINY, [found], about)
    value = json.loads((folder / "record.json").read_text())
    assert value["cases"][0]["rows"][1]["seconds"] == [2.0]
    assert value["facts"]["cores"] >= 1
    text = (folder / "record.md").read_text()
    assert "50% of plain" in text and "quiet" in text and "it is right" in text
    assert str(Path.home()) not in text + json.dumps(value)


def test_outcome_survives_json() -> None:
    rows = [Measured("plain", Kind.BASELINE, 8, (1.0, 2.0)), Measured("ours", Kind.KTRAIN, 8, (2.0, 3.0), "plain")]
    found = Found("demo", "How?", "f", Outcome(Proofs(["right"]), rows, [Figure("slowed", 0.02, Unit.SHARE)]))
    failed = Found("broken", "How?", "f", None, "WrongBytes: a byte")
    assert [from_json(json.loads(json.dumps(to_json(one)))) for one in (found, failed)] == [found, failed]


def test_case_that_raises_is_found_with_its_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(bench: Bench) -> Outcome:
        raise WrongBytes("the copy: does not hold\nmore")

    with Bench(TINY, disk=tmp_path) as bench:
        found = run(Case("broken", "How?", "f", broken), bench)
    assert found.outcome is None and found.failure == "WrongBytes: the copy: does not hold"
    assert "Failed, so nothing is reported: WrongBytes" in report.section(found)
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("failing", "code"), [(False, 0), (True, 1)])
def test_main_runs_the_other_cases_and_tells_of_a_failure(
    failing: bool, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def first(bench: Bench) -> Outcome:
        if failing:
            raise WrongBytes("a byte")
        return second(bench)

    def second(bench: Bench) -> Outcome:
        return Outcome(Proofs(["right"]), [Measured("plain", Kind.BASELINE, 8, (1.0,))])

    cases = (Case("first", "How?", "f", first), Case("second", "And how?", "f", second))
    monkeypatch.setattr("benchmarks.__main__.CASES", cases)
    assert main(["--quick"]) == code
    said = capsys.readouterr()
    assert "And how?" in said.out
    assert ("failed, see above: first" in said.err) == failing


def test_bench_ends_without_its_folders(tmp_path: Path) -> None:
    with Bench(TINY, disk=tmp_path) as bench:
        made = [bench.volume_root, bench.work_dir]
        assert all(folder.is_dir() for folder in made)
    assert not any(folder.exists() for folder in made)


def test_main_with_an_unknown_case_exits_with_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(["--only", "nonsense"])
    assert error.value.code == 2
    assert "nonsense" in capsys.readouterr().err


def test_main_for_gpus_without_one_refuses_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert main(["--gpu"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
