"""What the memory tier's volume belongs to: chosen, refused with what is missing, and found by asking the cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.errors import ConfigError
from ktrain.launcher import budget
from ktrain.launcher.backends.kubernetes.discover import discover
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.facts import ClusterFacts
from ktrain.launcher.quantity import GIB, format_bytes
from ktrain.launcher.render.job import render
from ktrain.launcher.scope import MTC_DRIVER, choose_scope
from ktrain.launcher.spec import JobSpec, Scope
from ktrain.testing.fake_cluster import Access, FakeCluster, Offer, Rule
from tests.unit.launcher import setups
from tests.unit.launcher.on_cluster import clusters
from tests.unit.launcher.test_spec import job

NEEDED = budget.memory_budget(job(nodes=2)).volume
NOTHING = ClusterFacts(node_memory=0, csi_drivers=())


def wants(scope: str) -> JobSpec:
    return job(nodes=2, memory={"state": "4Gi", "scope": scope})


@pytest.mark.parametrize(
    ("facts", "scope"),
    [
        (ClusterFacts(), Scope.POD),  # not known is no reason to rely on it
        (NOTHING, Scope.POD),
        (ClusterFacts(node_memory=NEEDED), Scope.NODE),
        (ClusterFacts(node_memory=NEEDED, csi_drivers=(MTC_DRIVER,)), Scope.NODE),
        (ClusterFacts(node_memory=NEEDED - 1), Scope.POD),
        (ClusterFacts(node_memory=0, csi_drivers=(MTC_DRIVER,)), Scope.MTC),
        (ClusterFacts(csi_drivers=(MTC_DRIVER,)), Scope.MTC),
    ],
)
def test_auto_takes_the_nodes_memory_where_it_is_known_to_suffice(facts: ClusterFacts, scope: Scope) -> None:
    chosen = choose_scope(wants("auto"), facts)

    assert chosen.scope is scope and chosen.reason
    assert chosen.outlives_pods == (scope is not Scope.POD)


@pytest.mark.parametrize("scope", ["pod", "node", "mtc"])
def test_scope_that_was_asked_for_is_taken_where_nothing_is_known(scope: str) -> None:
    assert choose_scope(wants(scope), ClusterFacts()).scope.value == scope


@pytest.mark.parametrize(
    ("scope", "facts", "hint"),
    [
        ("node", NOTHING, "namespace default has no bound claim 'ktrain-memory'; an administrator installs"),
        ("node", ClusterFacts(node_memory=GIB), "a node's part needs 24.48 GiB, and each node lends 1 GiB"),
        ("mtc", NOTHING, f"no driver {MTC_DRIVER}"),
    ],
)
def test_scope_that_the_cluster_lacks_is_refused_with_what_is_missing(
    scope: str, facts: ClusterFacts, hint: str
) -> None:
    with pytest.raises(ConfigError, match=hint):
        render(wants(scope), facts)


def worker(spec: JobSpec) -> dict[str, Any]:
    return setups.pod_of(render(spec, ClusterFacts()).jobset, "worker")


def test_lent_memory_is_in_the_limits_and_not_requested_twice() -> None:
    size = budget.memory_budget(wants("node"))
    pods = {scope: worker(wants(scope)) for scope in ("pod", "node")}
    for index, (container, part) in enumerate((("trainer", size.own), ("agent", size.kept))):
        kind = "containers" if index == 0 else "initContainers"
        of = {scope: next(c for c in pod[kind] if c["name"] == container)["resources"] for scope, pod in pods.items()}
        limit = (size.trainer_limit, size.agent_limit)[index]
        assert of["pod"]["requests"]["memory"] == of["pod"]["limits"]["memory"] == of["node"]["limits"]["memory"]
        assert of["node"]["requests"]["memory"] == format_bytes(limit - part)


def test_lent_memory_is_mounted_as_the_folder_of_the_run_by_agent_and_trainer_alone() -> None:
    def mounts(spec: JobSpec) -> dict[str, dict[str, Any]]:
        pod = worker(spec)
        [volume] = [item for item in pod["volumes"] if item["name"] == "memory"]
        assert volume == {"name": "memory", "persistentVolumeClaim": {"claimName": contract.MEMORY_CLAIM}}
        containers = [*pod["initContainers"], *pod["containers"]]
        return {c["name"]: m for c in containers for m in c["volumeMounts"] if m["name"] == "memory"}

    found = mounts(wants("node"))
    memory = {"state": "4Gi", "scope": "node"}
    assert set(found) == {"agent", "trainer"} and found["agent"] == found["trainer"]
    assert found == mounts(job(name="other", memory=memory))  # the same run, whatever the job is called
    assert found != mounts(job(run="s3://bucket/other", memory=memory))


# Found by asking


def claim(phase: str, size: str | None = "768Gi") -> dict[str, Any]:
    status = {"phase": phase, **({"capacity": {"storage": size}} if size else {})}
    spec = {"accessModes": ["ReadWriteMany"], "resources": {"requests": {"storage": "1Gi"}}}
    return {"metadata": {"name": contract.MEMORY_CLAIM, "namespace": "default"}, "spec": spec, "status": status}


@pytest.mark.parametrize(
    ("claims", "memory"), [([], 0), ([claim("Pending", None)], 0), ([claim("Lost")], 0), ([claim("Bound")], 768 * GIB)]
)
def test_memory_that_nodes_lend_is_known_from_the_bound_claim(
    claims: list[dict[str, Any]], memory: int, tmp_path: Path
) -> None:
    with FakeCluster(Offer(version="1.36")) as cluster:
        for item in claims:
            cluster.store.create(known.PERSISTENT_VOLUME_CLAIM, item)
        facts = discover(clusters.client_of(cluster, tmp_path), clusters.job())

    assert facts.node_memory == memory and facts.csi_drivers == ()


def test_job_with_scope_auto_is_sent_with_the_claim_that_is_there(tmp_path: Path) -> None:
    with FakeCluster(Offer(version="1.36"), crds=clusters.CRDS) as cluster:
        cluster.store.create(known.PERSISTENT_VOLUME_CLAIM, claim("Bound"))
        client = clusters.client_of(cluster, tmp_path)
        tried = try_job(client, clusters.job(memory={"state": "4Gi", "scope": "auto"}))
        submit(client, tried)
        sent = cluster.store.get(known.JOB_SET, "default", "net")

    assert tried.warnings == [] and tried.rendered.scope.scope is Scope.NODE
    assert {"name": "memory", "persistentVolumeClaim": {"claimName": contract.MEMORY_CLAIM}} in setups.pod_of(
        sent, "worker"
    )["volumes"]


def test_memory_of_which_nobody_may_ask_is_not_known(tmp_path: Path) -> None:
    with FakeCluster(Offer(version="1.36")) as cluster:
        cluster.store.create(known.PERSISTENT_VOLUME_CLAIM, claim("Bound"))
        jobsets = Rule(("*",), ("jobset.x-k8s.io",), ("*",))
        cluster.access = Access(rules={"weak": (jobsets,)}, tokens={"admin": "admin", "weak": "weak"})
        facts = discover(clusters.client_of(cluster, tmp_path, "weak"), clusters.job())

    assert facts.node_memory is None and facts.csi_drivers is None
    assert choose_scope(wants("auto"), facts).scope is Scope.POD


def test_driver_of_gke_is_found(tmp_path: Path) -> None:
    with FakeCluster(Offer(version="1.36")) as cluster:
        cluster.store.create(known.CSI_DRIVER, {"metadata": {"name": MTC_DRIVER}, "spec": {}})
        facts = discover(clusters.client_of(cluster, tmp_path), clusters.job())

    assert choose_scope(wants("auto"), facts).scope is Scope.MTC
