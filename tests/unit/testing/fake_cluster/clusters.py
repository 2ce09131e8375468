"""Clusters, clients and objects for the tests of the fake cluster."""

from __future__ import annotations

import http.client
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from ktrain.testing.fake_cluster import FakeCluster, Offer

CRDS = Path(__file__).parents[5] / "shared" / "kubernetes" / "crds"
needs_crds = pytest.mark.skipif(not CRDS.is_dir(), reason=f"no CRDs in {CRDS}")
BARE = Offer(jobset=None)
WAIT_S = 20.0

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"
JSON_PATCH = "application/json-patch+json"

MAPS = "/api/v1/namespaces/default/configmaps"
PODS = "/api/v1/namespaces/default/pods"
JOBS = "/apis/batch/v1/namespaces/default/jobs"
JOB_SETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets"


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: Mapping[str, str]
    body: Any
    warnings: list[str]


class Client:
    """Plain HTTP to a cluster, a connection for each request."""

    def __init__(self, cluster: FakeCluster, token: str = "admin") -> None:
        self._host = cluster.url.removeprefix("http://")
        self._token = token

    def send(self, method: str, path: str, body: Any = None, kind: str = "application/json", **query: Any) -> Answer:
        connection, response = self.open(method, path, body, kind, **query)
        try:
            text = response.read()
            is_json = (response.getheader("Content-Type") or "").startswith("application/json")
            body = json.loads(text) if is_json else text.decode()
            warnings = response.headers.get_all("Warning") or []
            return Answer(response.status, dict(response.getheaders()), body, warnings)
        finally:
            connection.close()

    def open(
        self, method: str, path: str, body: Any = None, kind: str = "application/json", **query: Any
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection(self._host, timeout=WAIT_S)
        headers = {"Authorization": f"Bearer {self._token}", "Content-Type": kind}
        data = None if body is None else body if isinstance(body, str) else json.dumps(body)
        connection.request(method, path + (f"?{urlencode(query)}" if query else ""), data, headers)
        return connection, connection.getresponse()

    def get(self, path: str, **query: Any) -> Any:
        answer = self.send("GET", path, **query)
        assert answer.status == 200, answer
        return answer.body

    def post(self, path: str, body: Any, **query: Any) -> Any:
        answer = self.send("POST", path, body, **query)
        assert answer.status == 201, answer
        return answer.body

    def apply(self, path: str, body: Any, manager: str, **query: Any) -> Answer:
        return self.send("PATCH", path, body, APPLY, fieldManager=manager, **query)


def config_map(name: str = "a", data: Any = None, **metadata: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, **metadata}, "data": data or {"k": "v"}}


def pod(name: str = "p", **spec: Any) -> dict[str, Any]:
    main = {"name": "main", "image": "image:1", **spec.pop("main", {})}
    spec = {"restartPolicy": "Never", "containers": [main], **spec}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": spec}


def jobset(name: str = "a", pod_spec: Any = None, **spec: Any) -> dict[str, Any]:
    template = {"spec": {"template": {"spec": pod(**(pod_spec or {}))["spec"]}}}
    replicated = {"name": "workers", "replicas": 1, "template": template}
    spec = {"replicatedJobs": [replicated], **spec}
    return {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": {"name": name}, "spec": spec}
