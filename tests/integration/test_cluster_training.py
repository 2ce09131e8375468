"""Whole training jobs through the Kubernetes backend to a cluster whose pods run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.launcher.backends.kubernetes.status import State
from tests.integration import launch_worker
from tests.integration.cluster_jobs import cluster, send

pytestmark = pytest.mark.timeout(400)


def code_folder(folder: Path) -> Path:
    code = folder / "code"
    code.mkdir()
    shutil.copy(Path(launch_worker.__file__), code / "train.py")
    return code


@pytest.mark.slow
def test_cluster_training_job_is_sent_runs_and_leaves_checkpoints(tmp_path: Path) -> None:
    with cluster() as running:
        job = send(
            running, tmp_path, code_folder(tmp_path), command=["train.py", "40", "0.05"], limits={"patience_s": 20}
        )
        ended = job.await_end()

        assert (ended.state, ended.exit_code) == (State.DONE, contract.EXIT_OK), job.describe()
        expected = launch_worker.reference(40)
        assert [(event["step"], event["loss"]) for event in job.events("step")] == sorted(expected.items())
        assert list((job.run / contract.CHECKPOINTS_DIR).glob("step-00000040/commit-*"))
