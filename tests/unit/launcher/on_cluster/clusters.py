"""Clusters in the process, and clients of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
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
