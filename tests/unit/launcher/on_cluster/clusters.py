"""Clusters in the process, and clients of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.spec import JobSpec
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_cluster import FakeCluster
from tests.unit.launcher import setups

needs_definitions = pytest.mark.skipif(
    not setups.CRDS.is_dir(), reason=f"the custom resource definitions are not at {setups.CRDS}"
)
CRDS = setups.CRDS if setups.CRDS.is_dir() else None


def client_of(cluster: FakeCluster, folder: Path, user: str = "admin") -> Client:
    """A client by way of a kubeconfig; its pauses take no time."""
    return Client(connect(cluster.write_kubeconfig(folder / f"{user}.json", user)), clock=FakeClock())


def job(**changes: Any) -> JobSpec:
    """Two nodes without devices."""
    value = {
        "name": "net",
        "run": "s3://bucket/net",
        "image": "example/train:1",
        "command": ["train.py"],
        "nodes": 2,
        "memory": {"state": "1Gi"},
    }
    return spec_file.from_value({**value, **changes})


def make_worker(cluster: FakeCluster, index: int, text: str, state: str = "running") -> dict[str, Any]:
    """A worker's pod of the job `net`, whose trainer has written a text."""
    labels = {contract.LABEL_RUN: "net", contract.LABEL_ROLE: "worker"}
    labels["batch.kubernetes.io/job-completion-index"] = str(index)
    now = {"running": {}} if state == "running" else {"terminated": {"exitCode": 0}}
    status = {"phase": "Running", "containerStatuses": [{"name": "trainer", "restartCount": 0, "state": now}]}
    images = [{"name": "agent", "image": "x"}, {"name": "trainer", "image": "x"}]
    about = {"name": f"net-worker-0-{index}-abcde", "namespace": "default", "labels": labels}
    spec = {"nodeName": "n1", "containers": images}
    pod = cluster.store.create(known.POD, {"metadata": about, "spec": spec, "status": status})
    cluster.logs.write(pod, "trainer", text)
    return pod
