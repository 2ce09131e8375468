"""Four ranks under torchrun, without a launcher of ours."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ktrain.testing.fault_plan import FaultPlan
from tests.integration.plain import ROOT, Place, same_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def torchrun(place: Place, plan: FaultPlan | None = None, **changed: object) -> None:
    options = ["--nproc-per-node=4", "--max-restarts=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, *place.command(**changed)[1:]]
    # torch's agent keeps its store between restarts, and gloo then finds addresses of processes that are dead.
    environment = {**place.environment(plan), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    log = place.folder / "torchrun.log"
    with open(log, "wb") as out:
        process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=out, stderr=out)
        try:
            code = process.wait(timeout=400)
        finally:
            process.terminate()
            process.wait(timeout=60)
    assert code == 0, log.read_text()[-8000:]


def test_torchrun_rank_0_killed_in_the_middle_of_a_commit_goes_on_with_the_same_losses(tmp_path: Path) -> None:
    whole, broken = Place(tmp_path / "whole"), Place(tmp_path / "broken")
    for place in (whole, broken):
        place.folder.mkdir()
    torchrun(whole)
    torchrun(broken, FaultPlan().fail_at("commit.begin"), await_bucket=[6])
    attempts = broken.events("attempt_started")
    assert [event.attempt for event in attempts] == [1, 2]
    assert len(broken.events("restored")) + len(broken.events("fresh_start")) == 2
    same_losses(broken.losses(), whole.losses())
    for place in (whole, broken):
        assert [path for path in place.volume.rglob("*") if path.is_file()] == []
