"""How a head comes up while its store is away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from ktrain.base import atomic
from ktrain.base.job import LaunchSpec, WorkDir
from ktrain.errors import ConflictError, UnavailableError
from ktrain.run.head import Head, open_head
from ktrain.testing.fake_clock import FakeClock
from tests.unit.run.builders import in_pod, job

HEAD = cast(Head, object())


def away(times: int, error: Exception) -> Callable[[LaunchSpec, WorkDir], Head]:
    left = [times]

    def make(spec: LaunchSpec, work: WorkDir) -> Head:
        left[0] -= 1
        if left[0] >= 0:
            raise error
        return HEAD

    return make


def work_of(tmp_path: Path, **saved: Any) -> WorkDir:
    work = WorkDir(tmp_path)
    atomic.write_json(work.head_state, saved)
    return work


def test_open_head_first_of_the_launch_fails_at_once(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError):
        open_head(job(), WorkDir(tmp_path), make=away(1, UnavailableError("away")), clock=FakeClock())


def test_open_head_replacing_a_dead_one_waits_for_the_store(tmp_path: Path) -> None:
    work = work_of(tmp_path, launch_id=job().launch_id)

    assert open_head(job(), work, make=away(5, UnavailableError("away")), clock=FakeClock()) is HEAD


def test_open_head_replacing_a_dead_one_does_not_wait_for_ever(tmp_path: Path) -> None:
    work = work_of(tmp_path, launch_id=job().launch_id)

    with pytest.raises(UnavailableError):
        open_head(job(), work, make=away(10**9, UnavailableError("away")), clock=FakeClock())


def test_open_head_state_of_another_launch_does_not_count(tmp_path: Path) -> None:
    work = work_of(tmp_path, launch_id="older")

    with pytest.raises(UnavailableError):
        open_head(job(), work, make=away(1, UnavailableError("away")), clock=FakeClock())


def test_open_head_run_held_elsewhere_is_final(tmp_path: Path) -> None:
    work = work_of(tmp_path, launch_id=job().launch_id)

    with pytest.raises(ConflictError):
        open_head(job(), work, make=away(1, ConflictError("held")), clock=FakeClock())


@pytest.mark.parametrize("error", [UnavailableError("away"), ConflictError("held by the dead one")])
def test_open_head_in_a_pod_waits_though_it_finds_no_trace_of_another(error: Exception, tmp_path: Path) -> None:
    assert open_head(in_pod(), WorkDir(tmp_path), make=away(5, error), clock=FakeClock()) is HEAD


def test_open_head_in_a_pod_run_that_stays_held_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConflictError):
        open_head(in_pod(), WorkDir(tmp_path), make=away(10**9, ConflictError("held")), clock=FakeClock())
