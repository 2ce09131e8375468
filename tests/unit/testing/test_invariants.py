"""The invariants of a run find what they are for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.events import Event
from ktrain.testing import invariants

GOLDEN = Path(__file__).parents[2] / "golden" / "format-1"  # step 10 of attempt 2


def event(kind: str, attempt: int = 1, **fields: Any) -> Event:
    return Event(kind, fields, time=0.0, attempt=attempt)


def story() -> list[Event]:
    """A run of one rank that is killed after step 2 and goes on."""
    return [
        event("attempt_started", 1, world_size=1),
        event("fresh_start", 1, step=0),
        event("step", 1, step=1, loss=0.5),
        event("snapshot", 1, step=1, rank=0, tier="memory"),
        event("committed", 1, step=1, tier="memory"),
        event("step", 1, step=2, loss=0.25),
        event("attempt_started", 2, world_size=1),
        event("restored", 2, step=1, from_epoch=1, tier="memory"),
        event("step", 2, step=2, loss=0.25),
        event("step", 2, step=3, loss=0.125),
    ]


def test_invariants_sound_run_holds_all() -> None:
    found = story()

    assert invariants.check_run(found, Path("/nowhere")) == []
    assert invariants.check_steps(found, 3) == []
    assert invariants.check_same_losses(found, {1: 0.5, 2: 0.25, 3: 0.125}) == []


Change = Callable[[list[Event]], object]
BROKEN: list[tuple[str, Change, str]] = [
    ("other loss", lambda found: found.__setitem__(8, event("step", 2, step=2, loss=0.25000000000000006)), "step 2"),
    ("left out", lambda found: found.pop(8), "step 3, expected 2"),
    ("no restore", lambda found: found.pop(7), "before any restore"),
    ("same epoch", lambda found: found.append(event("attempt_started", 2, world_size=1)), "attempt 2 started"),
    (
        "restored from nowhere",
        lambda found: found.__setitem__(7, event("restored", 2, step=2, from_epoch=1, tier="memory")),
        "nothing says",
    ),
    (
        "restored from a tier it is not in",
        lambda found: found.__setitem__(7, event("restored", 2, step=1, from_epoch=1, tier="bucket")),
        "nothing says",
    ),
    ("no record", lambda found: found.append(event("committed", 2, step=3, tier="bucket")), "no record of it"),
    (
        "said twice",
        lambda found: found.extend([event("tier_failed", 2, tier="peer"), event("tier_failed", 2, tier="peer")]),
        "said twice",
    ),
]


@pytest.mark.parametrize(("change", "said"), [case[1:] for case in BROKEN], ids=[case[0] for case in BROKEN])
def test_invariants_broken_run_is_found(change: Change, said: str) -> None:
    found = story()
    change(found)

    assert said in "\n".join(invariants.check_run(found, Path("/nowhere")))


def test_check_steps_gap_and_surplus_are_found() -> None:
    found = [event("step", step=1, loss=1.0), event("step", step=4, loss=1.0)]

    assert invariants.check_steps(found, 3) == ["steps [2, 3] are missing from 1 to 3", "steps [4] are beyond 3"]


def test_check_same_losses_nan_is_equal_to_itself_alone() -> None:
    found = [event("step", step=1, loss=float("nan"))]

    assert invariants.check_same_losses(found, {1: float("nan")}) == []
    assert len(invariants.check_same_losses(found, {1: 0.0})) == 1


def test_check_commits_record_with_its_files_holds() -> None:
    assert invariants.check_commits([event("committed", 2, step=10, tier="bucket")], GOLDEN) == []


def test_check_commits_file_of_a_record_missing_is_found(tmp_path: Path) -> None:
    for path in GOLDEN.rglob("*"):
        if path.is_file() and path.name != "rank-00001.safetensors":
            target = tmp_path / path.relative_to(GOLDEN)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())

    (wrong,) = invariants.check_commits([], tmp_path)

    assert "rank-00001.safetensors" in wrong


def test_check_commits_collected_step_needs_no_record(tmp_path: Path) -> None:
    found = [event("committed", step=5, tier="bucket"), event("collected", step=5, tier="bucket")]

    assert invariants.check_commits(found, tmp_path) == []


def test_check_faults_once_repeated_fault_is_found() -> None:
    found = [event("fault_injected", spec="kill-head@step=1"), event("fault_injected", spec="kill-head@step=1")]

    assert len(invariants.check_faults_once(found, ["kill-head@step=1"])) == 1


def test_check_volume_freed_file_left_is_found(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert invariants.check_volume_freed(tmp_path) == []
    (tmp_path / "empty" / "slot-0").touch()

    assert len(invariants.check_volume_freed(tmp_path)) == 1


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
def test_check_nothing_runs_process_known_by_its_environment_is_found(tmp_path: Path) -> None:
    marker = str(tmp_path / "marker")
    process = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, "KTRAIN_TEST_MARK": marker}
    )
    try:
        deadline = Deadline.after(30.0)  # until exec, the child is a copy of this process
        while not (found := invariants.check_nothing_runs(marker)) and not deadline.expired():
            SYSTEM_CLOCK.sleep(0.02)
        assert str(process.pid) in found[0]
    finally:
        process.kill()
        process.communicate()
    assert invariants.check_nothing_runs(marker) == []
