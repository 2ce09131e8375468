"""A job is held against a cluster: what is good, what keeps it from running, what may not be seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.doctor.finding import Finding
from ktrain.launcher.doctor.job import examine
from ktrain.launcher.doctor.looks import Looks
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, Offer, Rule
from tests.unit.launcher.doctor.looking import (
    OtherDoor,
    add_gpu_nodes,
    add_jobset,
    add_node,
    by_check,
    looks_of,
    outcomes,
)
from tests.unit.launcher.on_cluster.clusters import CRDS, job, needs_definitions

TRUE = [{"type": "Active", "status": "True"}]


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


def examined(cluster: FakeCluster, folder: Path, user: str = "admin", **changes: Any) -> dict[str, Finding]:
    return by_check(examine(looks_of(cluster, folder, user), job(**changes)))


def change(cluster: FakeCluster, labels: dict[str, str]) -> None:
    """Gives the namespace labels."""
    cluster.store.mutate(known.NAMESPACE, None, "default", lambda obj: obj["metadata"].update(labels=labels))


def test_job_on_a_good_cluster_has_nothing_against_it(cluster: FakeCluster, tmp_path: Path) -> None:
    add_gpu_nodes(cluster, 3)
    add_jobset(cluster, status={"conditions": []} | {"restarts": 1})
    found = examine(looks_of(cluster, tmp_path), job(nodes=2, accelerator="h100:8", memory={"state": "20Gi"}))

    assert outcomes(found) == {
        "fields": "ok", "permissions": "ok", "pod security": "ok", "JobSet controller": "ok", "accelerators": "ok",
        "memory": "ok", "room": "ok", "shm": "ok", "preemption notice": "ok",
        "gang": "warning",  # there is none
    }  # fmt: skip


def test_looking_at_a_job_changes_nothing(cluster: FakeCluster, tmp_path: Path) -> None:
    add_gpu_nodes(cluster, 2)
    examined(cluster, tmp_path, accelerator="h100:8")
    writes = [item for item in cluster.requests() if item.method != "GET"]

    assert cluster.store.list(known.JOB_SET, "default").items == []
    assert all(item.query.get("dryRun") == "All" or "selfsubjectaccessreviews" in item.path for item in writes)


def test_too_few_accelerators_fail_with_what_is_there(cluster: FakeCluster, tmp_path: Path) -> None:
    add_gpu_nodes(cluster, 1)
    add_node(cluster, "other", **{"nvidia.com/gpu": "8"})  # of another model, for it has no label of this one
    found = examined(cluster, tmp_path, nodes=2, accelerator="h100:8")["accelerators"]

    assert found.outcome == "failed"
    assert (
        "1 of 2 needed nodes have 8 x nvidia.com/gpu" in found.evidence
        and "of all 2 nodes 2 have 8 x" in found.evidence
    )


def test_too_few_accelerators_where_nodes_are_added_only_warn(cluster: FakeCluster, tmp_path: Path) -> None:
    add_gpu_nodes(cluster, 1)
    about = {"name": "cluster-autoscaler-status", "namespace": "kube-system"}
    cluster.store.create(known.CONFIG_MAP, {"metadata": about})
    found = examined(cluster, tmp_path, nodes=2, accelerator="h100:8")["accelerators"]

    assert found.outcome == "warning" and "the cluster autoscaler wrote its status" in found.evidence


def test_memory_tier_that_no_node_holds_fails_with_the_numbers(cluster: FakeCluster, tmp_path: Path) -> None:
    add_gpu_nodes(cluster, 2, memory="200Gi")
    found = examined(cluster, tmp_path, accelerator="h100:8", memory={"state": "120Gi"})["memory"]

    assert found.outcome == "failed"
    assert "0 of 2 such nodes offer that, the largest 200 GiB" in found.evidence and "memory tier" in found.evidence


def test_full_nodes_make_the_job_wait_and_do_not_fail_it(cluster: FakeCluster, tmp_path: Path) -> None:
    add_gpu_nodes(cluster, 2)
    busy = {"name": "a", "image": "x", "resources": {"requests": {"nvidia.com/gpu": "4", "cpu": "1"}}}
    busy["resources"]["limits"] = {"nvidia.com/gpu": "4"}  # type: ignore[index]
    about = {"name": "busy", "namespace": "kube-system"}
    cluster.store.create(known.POD, {"metadata": about, "spec": {"nodeName": "gpu-0", "containers": [busy]}})
    found = examined(cluster, tmp_path, accelerator="h100:8")

    assert found["accelerators"].outcome == "ok"
    assert found["room"].outcome == "warning" and "2 of 3 pods fit" in found["room"].evidence
    assert "Insufficient nvidia.com/gpu" in found["room"].evidence


def test_user_without_rights_is_told_each_and_unknown_is_not_failure(cluster: FakeCluster, tmp_path: Path) -> None:
    add_gpu_nodes(cluster, 2)
    cluster.access = Access({"eve": (Rule(("get", "list"), ("*",), ("jobsets",), ("default",)),)}, {"e": "eve"})
    found = examined(cluster, tmp_path, "eve", accelerator="h100:8")

    assert found["permissions"].outcome == "failed"
    assert "create jobsets.jobset.x-k8s.io" in found["permissions"].evidence
    assert "create secrets" in found["permissions"].evidence
    assert found["dry run"].outcome == "unknown" and "forbidden" in found["dry run"].evidence
    assert found["nodes"].outcome == "unknown" and found["pod security"].outcome == "unknown"
    assert found["permissions to follow"].outcome == "warning"


def test_restricted_namespace_warns_of_a_fabric_that_pins_memory(cluster: FakeCluster, tmp_path: Path) -> None:
    change(cluster, {"pod-security.kubernetes.io/enforce": "restricted"})
    found = examined(cluster, tmp_path, accelerator="h100:8", fabric="rdma:8")
    efa = examined(cluster, tmp_path, accelerator="h100:8", fabric="efa:8")

    assert found["pod security"].outcome == "ok"
    assert found["fabric"].outcome == "warning" and "enforces restricted, which forbids it" in found["fabric"].evidence
    assert "memlock" in found["fabric"].remedy.lower()
    assert "fabric" not in efa


@pytest.mark.parametrize(
    ("message", "check"),
    [
        ('pods "net" is forbidden: violates PodSecurity "restricted:latest": host namespaces', "pod security"),
        ('pods "net" is forbidden: exceeded quota: team, requested: requests.memory=99Gi, used: 1Gi', "quota"),
    ],
)
def test_pods_that_admission_refuses_fail_in_the_servers_words(
    cluster: FakeCluster, tmp_path: Path, message: str, check: str
) -> None:
    status = {"kind": "Status", "reason": "Forbidden", "message": message, "code": 403}
    inner = connect(cluster.write_kubeconfig(tmp_path / "config"))
    door = OtherDoor(inner, {"/api/v1/namespaces/default/pods?": (403, json.dumps(status).encode())})
    found = by_check(examine(Looks(Client(door, clock=FakeClock()), "default"), job()))[check]

    assert found.outcome == "failed" and message in found.evidence


def test_restricted_namespace_fails_code_in_an_image_volume(cluster: FakeCluster, tmp_path: Path) -> None:
    change(cluster, {"pod-security.kubernetes.io/enforce": "restricted"})
    found = examined(cluster, tmp_path, code={"image": "example/code:1"})["pod security"]

    assert found.outcome == "failed" and "image volume" in found.evidence


@needs_definitions
def test_fields_that_an_older_cluster_prunes_are_named_with_their_cost(tmp_path: Path) -> None:
    with FakeCluster(Offer(version="1.33", jobset="0.8.2"), crds=CRDS) as cluster:
        add_gpu_nodes(cluster, 2)
        found = examine(looks_of(cluster, tmp_path), job(accelerator="h100:8"))
    features = {item.evidence: item for item in found if item.check == "features"}

    patterns = features["onJobFailureMessagePatterns of JobSet is not there"]
    assert patterns.outcome == "warning" and patterns.cost
    assert "restartPolicyRules of containers is not there" in features


def test_cluster_without_jobset_cannot_run_the_job(tmp_path: Path) -> None:
    with FakeCluster(Offer(jobset=None)) as cluster:
        found = examined(cluster, tmp_path)

    assert found["dry run"].outcome == "failed" and "jobset.x-k8s.io" in found["dry run"].evidence
    assert found["JobSet controller"].outcome == "unknown"


def test_namespace_that_is_not_there_fails_with_what_to_do(cluster: FakeCluster, tmp_path: Path) -> None:
    found = by_check(examine(looks_of(cluster, tmp_path, namespace="team"), job(namespace="team")))

    assert found["dry run"].outcome == "failed" and "namespace team" in found["dry run"].remedy


def test_job_of_the_same_name_fails_with_what_to_do(cluster: FakeCluster, tmp_path: Path) -> None:
    add_jobset(cluster)
    found = examined(cluster, tmp_path, name="other")["name"]

    assert found.outcome == "failed" and "ktrain delete" in found.evidence


def test_jobsets_without_any_status_warn_that_nobody_acts_on_them(cluster: FakeCluster, tmp_path: Path) -> None:
    add_jobset(cluster)

    assert examined(cluster, tmp_path)["JobSet controller"].outcome == "warning"


def test_things_that_pods_name_and_are_not_there_fail(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.store.create(
        known.SECRET, {"metadata": {"name": "there", "namespace": "default"}, "data": {"k": "c2VjcmV0"}}
    )
    found = examined(
        cluster,
        tmp_path,
        pull_secrets=["there", "gone"],
        volumes=[{"claim": "data", "path": "/data"}],
        code={"git": f"git+https://example.com/me/net@{'a' * 40}", "git_secret": "deploy"},
        placement={"priority": "high"},
    )["references"]
    asked = [item for item in cluster.requests() if item.path.endswith("/secrets/there")]

    assert found.outcome == "failed"
    assert found.evidence == "not there: Secret gone, Secret deploy, PersistentVolumeClaim data, PriorityClass high"
    assert all("PartialObjectMetadata" in item.headers["Accept"] for item in asked)  # its contents are not asked for


def test_small_shm_and_a_short_notice_warn(cluster: FakeCluster, tmp_path: Path) -> None:
    add_node(cluster, "spot", labels={"cloud.google.com/gke-spot": "true"})
    found = examined(cluster, tmp_path, accelerator="h100:8", resources={"shm": "1Gi"}, memory={"state": "120Gi"})
    spot = examined(cluster, tmp_path, placement={"spot": "workers", "provider": "gke"}, memory={"state": "120Gi"})[
        "preemption notice"
    ]

    assert found["shm"].outcome == "warning" and "8Gi" in found["shm"].remedy
    assert found["spot nodes"].outcome == "warning" and "25 s of notice" in found["spot nodes"].cost
    assert spot.outcome == "warning" and "614 s to the bucket" in spot.evidence


def test_claims_of_a_class_that_is_not_there_fail(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.store.create(known.DEVICE_CLASS, {"metadata": {"name": "other.example"}, "spec": {}})
    found = examined(cluster, tmp_path, accelerator="h200:8,h100:8")["device classes"]

    assert found.outcome == "failed" and found.evidence == "gpu.nvidia.com: no such class, there are: other.example"


def make_queue(cluster: FakeCluster, cpu: str, *, active: str = "True", **spec: Any) -> None:
    """A LocalQueue `q` on a ClusterQueue with a quota of CPUs, memory and GPUs."""
    quotas = {"cpu": cpu, "memory": "4Ti", "nvidia.com/gpu": "16"}
    resources = [{"name": name, "nominalQuota": amount} for name, amount in quotas.items()]
    group = {"coveredResources": list(quotas), "flavors": [{"name": "f", "resources": resources}]}
    above = {"namespaceSelector": {}, "resourceGroups": [group], **spec}
    status = {"conditions": [{"type": "Active", "status": active, "reason": "X", "message": "not ready"}]}
    cluster.store.create(known.CLUSTER_QUEUE, {"metadata": {"name": "cq"}, "spec": above})
    about = {"name": "q", "namespace": "default"}
    cluster.store.create(known.LOCAL_QUEUE, {"metadata": about, "spec": {"clusterQueue": "cq"}, "status": status})


@pytest.mark.parametrize(
    ("changes", "check", "outcome", "words"),
    [
        ({"cpu": "500"}, "quota", "ok", "has the quota"),
        ({"cpu": "500"}, "queue", "ok", "is active"),
        ({"cpu": "10"}, "quota", "failed", "67 of 10 cpu"),
        ({"cpu": "10", "cohortName": "all"}, "quota", "warning", "cohort all may lend"),
        ({"cpu": "500", "active": "False"}, "queue", "failed", "not active: not ready"),
        ({"cpu": "500", "stopPolicy": "Hold"}, "queue", "failed", "is held"),
    ],
)
def test_queue_and_quota_are_held_against_the_job(
    tmp_path: Path, changes: dict[str, Any], check: str, outcome: str, words: str
) -> None:
    with FakeCluster(Offer(kueue=True)) as cluster:
        make_queue(cluster, **changes)
        found = examined(cluster, tmp_path, accelerator="h100:8", placement={"queue": "q"})

    assert found["gang"].outcome == "ok" and found["gang"].evidence.startswith("kueue")
    assert (found[check].outcome, words in found[check].evidence) == (outcome, True), found[check]


def test_queue_that_is_not_there_is_refused_by_the_dry_run(tmp_path: Path) -> None:
    with FakeCluster(Offer(kueue=True)) as cluster:
        found = examined(cluster, tmp_path, placement={"queue": "nobody", "gang": "kueue"})["dry run"]

    assert found.outcome == "failed" and "nobody" in found.evidence


def test_server_that_stumbles_leaves_one_check_unknown(cluster: FakeCluster, tmp_path: Path) -> None:
    cluster.put_fault(Fault(503, "GET", "/api/v1/nodes", times=100))
    found = examined(cluster, tmp_path)

    assert found["nodes"].outcome == "unknown" and found["permissions"].outcome == "ok"
