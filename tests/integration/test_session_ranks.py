"""Sessions on two real ranks over gloo, compared with one rank."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.events import parse_lines
from ktrain.train.report import Report

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]  # imports of torch take their time on a busy machine
ROOT = Path(__file__).parents[2]
DEFAULTS = {"mesh": "fsdp", "steps": 8, "micro_batch": 4, "clip": 1.0, "dropout": 0.0, "precision": "fp32"}


@dataclass(frozen=True)
class Outcome:
    exit_codes: list[int]
    errors: list[str]
    said: dict[str, Any]  # of rank 0, where it came to its end


def start(folder: Path, world_size: int, **changed: Any) -> Outcome:
    """Runs the worker on `world_size` ranks to its end; its run and volume lie in `folder`."""
    asked = {**DEFAULTS, "run": str(folder / "run"), "bad_step": None, "crash_step": None, **changed}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = []
    for rank in range(world_size):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "KTRAIN_VOLUME": folder / "volume"}
        place |= {"PYTHONPATH": ROOT, "KTRAIN_PATIENCE_S": 20}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        command = [sys.executable, "-m", "tests.integration.session_worker", json.dumps(asked)]
        pipe = subprocess.PIPE
        workers.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=pipe, stderr=pipe, text=True))
    try:
        ends = [worker.communicate(timeout=140) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    said = json.loads(ends[0][0]) if ends[0][0] else {}
    return Outcome([worker.returncode for worker in workers], [end[1] for end in ends], said)


def losses(folder: Path) -> dict[int, float]:
    """Step -> loss, the last where a step was done twice."""
    events = parse_lines((folder / "run" / "events.jsonl").read_bytes().splitlines())
    return {event.fields["step"]: event.fields["loss"] for event in events if event.kind == "step"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[int, float], float]:
    """Losses and held-out loss of one rank."""
    folder = tmp_path_factory.mktemp("alone")
    outcome = start(folder, 1)
    assert outcome.exit_codes == [0], outcome.errors
    return losses(folder), outcome.said["held_out"]


@pytest.mark.parametrize("mesh", ["fsdp", "ddp"])
def test_session_two_ranks_train_as_one_does(mesh: str, tmp_path: Path, alone: tuple[dict[int, float], float]) -> None:
    outcome = start(tmp_path, 2, mesh=mesh)
    assert outcome.exit_codes == [0, 0], outcome.errors
    assert losses(tmp_path) == pytest.approx(alone[0], rel=1e-5)
    assert outcome.said["held_out"] == pytest.approx(alone[1], rel=1e-5)


def test_session_crashed_two_ranks_resume_bit_for_bit(tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(whole, 2, dropout=0.3).exit_codes == [0, 0]
    assert start(broken, 2, dropout=0.3, crash_step=5).exit_codes == [41, 41]
    before = losses(broken)
    assert set(before) <= set(range(1, 6)) and len(before) >= 4
    resumed = start(broken, 2, dropout=0.3)
    assert resumed.exit_codes == [0, 0], resumed.errors
    assert resumed.said["restored"] in (2, 4)
    assert losses(broken) == losses(whole)
    assert {step: losses(whole)[step] for step in before} == before


def test_session_crashed_two_ranks_go_on_as_one(tmp_path: Path, alone: tuple[dict[int, float], float]) -> None:
    assert start(tmp_path, 2, crash_step=5).exit_codes == [41, 41]
    resumed = start(tmp_path, 1)
    assert resumed.exit_codes == [0], resumed.errors
    assert resumed.said["restored"] in (2, 4)
    assert losses(tmp_path) == pytest.approx(alone[0], rel=1e-5)
    report = Report.from_events(parse_lines((tmp_path / "run" / "events.jsonl").read_bytes().splitlines()))
    assert (report.outcome, report.step, len(report.attempts)) == ("succeeded", 8, 2)
    assert report.attempts[1].restored_tier in ("memory", "bucket")


def test_session_loss_not_finite_on_one_rank_ends_all_with_the_same_words(tmp_path: Path) -> None:
    outcome = start(tmp_path, 2, bad_step=3, mesh="ddp", precision="bf16")
    assert outcome.exit_codes == [1, 1]
    assert all("step 3: expected finite numbers, found loss nan" in error for error in outcome.errors)
    assert max(losses(tmp_path)) == 2
