"""Variables of a container, and paths of its mounts."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain.launcher.cluster import environment
from ktrain.launcher.cluster.resources import CONFIG_MAP
from ktrain.launcher.cluster.store import Store
from ktrain.launcher.cluster.volumes import Mounts

MOUNTS = Mounts(Path("/r"), ("/ktrain/work", "/ktrain/job", "/data"))


@pytest.mark.parametrize(
    ("text", "expanded"),
    [("$(A)-$(B)", "1-2"), ("$$(A)", "$(A)"), ("$(C)", "$(C)"), ("$A $(A", "$A $(A"), ("", "")],
)
def test_expand_reference_known_escaped_or_unknown(text: str, expanded: str) -> None:
    assert environment.expand(text, {"A": "1", "B": "2"}) == expanded


@pytest.mark.parametrize(
    ("text", "rewritten"),
    [
        ("/ktrain/work", "/r/ktrain/work"),
        ("unix:/ktrain/work/agent.sock", "unix:/r/ktrain/work/agent.sock"),
        ("cat /ktrain/job/job.json > /data/x", "cat /r/ktrain/job/job.json > /r/data/x"),
        ("/data:/ktrain/work", "/r/data:/r/ktrain/work"),
        ("file:///data/run", "file:///r/data/run"),
        ("gs://bucket/data", "gs://bucket/data"),
        ("/ktrain/workers", "/ktrain/workers"),
        ("/home/data", "/home/data"),
        ("/database", "/database"),
    ],
)
def test_rewrite_path_of_a_mount_where_a_path_begins(text: str, rewritten: str) -> None:
    assert MOUNTS.rewrite(text) == rewritten


def test_of_container_sources_in_order_later_ones_win() -> None:
    store = Store()
    store.create(CONFIG_MAP, {"metadata": {"name": "c", "namespace": "s"}, "data": {"A": "1", "B": "2"}})
    pod = {
        "metadata": {"name": "p", "namespace": "s", "uid": "u", "labels": {"x/y": "label"}},
        "spec": {"nodeName": "n", "containers": [{"name": "main", "resources": {"limits": {"memory": "2Gi"}}}]},
        "status": {"podIP": "127.77.0.2"},
    }
    fields = {"L": "metadata.labels['x/y']", "IP": "status.podIP", "N": "spec.nodeName", "NONE": "metadata.labels['z']"}
    container = {
        "name": "main",
        "envFrom": [{"prefix": "P_", "configMapRef": {"name": "c"}}],
        "env": [
            {"name": "P_A", "value": "own"},
            {"name": "SUM", "value": "$(P_A) $(P_B)"},
            *({"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}} for name, path in fields.items()),
            {"name": "M", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
            {"name": "CPU", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
        ],
    }
    assert environment.of_container(pod, container, store, {"cpu": "8"}) == {
        "P_A": "own",
        "P_B": "2",
        "SUM": "own 2",
        "L": "label",
        "IP": "127.77.0.2",
        "N": "n",
        "NONE": "",
        "M": "2048",
        "CPU": "8",
    }
