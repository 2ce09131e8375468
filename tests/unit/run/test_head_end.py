"""How a head ends: what fails while it closes does not take the verdict from the job."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import atomic, contract
from ktrain.base.job import LaunchSpec, WorkDir
from ktrain.checkpoint.coordinate import Coordinator
from ktrain.checkpoint.holder import Holder
from ktrain.checkpoint.log import LogReader
from ktrain.errors import UnavailableError
from ktrain.run.head import Head
from ktrain.run.wire import WireKeeper
from tests.unit.run.builders import TIMEOUTS, job


@pytest.fixture
def spec(tmp_path: Path) -> LaunchSpec:
    return replace(job(nodes=2), run=str(tmp_path / "run"))


@pytest.fixture
def work(tmp_path: Path, spec: LaunchSpec) -> WorkDir:
    """Of a launch that was told to stop before its head came up, so that the verdict is there at once."""
    work = WorkDir(tmp_path / "work")
    work.path.mkdir()
    work.write_token()
    atomic.write_json(work.head_state, {"launch_id": spec.launch_id, "stop": "signal SIGTERM"})
    return work


def closes_and_fails(kind: Any) -> Callable[[Any], None]:
    close = kind.close

    def close_and_fail(self: Any) -> None:
        close(self)
        raise UnavailableError("the bucket is away")

    return close_and_fail


@pytest.mark.parametrize("broken", [None, WireKeeper, Coordinator, Holder])
def test_head_writes_its_verdict_whatever_fails_to_close(
    broken: type | None, spec: LaunchSpec, work: WorkDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WireKeeper, "start", lambda self: None)  # no cluster for a job that ends at once
    if broken is not None:
        monkeypatch.setattr(broken, "close", closes_and_fails(broken))

    assert Head(spec, work).run() == contract.EXIT_STOPPED

    found = atomic.try_read_json(work.verdict)
    assert found == {
        "launch_id": spec.launch_id,
        "outcome": "stopped",
        "exit_code": contract.EXIT_STOPPED,
        "reason": "signal SIGTERM",
        "step": None,
    }
    events = LogReader(spec.run, timeouts=TIMEOUTS).read_new()
    assert [event.fields["outcome"] for event in events if event.kind == "run_ended"] == ["stopped"]
