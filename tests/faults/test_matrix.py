"""Every fault at every point where it can happen: it is noticed, and ends in the right step or in a clear stop.

Nothing may be deleted by it, and the ranks that load a step compare its bytes with what was saved.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract
from tests.faults.job import Job, Resumed, Stopped
from tests.faults.matrix import CASES
from tests.faults.model import Case

LATER = 200  # a step beyond all that a case saves


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    """What is broken on purpose is warned of, many times."""
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Memory-backed where there is such a place, as volumes are: the matrix makes and removes thousands of files."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="kt-", dir=shm if shm.is_dir() else None) as made:
        yield Path(made)


@pytest.fixture
def job(case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Job]:
    disk = folder / "disk" if case.has_disk else None
    monkeypatch.delenv(contract.ENV_DISK, raising=False)
    if disk is not None:
        monkeypatch.setenv(contract.ENV_DISK, str(disk))
    made = Job(folder, keep=case.keep, disk=disk)
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_fault_at_a_point_is_noticed_and_ends_well(case: Case, job: Job) -> None:
    if not case.is_new:
        job.train()
    case.play(job)
    before = job.contents()

    end = job.restart()

    assert end == case.end, end
    assert job.alarms() == case.seen
    assert job.store.num_struck() or not job.store.has_faults(), "the fault never struck"
    superseded = end.step if isinstance(end, Resumed) else 0  # slots of older steps may take the copies of this one
    gone = sorted(what for what, step, _ in before - job.contents() if step >= superseded)
    assert not gone, "deleted or changed by the restart"
    if isinstance(end, Stopped):
        assert all(word in end.message for word in case.words), end.message
    job.heal()
    _goes_on(job, end)


def _goes_on(job: Job, end: Resumed | Stopped) -> None:
    """Once the fault is gone the next save is in every tier; after a stop the next start finds what there was."""
    if isinstance(end, Stopped):
        return
    job.save_until_drained(LATER, turns=100)
    job.turn(2)
    assert job.committed() == dict.fromkeys(job.tiers(), LATER)
