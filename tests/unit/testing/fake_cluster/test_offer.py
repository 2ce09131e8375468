"""What a cluster serves follows its offer, and may change while it runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from ktrain.errors import ConfigError
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.unit.testing.fake_cluster.clusters import BARE, CRDS, JOB_SETS, JOBS, PODS, Client, jobset, needs_crds, pod

GANG = "/apis/scheduling.k8s.io"
RULES = {
    "restartPolicy": "Never",
    "restartPolicyRules": [{"action": "Restart", "exitCodes": {"operator": "In", "values": [3]}}],
}


def paths(value: object, name: str) -> Iterator[object]:
    """Every value below that has the name."""
    if isinstance(value, dict):
        for key, entry in value.items():
            if key == name:
                yield entry
            yield from paths(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from paths(entry, name)


def test_version_tells_what_is_emulated_from_1_33_on() -> None:
    with FakeCluster(replace(BARE, version="1.36.2")) as cluster:
        found = Client(cluster).get("/version")
        assert (found["gitVersion"], found["emulationMinor"], found["minCompatibilityMinor"]) == ("v1.36.2", "36", "35")
        cluster.offer = replace(cluster.offer, version="1.31")
        assert "emulationMinor" not in Client(cluster).get("/version")


@pytest.mark.parametrize("version", ["2.1", "newest", "1", "1.24", "1.99"])
def test_version_that_is_not_known_is_refused(version: str) -> None:
    with pytest.raises(ConfigError, match="version|schemas"):
        FakeCluster(replace(BARE, version=version))


def test_alpha_version_is_served_where_it_is_switched_on_and_known() -> None:
    on = replace(BARE, apis=frozenset({"scheduling.k8s.io/v1alpha2"}))
    with FakeCluster(on) as cluster:
        client = Client(cluster)
        assert {each["version"] for each in client.get(GANG)["versions"]} == {"v1", "v1alpha2"}
        assert [each["name"] for each in client.get(f"{GANG}/v1alpha2")["resources"]][0] == "podgroups"
        cluster.offer = replace(on, version="1.31")
        assert client.send("GET", f"{GANG}/v1alpha2").status == 404
        assert client.send("GET", f"{GANG}/v1alpha2/namespaces/default/podgroups").status == 404


def test_group_of_what_is_not_offered_is_a_page_not_found() -> None:
    with FakeCluster(BARE) as cluster:
        answer = Client(cluster).send("GET", "/apis/jobset.x-k8s.io/v1alpha2")
        assert (answer.status, answer.body) == (404, "404 page not found\n")


def test_objects_survive_a_rollback_and_are_there_after_the_upgrade() -> None:
    with FakeCluster(Offer()) as cluster:
        client = Client(cluster)
        client.post(JOB_SETS, jobset())
        cluster.offer = replace(cluster.offer, jobset=None)
        assert client.send("GET", JOB_SETS).status == 404
        cluster.offer = replace(cluster.offer, jobset="0.12.0")
        assert [each["metadata"]["name"] for each in client.get(JOB_SETS)["items"]] == ["a"]


def test_gate_that_is_off_drops_its_field_without_a_word_even_under_strict() -> None:
    body = pod(schedulingGroup={"podGroupName": "g"})
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        dropped = client.send("POST", PODS, body, dryRun="All", fieldValidation="Strict")
        assert dropped.status == 201 and "schedulingGroup" not in dropped.body["spec"]
        assert "Warning" not in dropped.headers
        cluster.offer = replace(BARE, gates={"GenericWorkload": True})
        assert client.post(PODS, body)["spec"]["schedulingGroup"] == {"podGroupName": "g"}


@pytest.mark.parametrize(("version", "kept"), [("1.34", False), ("1.35", True)])
def test_restart_rules_are_dropped_before_their_gate_is_on(version: str, kept: bool) -> None:
    with FakeCluster(replace(BARE, version=version)) as cluster:
        stored = Client(cluster).post(PODS, pod(main=RULES), fieldValidation="Strict")
        assert ("restartPolicyRules" in stored["spec"]["containers"][0]) is kept


def test_field_of_a_later_version_is_unknown() -> None:
    with FakeCluster(replace(BARE, version="1.31")) as cluster:
        answer = Client(cluster).send("POST", PODS, pod(main=RULES), fieldValidation="Strict")
        assert answer.status == 400
        assert answer.body["message"].endswith('unknown field "spec.containers[0].restartPolicyRules"')


def test_gate_drops_the_field_of_a_job_that_a_controller_writes() -> None:
    from ktrain.launcher.cluster.resources import POD

    with FakeCluster(BARE) as cluster:
        body = pod(schedulingGroup={"podGroupName": "g"})
        stored = cluster.store.create(POD, {**body, "metadata": {"name": "p", "namespace": "default"}})
        assert "schedulingGroup" not in stored["spec"] and stored["status"]["phase"] == "Pending"


@needs_crds
@pytest.mark.parametrize(
    ("version", "kept"),
    [
        ("0.8.2", set()),
        ("0.10.1", {"restartPolicyRules", "onJobFailureMessagePatterns"}),
        ("0.11.1", {"restartPolicyRules", "onJobFailureMessagePatterns"}),
        ("0.12.0", {"restartPolicyRules", "onJobFailureMessagePatterns", "schedulingGroup"}),
        ("0.13.0-devel", {"restartPolicyRules", "onJobFailureMessagePatterns", "schedulingGroup"}),
    ],
)
def test_older_jobset_prunes_what_its_schema_lacks(version: str, kept: set[str]) -> None:
    rule = {"name": "r", "action": "FailJobSet", "onJobFailureMessagePatterns": ["x"]}
    body = jobset(pod_spec={"main": RULES, "schedulingGroup": {"podGroupName": "g"}}, failurePolicy={"rules": [rule]})
    names = ("restartPolicyRules", "onJobFailureMessagePatterns", "schedulingGroup")
    with FakeCluster(Offer(jobset=version), crds=CRDS) as cluster:
        client = Client(cluster)
        stored = client.post(JOB_SETS, body, fieldValidation="Ignore")
        assert {name for name in names if list(paths(stored, name))} == kept
        strict = client.send("POST", JOB_SETS, jobset("b") | {"spec": body["spec"]}, fieldValidation="Strict")
        assert strict.status == (201 if kept == set(names) else 400)


@needs_crds
def test_definitions_of_what_is_served_can_be_read() -> None:
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    with FakeCluster(Offer(kueue=True), crds=CRDS) as cluster:
        client = Client(cluster)
        found = {each["metadata"]["name"] for each in client.get(path)["items"]}
        assert {"jobsets.jobset.x-k8s.io", "workloads.kueue.x-k8s.io", "localqueues.kueue.x-k8s.io"} <= found
        cluster.offer = replace(cluster.offer, kueue=False)
        assert [each["metadata"]["name"] for each in client.get(path)["items"]] == ["jobsets.jobset.x-k8s.io"]


@needs_crds
def test_crd_that_is_not_there_is_refused_before_anything_is_served() -> None:
    with pytest.raises(ConfigError, match="no CRD .*v0.1.0"):
        FakeCluster(Offer(jobset="0.1.0"), crds=CRDS)


@needs_crds
def test_queued_jobset_is_suspended_where_kueue_is() -> None:
    body = jobset()
    body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "q"}
    with FakeCluster(Offer(kueue=True), crds=CRDS) as cluster:
        assert Client(cluster).post(JOB_SETS, body)["spec"]["suspend"] is True
        job = {"metadata": {"name": "j"}, "spec": {"template": {"spec": pod()["spec"]}}}
        assert Client(cluster).post(JOBS, job)["spec"]["suspend"] is False
