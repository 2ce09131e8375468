"""JobSets over HTTP under the CRDs of a real cluster: queued, placed as a gang, lost and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.testing.fake_cluster.offer import Offer
from ktrain.testing.running_cluster import RunningCluster
from tests.integration.test_running_cluster import PODS, Client, has

CRDS = Path(__file__).parents[3] / "shared" / "kubernetes" / "crds"
SETS = "/apis/jobset.x-k8s.io/v1alpha2/namespaces/default/jobsets"
KUEUE = "/apis/kueue.x-k8s.io/v1beta2"
NATIVE = "scheduling.k8s.io/v1alpha2"
SIZE = {"cpu": "2", "memory": "8Gi", "pods": "9"}

pytestmark = [pytest.mark.skipif(not CRDS.is_dir(), reason="CRDs of a real cluster are not beside the repository")]


def jobset(name: str, script: str, *, labels: dict[str, str] | None = None, **pod: Any) -> Any:
    container = {
        "name": "main",
        "image": "any",
        "command": ["sh", "-c", script],
        "resources": {"requests": {"cpu": "1"}},
    }
    template = {"restartPolicy": "Never", "terminationGracePeriodSeconds": 1, "containers": [container], **pod}
    job = {"completionMode": "Indexed", "completions": 2, "parallelism": 2, "backoffLimit": 0}
    workers = {"name": "workers", "replicas": 1, "template": {"spec": {**job, "template": {"spec": template}}}}
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name, "labels": labels or {}},
        "spec": {"replicatedJobs": [workers], "failurePolicy": {"maxRestarts": 1}},
    }


def ready(obj: Any) -> bool:
    return any(item["ready"] for item in obj.get("status", {}).get("replicatedJobsStatus") or ())


def test_running_cluster_queued_jobset_waits_runs_and_finishes() -> None:
    offer = Offer(kueue=True)
    with RunningCluster([NodeSpec("n0", SIZE), NodeSpec("n1", SIZE)], offer, crds=CRDS) as running:
        client = Client(running)
        quota = {"name": "f", "resources": [{"name": "cpu", "nominalQuota": "2"}]}
        spec = {"namespaceSelector": {}, "resourceGroups": [{"coveredResources": ["cpu"], "flavors": [quota]}]}
        for plural, kind, name, body in (
            ("resourceflavors", "ResourceFlavor", "f", {"spec": {"nodeLabels": {"kubernetes.io/hostname": "n1"}}}),
            ("clusterqueues", "ClusterQueue", "cq", {"spec": spec}),
            ("namespaces/default/localqueues", "LocalQueue", "q", {"spec": {"clusterQueue": "cq"}}),
        ):
            made = {"apiVersion": "kueue.x-k8s.io/v1beta2", "kind": kind, "metadata": {"name": name}, **body}
            client.send("POST", f"{KUEUE}/{plural}", made)
        queued = {"kueue.x-k8s.io/queue-name": "q"}
        client.send("POST", SETS, jobset("first", "sleep 600", labels=queued))
        client.send("POST", SETS, jobset("second", "exit 0", labels=queued))
        client.wait(f"{SETS}/first", ready)
        assert client.send("GET", f"{SETS}/second")["spec"]["suspend"]
        assert {pod["spec"]["nodeName"] for pod in client.send("GET", PODS)["items"]} == {"n1"}
        client.send("DELETE", f"{SETS}/first")
        client.wait(f"{SETS}/second", has("Completed"))


def test_running_cluster_native_gang_is_placed_whole_and_restarts_after_a_lost_node() -> None:
    offer = Offer(apis=frozenset({NATIVE}), gates={"GenericWorkload": True, "GangScheduling": True})
    nodes = [NodeSpec("n0", {**SIZE, "cpu": "1"}), NodeSpec("n1", {**SIZE, "cpu": "1"})]
    with RunningCluster(nodes, offer, crds=CRDS) as running:
        client = Client(running)
        group = {"schedulingPolicy": {"gang": {"minCount": 2}}}
        client.send(
            "POST",
            f"/apis/{NATIVE}/namespaces/default/podgroups",
            {"apiVersion": NATIVE, "kind": "PodGroup", "metadata": {"name": "g"}, "spec": group},
        )
        running.lose("n1")
        unreachable = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
        joined = {"schedulingGroup": {"podGroupName": "g"}, "tolerations": [{**unreachable, "tolerationSeconds": 0}]}
        client.wait("/api/v1/nodes/n1", lambda node: not has("Ready")(node))
        client.send("POST", SETS, jobset("a", "sleep 600", **joined))
        unplaced = client.wait(
            f"/apis/{NATIVE}/namespaces/default/podgroups/g", lambda obj: bool(obj.get("status", {}).get("conditions"))
        )
        assert unplaced["status"]["conditions"][0]["reason"] == "Unschedulable"
        assert all("nodeName" not in pod["spec"] for pod in client.send("GET", PODS)["items"])
        running.restore("n1")
        client.wait(f"{SETS}/a", ready)
        running.lose("n0")
        client.wait("/api/v1/nodes/n0", lambda node: not has("Ready")(node))
        running.restore("n0")
        client.wait(f"{SETS}/a", lambda obj: obj["status"].get("restarts") == 1 and ready(obj))
