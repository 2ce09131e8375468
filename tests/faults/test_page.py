"""The page of the fault matrix is what the tests give, and the matrix is as wide as was promised."""

from __future__ import annotations

from pathlib import Path

from tests.faults import store
from tests.faults.elsewhere import ELSEWHERE
from tests.faults.job import Job, kind_of
from tests.faults.matrix import CASES
from tests.faults.model import PHASES
from tests.faults.page import PAGE, page

ROOT = Path(__file__).resolve().parents[2]


def test_page_is_what_the_generator_gives() -> None:
    assert PAGE.read_text("ascii") == page(), "run `make fault-matrix`"


def test_matrix_names_at_least_thirty_faults_in_every_phase() -> None:
    assert len({case.fault for case in CASES}) >= 30
    assert {case.phase for case in CASES} == set(PHASES)
    assert len({case.name for case in CASES}) == len(CASES), "two cells have one name"


def test_elsewhere_names_tests_that_exist() -> None:
    missing = []
    for _, _, test in ELSEWHERE:
        path, _, name = test.partition("::")
        text = (ROOT / path).read_text("utf-8") if (ROOT / path).is_file() else ""
        if f"def {name}(" not in text and f"{name} = " not in text:
            missing.append(test)
    assert missing == []


def test_points_are_all_the_calls_that_a_job_makes_to_its_store(tmp_path: Path) -> None:
    """A call that was added to the engine is a point where a store can fail: put it into `store`."""
    job = Job(tmp_path, keep=1)
    job.store.calls.clear()
    job.train()
    job.lose_all()
    job.restart()
    job.save_until_drained(30)
    job.close()
    made = {(operation, kind_of(name)) for operation, name in job.store.calls}
    points = (*store.START, *store.PLAN, *store.DRAIN, *store.COMMIT, *store.FIRST, *store.COLLECT)
    known = {(point.operation, point.what) for point in points}
    known |= {("read", f"attempt {part}") for part in ("committed", "durable")}  # read as the others are
    assert made <= known, f"no fault is put into {sorted(made - known)}"
