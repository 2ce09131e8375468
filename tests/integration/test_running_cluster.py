"""Manifests over HTTP to an API server whose pods run."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import Deadline
from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.testing.running_cluster import RunningCluster

WAIT_S = 60.0


class Client:
    """As little of a client as a test needs."""

    def __init__(self, running: RunningCluster) -> None:
        config = running.api.kubeconfig()
        self._url = running.api.url
        self._token = config["users"][0]["user"]["token"]

    def send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": "application/json"}
        request = urllib.request.Request(self._url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
            text = answer.read()
        return json.loads(text) if answer.headers["Content-Type"] == "application/json" else text.decode()

    def wait(self, path: str, holds: Callable[[Any], bool]) -> Any:
        deadline = Deadline.after(WAIT_S)
        while True:
            found = self.send("GET", path)
            if holds(found):
                return found
            deadline.check(f"state of {path}: {found.get('status')}")
            deadline.clock.sleep(0.02)


JOB = "/apis/batch/v1/namespaces/default/jobs"
PODS = "/api/v1/namespaces/default/pods"


def has(kind: str) -> Callable[[Any], bool]:
    return lambda obj: any(
        item["type"] == kind and item["status"] == "True" for item in obj.get("status", {}).get("conditions") or ()
    )


def job(script: str, completions: int = 2) -> Any:
    container = {"name": "main", "image": "any", "command": ["sh", "-c", script]}
    pod = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container]}
    spec = {"completionMode": "Indexed", "completions": completions, "parallelism": completions, "backoffLimit": 9}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "a"},
        "spec": {**spec, "template": {"spec": pod}},
    }


def test_running_cluster_job_over_http_runs_logs_and_completes() -> None:
    with RunningCluster([NodeSpec("n0"), NodeSpec("n1")]) as running:
        client = Client(running)
        client.send("POST", JOB, job('echo "index $JOB_COMPLETION_INDEX"'))
        client.wait(f"{JOB}/a", has("Complete"))
        pods = client.send("GET", PODS)["items"]
        logs = [client.send("GET", f"{PODS}/{pod['metadata']['name']}/log") for pod in pods]
        assert logs == ["index 0\n", "index 1\n"]


def test_running_cluster_pod_deleted_over_http_is_replaced() -> None:
    with RunningCluster([NodeSpec("n0")]) as running:
        client = Client(running)
        client.send("POST", JOB, job("sleep 600", 1))
        client.wait(f"{JOB}/a", lambda obj: obj.get("status", {}).get("ready") == 1)
        (old,) = client.send("GET", PODS)["items"]
        client.send("DELETE", f"{PODS}/{old['metadata']['name']}")
        client.wait(f"{JOB}/a", lambda obj: obj["status"].get("failed") == 1 and obj["status"].get("ready") == 1)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            client.wait(f"{PODS}/{old['metadata']['name']}", lambda obj: False)


def test_running_cluster_example_of_the_guide_runs() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guides" / "local-cluster.md").read_text()
    (block,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    found: dict[str, Any] = {}
    exec(block, found)  # noqa: S102 - our own page
    assert found["config"]["clusters"]
