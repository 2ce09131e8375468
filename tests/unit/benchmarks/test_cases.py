"""Every case runs at tiny sizes, proves its bytes and reports rows that stand beside their baselines."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest

from benchmarks import report
from benchmarks.__main__ import CASES
from benchmarks.bench import TINY, Bench
from benchmarks.harness import Case, Found, Kind, WrongBytes
from benchmarks.snapshots import large
from benchmarks.targets import ROWS, verdicts
from ktrain.testing.s3_servers import find_program

_S3 = {"drain_s3", "restore_s3"}
_RAY = {"replicate", "restore_peer"}  # the first of them starts two nodes of Ray


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """Shared, as in a run: Ray and the S3 server start once."""
    with Bench(TINY, disk=tmp_path_factory.mktemp("disk")) as made:
        yield made


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.name in _RAY else []) for case in CASES],
)
# Of s3fs and torch, whose plain ways stand beside ours.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_case_at_tiny_size_proves_bytes_and_reports(case: Case, bench: Bench) -> None:
    if case.name in _S3 and find_program("rclone") is None:
        pytest.skip("rclone is not installed")
    outcome = case.run(bench)
    assert outcome.proofs.said
    names = [row.name for row in outcome.rows]
    assert len(set(names)) == len(names)
    assert any(row.kind is Kind.KTRAIN for row in outcome.rows) or case.name == "memcpy"
    for row in outcome.rows:
        assert row.seconds and all(seconds > 0 for seconds in row.seconds)
        assert row.beside is None or row.beside in names
    text = report.section(Found(case.name, case.question, case.floor, outcome))
    assert case.question in text and all(name in text for name in names)
    for row in ROWS:
        said = verdicts(row, [Found(case.name, case.question, case.floor, outcome)])
        aimed = [target for target in row.targets if fnmatchcase(case.name, target.case)]
        assert {verdict.target for verdict in said} == set(aimed), f"{row.key}: a target finds no number"


def test_names_of_cases_differ() -> None:
    assert len({case.name for case in CASES}) == len(CASES)


def test_case_with_a_wrong_byte_in_the_slot_reports_nothing(bench: Bench) -> None:
    snapshots = large(bench)
    snapshots.capture()
    assert snapshots.held is not None
    payload = snapshots.volume.path / f"{snapshots.held.slot}.safetensors"
    with open(payload, "r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    with pytest.raises(WrongBytes):
        next(case for case in CASES if case.name == "capture").run(bench)
    snapshots.capture()
